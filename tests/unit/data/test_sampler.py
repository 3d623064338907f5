"""The sampler's position, state and refusals; random topologies are in test_walks.py, real loaders in test_loader.py."""

from __future__ import annotations

import copy
import json
import logging
import math
import pickle
from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn

from dckpt.data.order import EpochOrder
from dckpt.data.sampler import ElasticDistributedSampler
from dckpt.errors import ConfigError, CorruptCheckpointError, IncompatibleStateError
from dckpt.state.progress import Batch, TrainProgress
from dckpt.state.train_state import TrainState

BATCH = Batch(2, 2, 1)


def make(size: int = 10, batch: Batch = BATCH, **options) -> ElasticDistributedSampler:
    return ElasticDistributedSampler(size, **{"batch": batch, "seed": 0, "rank": 0, **options})


def order_of(size: int, epoch: int = 0, seed: int = 0) -> list[int]:
    return EpochOrder(seed, epoch, size).indices(np.arange(size)).tolist()


def test_a_pass_goes_from_the_position_to_the_end_of_the_epoch_and_the_next_one_is_the_next_epoch():
    sampler = make()
    assert list(sampler) == order_of(10)[:8]
    assert (sampler.epoch, sampler.cursor, len(sampler)) == (0, 0, 8)
    sampler.advance()
    assert (sampler.epoch, sampler.cursor, len(sampler)) == (0, 4, 4)
    assert list(sampler) == order_of(10)[4:8]
    sampler.advance()
    assert (sampler.epoch, sampler.cursor, len(sampler)) == (1, 0, 8)
    assert list(sampler) == order_of(10, epoch=1)[:8]


def test_ranks_take_the_micro_batches_of_a_step_in_turns():
    order = order_of(50)
    micro_batches = [order[begin : begin + 2] for begin in range(0, 48, 2)]
    for accumulation, ranks in ((2, 3), (6, 1), (1, 6), (3, 2)):
        for rank in range(ranks):
            sampler = make(50, Batch(2, accumulation, ranks), rank=rank)
            assert list(sampler.batches()) == micro_batches[rank::ranks]


def test_a_pass_under_way_is_not_moved_by_the_position():
    """Workers prefetch: what they were sent stays in order while training advances."""
    sampler = make()
    indices = iter(sampler)
    found = list(islice(indices, 5))
    sampler.advance()
    assert found + list(indices) == order_of(10)[:8]


def test_a_shorter_last_step_keeps_the_number_of_micro_batches_and_pads_nothing():
    ranks = [make(21, Batch(3, 2, 2), tail="short", rank=rank) for rank in range(2)]
    passes = [list(sampler.batches()) for sampler in ranks]
    assert [len(sampler.batches()) for sampler in ranks] == [4, 4]
    assert [[len(micro) for micro in found] for found in passes] == [[3, 3, 2, 3], [3, 3, 2, 2]]
    assert sorted(index for found in passes for micro in found for index in micro) == list(range(21))
    assert [ranks[0].advance(), ranks[0].samples_in_step, ranks[0].advance(), ranks[0].epoch] == [12, 9, 9, 1]


def test_an_empty_micro_batch_is_refused_unless_it_is_allowed():
    batch = Batch(3, 2, 2)
    with pytest.raises(ConfigError, match=r"last step of the epoch has 3 samples .* allow_empty=True"):
        make(15, batch, tail="short")
    found = [list(make(15, batch, tail="short", allow_empty=True, rank=rank).batches()) for rank in range(2)]
    assert [[len(micro) for micro in each] for each in found] == [[3, 3, 1, 1], [3, 3, 0, 1]]


def test_a_shorter_last_step_needs_whole_micro_batches():
    with pytest.raises(ConfigError, match=r"batch_sampler=sampler\.batches\(\)"):
        iter(make(tail="short"))


def test_the_state_is_plain_equal_on_every_rank_and_goes_to_any_number_of_ranks():
    ranks = [make(1003, Batch(5, 1, 8), rank=rank) for rank in range(8)]
    for _ in range(8):
        for sampler in ranks:
            sampler.advance()
    states = {json.dumps(sampler.state_dict()) for sampler in ranks}
    assert len(states) == 1
    rest = []
    for rank in range(4):
        sampler = make(1003, Batch(1, 2, 4), rank=rank)
        sampler.load_state_dict(json.loads(next(iter(states))))
        assert sampler.cursor == 320
        rest += sampler
    assert sorted(rest) == sorted(order_of(1003)[320:1000])


