"""What a load that is refused says: how to load on purpose less, once, without the same error as its own cause."""

from __future__ import annotations

import re

import pytest
import torch

import dckpt
from tests.support.resume_runs import SmallRun, open_run, save_run


def freeze_first_layer(run: SmallRun) -> None:
    """As a program that builds its optimizer from the parameters that still train."""
    run.groups[0]["params"] = run.groups[0]["params"][1:]
    run.groups[1]["params"] = run.groups[1]["params"][1:]


def test_a_layer_that_left_the_optimizer_is_named_with_the_call_that_loads_the_rest(tmp_path):
    saved = save_run(tmp_path / "run")
    frozen = SmallRun(build=freeze_first_layer, seed=1)
    with open_run(tmp_path / "run") as checkpointer:
        with pytest.raises(dckpt.IncompatibleStateError) as caught:
            checkpointer.resume(frozen.state)
        assert "no longer in the optimizer (frozen or removed?)" in str(caught.value)
        said = re.search(r"checkpointer\.load\(state, allow_unexpected=\[(.*)\]\)", str(caught.value))
        assert said is not None, caught.value
        checkpointer.load(frozen.state, allow_unexpected=[name.strip("' ") for name in said[1].split(",")])

    before, after = (run.optimizer.state[run.model[3].weight] for run in (saved, frozen))
    assert torch.equal(before["exp_avg"], after["exp_avg"])
    assert torch.equal(saved.model[0].weight, frozen.model[0].weight)


def test_other_differences_leave_the_choice_open(tmp_path):
    save_run(tmp_path / "run")

    def widen(run: SmallRun) -> None:
        freeze_first_layer(run)
        run.model[3].weight.data = torch.zeros(16, 17)

    with open_run(tmp_path / "run") as checkpointer, pytest.raises(dckpt.IncompatibleStateError) as caught:
        checkpointer.resume(SmallRun(build=widen).state)
    assert "allow_unexpected=[...]" in str(caught.value)


def test_a_refusal_is_not_its_own_cause(tmp_path):
    save_run(tmp_path / "run")
    with open_run(tmp_path / "run") as checkpointer:
        with pytest.raises(dckpt.IncompatibleStateError) as refused:
            checkpointer.resume(SmallRun(build=freeze_first_layer).state)
        with pytest.raises(dckpt.ConfigError) as second:
            checkpointer.save(SmallRun().state, step=13, blocking=True)

    for caught in (refused, second):
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__
