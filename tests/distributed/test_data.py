"""The data position over real checkpoints: each sample once an epoch on 2, then 1, then 4 ranks, and refusals on all ranks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from dckpt.data.order import EpochOrder
from tests.support import data_jobs as jobs

pytestmark = pytest.mark.distributed


def test_each_sample_comes_once_an_epoch_over_kills_and_numbers_of_ranks(ranks, tmp_path):
    seen: list[tuple[int, int]] = []
    for world_size, micro, steps in [(2, 4, 5), (1, 2, 4), (4, 1, 9), (2, 2, 8)]:
        results = ranks.run(jobs.train_and_save, world_size, str(tmp_path), micro, steps, 2)
        assert len({str(position) for _, position in results}) == 1, "a position that differs by rank"
        step = [index for taken, _ in results for index in taken]
        assert len(step) == steps * jobs.GLOBAL_BATCH
        seen += step
    position = results[0][1]

    assert (position["epoch"], position["cursor"]) == (2, 16)
    assert max(Counter(seen).values()) == 1
    for epoch, count in [(0, 96), (1, 96), (2, 16)]:
        trained = EpochOrder(3, epoch, jobs.SIZE).indices(np.arange(count)).tolist()
        assert sorted(index for when, index in seen if when == epoch) == sorted(trained)


def test_another_order_is_refused_on_every_rank_before_anything_changes(ranks, tmp_path):
    ranks.run(jobs.train_and_save, 2, str(tmp_path), 4, 3, 0)
    told = ranks.run(jobs.resume_with, 2, str(tmp_path), 4, jobs.SIZE + 1)

    assert told[0] == told[1]
    assert "data: seed 3 in the checkpoint, 4 live" in told[0]
    assert "data: size 103 in the checkpoint, 104 live" in told[0]


def test_a_second_round_begins_once_and_goes_on_on_other_ranks(ranks, tmp_path):
    ranks.run(jobs.train_and_save, 2, str(tmp_path), 4, 3, 0)
    results = ranks.run(jobs.second_round, 2, str(tmp_path), 40, 2)
    assert results[0] == results[1]
    begun, counters, position = results[0]
    assert begun
    assert counters == {"step": 5, "leg": 2, "leg_step": 2, "leg_samples": 16, "leg_epoch": 0, "done": False}
    assert (position["size"], position["epoch"], position["cursor"]) == (40, 0, 16)

    ((begun, counters, position),) = ranks.run(jobs.second_round, 1, str(tmp_path), 40, 4)
    assert not begun
    assert counters == {"step": 9, "leg": 2, "leg_step": 6, "leg_samples": 48, "leg_epoch": 1, "done": True}
    assert (position["epoch"], position["cursor"]) == (1, 8)
