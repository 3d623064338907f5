"""torchdata's StatefulDataLoader: what it does with another number of ranks by itself, and what it does here."""

from __future__ import annotations

import itertools
import logging
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from dckpt.checkpointer import Checkpointer
from dckpt.data.sampler import ElasticDistributedSampler
from dckpt.data.stateful import FixedLoader, InterleavedLoader, adapt_loader
from dckpt.errors import ConfigError, IncompatibleStateError
from dckpt.state.progress import Batch, TrainProgress
from dckpt.state.train_state import TrainState

torchdata = pytest.importorskip("torchdata.stateful_dataloader", reason="needs torchdata")
samplers = pytest.importorskip("torchdata.stateful_dataloader.sampler")

SIZE = 103


class Numbers(Dataset):
    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> int:
        return index


class Stream(IterableDataset):
    """Numbers that are dealt out to the workers; knows its place, as torchdata asks of it."""

    def __init__(self) -> None:
        self.place = 0

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        offset, by = (0, 1) if info is None else (info.id, info.num_workers)
        while self.place < SIZE:
            self.place += 1
            if (self.place - 1) % by == offset:
                yield self.place - 1
        self.place = 0

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state_dict):
        self.place = state_dict["place"]


def make_loader(dataset=None, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchdata calls a deprecated function of torch
        return torchdata.StatefulDataLoader(dataset or Numbers(), generator=torch.Generator(), **options)


def distributed(rank: int, ranks: int, micro: int, **options):
    sampler = samplers.StatefulDistributedSampler(Numbers(), num_replicas=ranks, rank=rank, seed=5)
    return make_loader(batch_size=micro, sampler=sampler, **options)


class Ranks:
    """All ranks of one start, one after the other in this process."""

    def __init__(self, batch: Batch, **options) -> None:
        self.batch = batch
        self.progress = [TrainProgress(batch=batch) for _ in range(batch.data_parallel)]
        self.loaders = [
            adapt_loader(distributed(rank, batch.data_parallel, batch.micro, **options), batch=batch)
            for rank in range(batch.data_parallel)
        ]
        self.states = [
            TrainState(model=nn.Linear(1, 1), data=loader, progress=progress)
            for loader, progress in zip(self.loaders, self.progress, strict=True)
        ]

    def train(self, steps: int) -> list[tuple[int, int]]:
        taken = []
        while steps:
            epoch = self.loaders[0].epoch
            passes = [iter(loader) for loader in self.loaders]
            while steps and self.loaders[0].epoch == epoch:
                for each in passes:
                    for micro in itertools.islice(each, self.batch.accumulation):
                        taken += [(epoch, index) for index in micro.tolist()]
                for progress in self.progress:
                    progress.advance()
                steps -= 1
            left = [len(list(each)) for each in passes]  # drawn and not trained on: lost, as in a job that ends here
            assert self.loaders[0].epoch == epoch or not any(left)
        return taken

    def state(self) -> dict:
        states = [loader.state_dict() for loader in self.loaders]
        assert states == states[:1] * len(states)
        return states[0]

    def load(self, state: dict) -> None:
        for loader in self.loaders:
            loader.load_state_dict(state)


def order_of(epoch: int) -> list[int]:
    return torch.randperm(SIZE, generator=torch.Generator().manual_seed(5 + epoch)).tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_each_sample_comes_once_an_epoch_over_numbers_of_ranks(workers):
    taken, state = [], None
    for batch, steps in [(Batch(2, 1, 4), 5), (Batch(4, 1, 2), 4), (Batch(4, 2, 1), 5), (Batch(1, 1, 8), 3)]:
        ranks = Ranks(batch, num_workers=workers)
        if state is not None:
            ranks.load(state)
        taken += ranks.train(steps)
        assert not any(loader.repeated for loader in ranks.loaders)
        state = ranks.state()

    assert (state["epoch"], state["cursor"]) == (1, 40)
    assert sorted(taken) == sorted(
        [(0, index) for index in order_of(0)[:96]] + [(1, index) for index in order_of(1)[:40]]
    )


def test_a_position_that_is_no_whole_row_repeats_less_than_a_row_and_says_so(caplog):
    ranks = Ranks(Batch(2, 1, 4))
    taken = ranks.train(5)
    again = Ranks(Batch(2, 1, 3))
    with caplog.at_level(logging.WARNING, "dckpt"):
        again.load(ranks.state())
    taken += again.train(10)

    assert "position 40 is no whole row of 3 ranks: 1 samples come twice" in caplog.text
    assert again.loaders[0].facts()["repeated"] == 1
    assert set(taken) == {(0, index) for index in order_of(0)[:99]}
    assert len(taken) == 99 + 1


def test_a_checkpoint_carries_the_position(tmp_path):
    ranks = Ranks(Batch(4))
    with Checkpointer(tmp_path, signals=()) as checkpointer:
        checkpointer.resume(ranks.states[0])
        taken = ranks.train(20)
        checkpointer.save(ranks.states[0], blocking=True)
    again = Ranks(Batch(2, 2))
    with Checkpointer(tmp_path, signals=()) as checkpointer:
        assert checkpointer.resume(again.states[0]) is not None
    taken += again.train(10)

    assert [index for epoch, index in taken if epoch == 0] == order_of(0)[:100]
    assert [index for epoch, index in taken if epoch == 1] == order_of(1)[:20]


@pytest.mark.parametrize("make", [lambda: Stream(), lambda: None], ids=["iterable", "shuffled by each rank"])
def test_what_has_a_place_by_rank_and_worker_goes_on_there_and_nowhere_else(tmp_path, make):
    def start(ranks: int, workers: int) -> tuple[FixedLoader, TrainState]:
        dataset = make()
        options = {} if dataset is not None else {"shuffle": True}
        loader = adapt_loader(
            make_loader(dataset, batch_size=4, num_workers=workers, **options), batch=Batch(4, 1, ranks)
        )
        assert isinstance(loader, FixedLoader)
        return loader, TrainState(model=nn.Linear(1, 1), data=loader, progress=TrainProgress())

    loader, state = start(1, 2)
    with Checkpointer(tmp_path, signals=()) as checkpointer:
        checkpointer.resume(state)
        rest = iter(loader)
        drawn = [next(rest).tolist() for _ in range(3)]
        checkpointer.save(state, blocking=True)
    rest = [micro.tolist() for micro in rest]
    assert len(drawn) + len(rest) >= SIZE // 4

    again, state = start(1, 2)
    with Checkpointer(tmp_path, signals=()) as checkpointer:
        assert checkpointer.resume(state) is not None
    assert [micro.tolist() for micro in again] == rest
    for ranks, workers, told in [(2, 2, "ranks 1 in the checkpoint, 2 live"), (1, 0, "workers 2 in the checkpoint, 0")]:
        _, state = start(ranks, workers)
        with Checkpointer(tmp_path, signals=()) as checkpointer, pytest.raises(IncompatibleStateError, match=told):
            checkpointer.resume(state)


def test_a_loader_of_another_kind_is_refused_by_name():
    batch = Batch(4, 1, 2)
    loader = adapt_loader(distributed(0, 2, 4), batch=batch)
    assert isinstance(loader, InterleavedLoader)
    fixed = adapt_loader(make_loader(Stream(), batch_size=4), batch=batch)
    with pytest.raises(IncompatibleStateError, match="layout 'fixed' in the checkpoint, 'interleaved' live"):
        loader.load_state_dict(fixed.state_dict())
    with pytest.raises(IncompatibleStateError, match="layout 'interleaved' in the checkpoint, 'fixed' live"):
        fixed.load_state_dict(loader.state_dict())
    with pytest.raises(IncompatibleStateError, match=r"seed 5 .*start_leg"):
        other = samplers.StatefulDistributedSampler(Numbers(), num_replicas=2, rank=0, seed=6)
        adapt_loader(make_loader(batch_size=4, sampler=other), batch=batch).load_state_dict(loader.state_dict())


def test_another_batch_in_the_progress_than_in_the_loader_is_refused():
    """Its accumulation was forgotten: the position would move by half of what is trained on."""
    loader = adapt_loader(distributed(0, 1, 2), batch=Batch(micro=2))

    with pytest.raises(ConfigError, match=r"expected one batch, found Batch\(micro=2, accumulation=2"):
        TrainState(model=nn.Linear(1, 1), data=loader, progress=TrainProgress(batch=Batch(micro=2, accumulation=2)))


def test_the_length_leaves_out_the_micro_batches_that_are_accumulated_already():
    batch = Batch(micro=2, accumulation=2)
    loader, progress = adapt_loader(distributed(0, 1, 2), batch=batch), TrainProgress(batch=batch)
    state = TrainState(model=nn.Linear(1, 1), data=loader, progress=progress)
    progress.micro_step = 1

    assert len(loader) == len(list(loader)) == SIZE // 4 * 2 - 1
    assert state.progress is progress


def test_what_cannot_be_adapted_is_refused_by_name():
    elastic = ElasticDistributedSampler(SIZE, batch=Batch(4), seed=0, rank=0)
    plain = DistributedSampler(Numbers(), num_replicas=1, rank=0)
    for loader, told in [
        (DataLoader(Numbers()), "found DataLoader without state_dict"),
        (make_loader(batch_size=4, sampler=elastic), "ElasticDistributedSampler, which holds the position"),
        (make_loader(batch_sampler=elastic.batches()), "ElasticDistributedSampler, which holds the position"),
        (distributed(0, 1, 2), "loader.batch_size=4 as in the batch, found 2"),
        (distributed(0, 2, 4), "sampler.num_replicas=1 as in the batch, found 2"),
        (make_loader(batch_size=4, sampler=plain), "can begin in the middle, found DistributedSampler"),
    ]:
        with pytest.raises(ConfigError, match=told):
            adapt_loader(loader, batch=Batch(4))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_elastic_sampler_works_in_a_stateful_loader_as_it_is(tmp_path, workers):
    def start():
        sampler = ElasticDistributedSampler(SIZE, batch=Batch(4), seed=0, rank=0)
        progress = TrainProgress()
        loader = make_loader(batch_sampler=sampler.batches(), num_workers=workers)
        return loader, progress, TrainState(model=nn.Linear(1, 1), data=sampler, progress=progress)

    def train(loader, progress, steps):
        taken = []
        for number, micro in enumerate(loader):
            if number < steps:  # the others are drawn and not trained on
                taken += micro.tolist()
                progress.advance()
        return taken

    whole = list(ElasticDistributedSampler(SIZE, batch=Batch(4), seed=0, rank=0))
    loader, progress, state = start()
    with Checkpointer(tmp_path, signals=()) as checkpointer:
        checkpointer.resume(state)
        taken = train(loader, progress, 7)
        checkpointer.save(state, blocking=True)
    loader, progress, state = start()
    with Checkpointer(tmp_path, signals=()) as checkpointer:
        checkpointer.resume(state)
        taken += train(loader, progress, 18)

    assert taken == whole