def test_a_position_at_the_end_of_an_epoch_is_the_beginning_of_the_next_one():
    """Saved by something that does not settle it, or continued with a batch that leaves no whole step."""
    saved = {**make().state_dict(), "cursor": 10}
    sampler = make()
    sampler.load_state_dict(saved)
    assert (sampler.epoch, sampler.cursor, sampler.take_finished_epochs()) == (1, 0, 1)
    assert list(sampler) == order_of(10, epoch=1)[:8]

    sampler = make(10, Batch(8))
    sampler.load_state_dict({**saved, "cursor": 4})
    assert (sampler.epoch, sampler.cursor, sampler.take_finished_epochs()) == (1, 0, 1)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"seed": 1}, "seed 0 in the checkpoint, 1 live"),
        ({"shuffle": False}, "shuffle True in the checkpoint, False live"),
        ({"size": 11}, r"size 10 in the checkpoint, 11 live.*start_leg"),
        ({"seed": 1, "size": 11}, "seed 0 .*; size 10"),
    ],
)
def test_a_position_in_another_order_is_refused_by_name_with_all_differences(change, match):
    saved = make().state_dict()
    sampler = make(change.pop("size", 10), **change)
    with pytest.raises(IncompatibleStateError, match=match):
        sampler.load_state_dict(saved)
    assert sampler.cursor == 0


def test_another_version_of_the_order_is_refused():
    with pytest.raises(IncompatibleStateError, match="order_version 2 in the checkpoint, 1 live"):
        make().load_state_dict({**make().state_dict(), "order_version": 2})


@pytest.mark.parametrize("change", [{"cursor": -1}, {"cursor": 11}, {"epoch": "x"}, {"size": 0}, {"cursor": True}])
def test_what_cannot_be_a_position_is_damage(change):
    with pytest.raises(CorruptCheckpointError, match=next(iter(change))):
        make().load_state_dict({**make().state_dict(), **change})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"size": 3}, "at least one global batch of 4 samples, found a data set of 3"),
        ({"size": 0}, "dataset=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": True}, "seed=True"),
        ({"tail": "pad"}, "expected 'drop' or 'short'"),
        ({"rank": 1}, "rank=1"),
        ({"rank": None, "batch": Batch(1, 1, 2)}, r"data_parallel=2 ranks, found 1\. Pass rank="),
        ({"batch": 4}, "expected a dckpt.Batch"),
    ],
)
def test_wrong_arguments_are_refused_by_name(options, match):
    with pytest.raises(ConfigError, match=match):
        make(**options)


def test_the_size_may_be_given_as_the_data_set():
    dataset = torch.utils.data.TensorDataset(torch.zeros(12, 1))
    assert len(ElasticDistributedSampler(dataset, batch=Batch(4), seed=0)) == 12


def test_facts_say_what_a_resume_compares():
    sampler = make(dataset_fingerprint="abc")
    sampler.advance()
    assert sampler.facts() == {
        "order_version": 1,
        "seed": 0,
        "shuffle": True,
        "size": 10,
        "epoch": 0,
        "cursor": 4,
        "tail": "drop",
        "global_batch": 4,
        "dataset": "abc",
        "n_eff": 8,
    }
    assert make(tail="short", batch=Batch(4)).facts()["n_eff"] == 10


def test_a_second_pass_without_progress_is_told(caplog):
    sampler = make()
    list(sampler)
    with caplog.at_level(logging.WARNING, "dckpt"):
        list(sampler)
    assert "position did not move from 0" in caplog.text
    sampler.advance()
    caplog.clear()
    list(sampler)
    assert not caplog.text


def linked(sampler, progress) -> TrainState:
    return TrainState(model=nn.Linear(1, 1), data=sampler, progress=progress)


