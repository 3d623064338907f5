"""Two FSDP2 ranks save behind their training: each checkpoint is the state at its call, on both ranks."""

from __future__ import annotations

import pytest

from tests.support.overlap_jobs import load_step, save_behind_training

pytestmark = pytest.mark.distributed


def test_every_checkpoint_saved_behind_training_is_the_state_at_its_call(ranks, tmp_path):
    results = ranks.run(save_behind_training, 2, str(tmp_path / "run"), 3)

    assert [deferred for _, deferred in results] == [3, 3]
    for step in results[0][0]:
        loaded = ranks.run(load_step, 2, str(tmp_path / "run"), step)
        assert loaded == [found[step] for found, _ in results], step
