"""The sampler in a real DataLoader with worker processes that read ahead; jobs that end in the middle and go on."""

from __future__ import annotations

import random
import re
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

import dckpt
from dckpt.checkpointer import Checkpointer
from dckpt.data.order import EpochOrder
from dckpt.data.sampler import ElasticDistributedSampler
from dckpt.data.seeding import SampleIndex, SampleRandom, SeededDataset, seeded_sample
from dckpt.engine.resume_policy import ResumePolicy
from dckpt.errors import ConfigError
from dckpt.state.progress import Batch, TrainProgress
from dckpt.state.train_state import TrainState

SIZE = 50


class Numbers(Dataset):
    """Each item is its own index."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> int:
        return index


class Noisy(Dataset):
    """An augmentation that draws from every global stream."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, random.random(), np.random.rand(), torch.rand(()).item()], dtype=torch.float64)


class Keyed(Dataset):
    """An augmentation that draws from the sample's own generators."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: SampleIndex) -> torch.Tensor:
        own = SampleRandom(index)
        drawn = [index, own.python.random(), own.numpy.random(), torch.rand((), generator=own.torch).item()]
        return torch.tensor(drawn, dtype=torch.float64)


class Job:
    """One start of a training: everything is made anew, as after a crash."""

    def __init__(self, batch: Batch, dataset: Dataset | None = None, *, workers: int = 0, **options) -> None:
        self.dataset = dataset if dataset is not None else Numbers()
        self.sampler = ElasticDistributedSampler(self.dataset, batch=batch, seed=9, rank=0, **options)
        self.progress = TrainProgress(batch=batch)
        self.state = TrainState(model=nn.Linear(1, 1), data=self.sampler, progress=self.progress)
        self.loader = DataLoader(
            self.dataset,
            batch_sampler=self.sampler.batches(),
            num_workers=workers,
            generator=torch.Generator(),
            **({"prefetch_factor": 4, "persistent_workers": True} if workers else {}),
        )
        self.batch = batch

    def train(self, steps: int) -> list:
        """The samples of so many steps, over the ends of epochs."""
        taken = []
        while steps:
            for number, micro in enumerate(self.loader, 1):
                taken += micro.tolist()
                if number % self.batch.accumulation == 0:
                    self.progress.advance()
                    steps -= 1
                if not steps:
                    break
        return taken


def straight(epochs: int) -> list[int]:
    return [
        index for epoch in range(epochs) for index in EpochOrder(9, epoch, SIZE).indices(np.arange(SIZE))[:48].tolist()
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_job_that_ends_in_the_middle_goes_on_with_the_next_sample(tmp_path, workers):
    """Read ahead by workers and lost: nothing. Batch, accumulation and workers change on the way, over an epoch's end."""
    with Checkpointer(tmp_path, signals=()) as checkpointer:
        job = Job(Batch(4, 2), workers=workers)
        checkpointer.resume(job.state)
        taken = job.train(4)
        checkpointer.save(job.state, blocking=True)
        job.train(1)  # lost with the job
    for batch, steps in [(Batch(2, 2), 4), (Batch(8), 2), (Batch(1, 8), 3)]:
        job = Job(batch, workers=workers)
        with Checkpointer(tmp_path, signals=()) as checkpointer:
            report = checkpointer.resume(job.state, policy=ResumePolicy(allow=["global_batch"]))
            assert report is not None
            taken += job.train(steps)
            checkpointer.save(job.state, blocking=True)

    assert taken == straight(2)[: len(taken)]
    assert len(taken) == 4 * 8 + 4 * 4 + 2 * 8 + 3 * 8 == job.progress.samples
    assert (job.progress.epoch, job.sampler.epoch, job.sampler.cursor) == (1, 1, len(taken) - 48)


def train_micro_batches(job: Job, count: int, weight: torch.Tensor) -> list[int]:
    """So many forwards and backwards from where the job stands, over ends of steps and epochs; the samples."""
    taken = []
    while True:
        for micro in job.progress.unconsumed(job.loader):
            if len(taken) == count * job.batch.micro:
                return taken
            (weight * micro.double()).sum().backward()
            taken += micro.tolist()
            if job.progress.accumulate():
                with torch.no_grad():
                    weight -= 1e-3 * weight.grad
                weight.grad = None
                job.progress.advance()


