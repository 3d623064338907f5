"""Counters that a repair fills in are those that the run had, or they are not filled in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dckpt.format.manifest import Manifest
from dckpt.resume.facts.collect import progress_facts
from dckpt.state.progress import TrainProgress
from dckpt.tools.refill import refill_progress


def manifest_of(step: int, facts: dict[str, Any]) -> Manifest:
    return Manifest(
        run_id="run",
        step=step,
        micro_step=0,
        generation=1,
        attempt="0" * 32,
        created_unix_s=0.0,
        world_size=1,
        facts={"progress": facts},
    )


def in_leg(number: int) -> TrainProgress:
    """10 steps of 4 samples in each leg but the last, which has 3."""
    progress = TrainProgress(max_steps=10)
    for name in range(1, number):
        for _ in range(10):
            progress.advance(samples=4)
        progress.finish_epoch()
        progress.begin_leg(f"leg {name}")
    for _ in range(3):
        progress.advance(samples=4)
    return progress


def facts_of(progress: TrainProgress) -> dict[str, Any]:
    return dict(progress_facts(SimpleNamespace(progress=progress)))  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_run_in_a_later_leg_stays_in_it(number: int) -> None:
    saved = in_leg(number)

    found = refill_progress(manifest_of(saved.step, facts_of(saved)))

    assert found is not None
    live = TrainProgress(max_steps=10)
    live.load_state_dict(found.value["state"])  # type: ignore[index,call-overload,arg-type]
    assert facts_of(live) == facts_of(saved)
    assert (live.done, saved.done) == (False, False)
    assert ("names of the legs are lost" in found.change.how) == (number > 1)


@pytest.mark.parametrize("change", [{"leg_step": 99}, {"leg_samples": -1}, {"leg": 0}, {"leg": 10**9}, {"epoch": None}])
def test_facts_of_legs_that_do_not_add_up_fill_nothing_in(change: dict[str, Any]) -> None:
    saved = in_leg(2)

    assert refill_progress(manifest_of(saved.step, {**facts_of(saved), **change})) is None