def test_a_train_state_links_the_sampler_to_the_progress():
    sampler, progress = make(), TrainProgress(max_epochs=2, batch=BATCH)
    linked(sampler, progress)
    linked(sampler, progress)
    while not progress.done:
        for _ in range(len(sampler) // 4):
            progress.advance()
        progress.finish_epoch()
    assert (progress.step, progress.epoch, progress.samples, sampler.epoch, sampler.cursor) == (4, 2, 16, 2, 0)


def test_the_sampler_says_how_many_samples_a_step_had():
    sampler, progress = make(batch=Batch(4), tail="short"), TrainProgress()
    linked(sampler, progress)
    for _ in range(4):
        progress.advance()
    assert (progress.samples, progress.epoch, progress.batch_history) == (14, 1, [(0, 4), (2, 2), (3, 4)])
    with pytest.raises(ConfigError, match=r"advance\(samples=3\): expected 4"):
        progress.advance(samples=3)
    assert (progress.step, progress.samples, sampler.cursor) == (4, 14, 4)
    progress.advance(samples=4)
    assert sampler.cursor == 8


def test_two_samplers_in_a_mapping_are_both_moved():
    text, pictures, progress = make(), make(6, Batch(2)), TrainProgress()
    linked({"text": text, "pictures": pictures}, progress)
    for _ in range(3):
        progress.advance()
    assert ((text.epoch, text.cursor), (pictures.epoch, pictures.cursor)) == ((1, 4), (1, 0))
    assert (progress.samples, progress.epoch) == (3 * 6, 1)


def test_another_batch_in_the_progress_than_in_the_sampler_is_refused():
    with pytest.raises(ConfigError, match=r"expected one batch, found Batch\(micro=8"):
        linked(make(), TrainProgress(batch=Batch(8)))


def test_a_progress_of_another_kind_is_refused():
    class Own:
        batch = None
        micro_step = 0

        def state_dict(self):
            return {}

        def load_state_dict(self, state_dict):
            pass

    with pytest.raises(ConfigError, match="progress of type Own"):
        linked(make(), Own())


def test_micro_batches_whose_gradients_were_saved_are_not_drawn_again():
    sampler, progress = make(20, Batch(2, 3, 1)), TrainProgress(batch=Batch(2, 3, 1))
    linked(sampler, progress)
    progress.advance()
    progress.micro_step = 2
    assert list(sampler) == order_of(20)[6 + 4 : 18]
    assert (len(sampler), len(sampler.batches())) == (8, 4)
    assert next(iter(progress.unconsumed(sampler.batches()))) == order_of(20)[10:12], "left out twice"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda sampler: pickle.loads(pickle.dumps(sampler))])
def test_a_copy_has_the_position_and_follows_no_progress(duplicate):
    sampler, progress = make(20, Batch(2, 3, 1)), TrainProgress()
    linked(sampler, progress)
    progress.advance()
    progress.micro_step = 1
    other = duplicate(sampler)
    progress.advance()
    assert (other.cursor, sampler.cursor) == (6, 12)
    progress.micro_step = 1
    assert (len(other), len(sampler)) == (12, 4)


def test_starting_at_a_billion_samples_computes_one_block(monkeypatch):
    """The first index of a pass in the middle of 10^9 samples costs one block of indices, and so does the state."""
    asked = []
    indices = EpochOrder.indices
    monkeypatch.setattr(EpochOrder, "indices", lambda order, at: asked.append(at.size) or indices(order, at))
    saved = {**make(10**9).state_dict(), "cursor": 4 * 180_000_000}
    sampler = make(10**9)
    sampler.load_state_dict(saved)
    first = next(iter(sampler))

    assert first == indices(EpochOrder(0, 0, 10**9), np.array([720_000_000])).item()
    assert sum(asked) <= 8192 and len(sampler) == 280_000_000


def test_the_number_of_samples_left_is_exact():
    for size, batch, tail in [(23, Batch(2, 2, 2), "drop"), (23, Batch(2, 2, 2), "short"), (24, Batch(3), "short")]:
        sampler = make(size, batch, tail=tail)
        while sampler.epoch == 0:
            assert len(sampler.batches()) == len(list(sampler.batches()))
            left = sampler.facts()["n_eff"] - sampler.cursor
            assert len(sampler.batches()) == math.ceil(left / batch.samples) * batch.accumulation
            sampler.advance()