@pytest.mark.parametrize("at", [1, 9, 22, 23, 24])
def test_a_job_that_ends_within_an_accumulation_goes_on_with_the_next_micro_batch(tmp_path, at):
    """The gradients of the micro-batches before are in the checkpoint; none is drawn again and none is left out."""

    def start() -> tuple[Job, nn.Linear]:
        model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        nn.init.ones_(model.weight)
        job = Job(Batch(2, 4))
        job.state = TrainState(model=model, data=job.sampler, progress=job.progress)
        return job, model

    whole, model = start()
    expected = train_micro_batches(whole, 40, model.weight)
    job, first = start()
    with Checkpointer(tmp_path, signals=()) as checkpointer:
        checkpointer.resume(job.state)
        taken = train_micro_batches(job, at, first.weight)
        checkpointer.save(job.state, blocking=True)
    job, second = start()
    with Checkpointer(tmp_path, signals=()) as checkpointer:
        assert checkpointer.resume(job.state) is not None
    taken += train_micro_batches(job, 40 - at, second.weight)

    assert taken == expected == straight(2)[:80]
    assert torch.equal(second.weight, model.weight)
    assert (job.progress.step, job.sampler.epoch, job.sampler.cursor) == (10, 1, 80 - 48)


@pytest.mark.parametrize("at", [5, 6])
def test_a_checkpoint_at_the_last_step_of_an_epoch_goes_on_with_the_next_epoch(tmp_path, at):
    with Checkpointer(tmp_path, signals=()) as checkpointer:
        job = Job(Batch(8))
        checkpointer.resume(job.state)
        taken = job.train(at)
        checkpointer.save(job.state, blocking=True)
    with Checkpointer(tmp_path, signals=()) as checkpointer:
        job = Job(Batch(8))
        assert checkpointer.resume(job.state) is not None
        assert (job.progress.epoch, job.sampler.epoch) == (at // 6, at // 6)
        taken += job.train(7)

    assert taken == straight(3)[: len(taken)]


def test_the_plain_sampler_gives_a_loader_the_same_samples():
    sampler = ElasticDistributedSampler(SIZE, batch=Batch(4, 2), seed=9, rank=0)
    loader = DataLoader(Numbers(), batch_size=4, sampler=sampler)
    assert [len(micro) for micro in loader] == [4] * 12 == [4] * len(loader)
    with torch.random.fork_rng():
        assert [index for micro in loader for index in micro.tolist()] == straight(1)


@pytest.mark.parametrize("dataset", [SeededDataset(Noisy()), Keyed()])
def test_augmentation_does_not_depend_on_ranks_workers_batches_or_kills(dataset):
    """The opt-in mode: each sample of each epoch comes out the same, wherever and whenever it is made."""
    whole = Job(Batch(8), dataset, sample_keys=True).train(12)
    assert len({tuple(item[1:]) for item in whole}) == len(whole), "two samples drew the same numbers"
    ranks = []
    for rank in range(2):
        job = Job(Batch(1, 4), dataset, workers=2, sample_keys=True)
        job.sampler = ElasticDistributedSampler(dataset, batch=Batch(1, 4, 2), seed=9, rank=rank, sample_keys=True)
        TrainState(model=nn.Linear(1, 1), data=job.sampler, progress=TrainProgress())
        loader = DataLoader(dataset, batch_sampler=job.sampler.batches(), num_workers=2, generator=torch.Generator())
        found = [item for micro in loader for item in micro.tolist()]
        for _ in range(6):
            job.sampler.advance()
        ranks += found + [item for micro in islice(loader, 24) for item in micro.tolist()]

    assert sorted(map(tuple, ranks)) == sorted(map(tuple, whole))


def test_the_example_in_the_readme_trains_each_sample_once_an_epoch():
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    (block,) = [text for text in re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL) if "batches()" in text]
    dataset, model = Numbers(), nn.Linear(1, 1)
    names = {"dckpt": dckpt, "torch": torch, "DataLoader": DataLoader, "dataset": dataset, "world_size": 1}
    names |= {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    exec(block, names)
    progress, taken = names["progress"], []
    while not progress.done:
        for micro in names["loader"]:
            taken += micro.tolist()
            if progress.accumulate():
                progress.advance()

    assert progress.epoch == progress.max_epochs == 3
    assert taken == [
        index for epoch in range(3) for index in EpochOrder(0, epoch, SIZE).indices(np.arange(32)).tolist()
    ]


def test_a_seeded_sample_leaves_the_global_streams_as_they_were():
    states = lambda: (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: E731
    before = states()
    with pytest.raises(KeyError), seeded_sample(SampleIndex(3, seed=0, epoch=0)):
        random.random(), np.random.rand(), torch.rand(3)
        raise KeyError
    assert states() == before


def test_a_plain_index_is_refused_by_name():
    for dataset in (SeededDataset(Noisy()), Subset(Keyed(), range(SIZE))):
        with pytest.raises(ConfigError, match="sample_keys=True"):
            dataset[3]


def test_a_sample_index_is_an_index():
    index = SampleIndex(3, seed=1, epoch=2)
    assert [10, 11, 12, 13][index] == 13 and index == 3 and hash(index) == hash(3)
    assert torch.arange(5)[index] == 3 and np.arange(5)[index] == 3
