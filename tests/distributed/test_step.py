"""`Checkpointer.step`: when it saves, when it says stop, and what a call costs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dckpt
from dckpt import failpoint
from dckpt.errors import ConfigError
from tests.support.fault_jobs import SmallRun, break_writes, count_calls, count_step_costs, stop_by_signal
from tests.support.ranks import RankPool

pytestmark = pytest.mark.distributed

Opened = Callable[..., tuple[dckpt.Checkpointer, SmallRun]]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    """A new run without a checkpoint."""
    made: list[dckpt.Checkpointer] = []

    def make(
        *, max_steps: int | None = None, signals: tuple[signal.Signals, ...] = (), **options: Any
    ) -> tuple[dckpt.Checkpointer, SmallRun]:
        run = SmallRun("plain", max_steps=max_steps)
        made.append(dckpt.Checkpointer(tmp_path / "run", signals=signals, **options))
        assert made[-1].resume(run.state) is None
        return made[-1], run

    yield make
    for checkpointer in made:
        checkpointer.close()


def train(checkpointer: dckpt.Checkpointer, run: SmallRun, steps: int) -> list[dckpt.StepAction]:
    actions = []
    for _ in range(steps):
        run.step()
        actions.append(checkpointer.step(run.state))
    checkpointer.wait()
    return actions


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_every_so_many_steps_a_save_is_made_at_multiples(opened: Opened) -> None:
    checkpointer, run = opened(save=dckpt.Every(steps=3))
    train(checkpointer, run, 4)
    checkpointer.save(run.state, blocking=True)
    actions = train(checkpointer, run, 6)

    assert checkpointer.steps() == [3, 4, 6, 9]
    assert set(actions) == {dckpt.Continue}


def test_without_a_cadence_only_the_last_step_is_saved_and_is_durable_when_step_returns(opened: Opened) -> None:
    checkpointer, run = opened(max_steps=5)
    train(checkpointer, run, 4)
    assert checkpointer.steps() == []
    run.step()

    assert checkpointer.step(run.state) is dckpt.Stop
    assert (run.progress.done, checkpointer.steps()) == (True, [5])


def test_the_last_step_is_saved_once_also_when_it_is_a_multiple(opened: Opened) -> None:
    checkpointer, run = opened(max_steps=4, save=dckpt.Every(steps=2))
    train(checkpointer, run, 4)
    checkpointer.step(run.state)

    assert checkpointer.steps() == [2, 4]


def test_minutes_are_counted_from_the_last_save_of_any_kind(opened: Opened) -> None:
    checkpointer, run = opened(save=dckpt.Every(minutes=1))
    cadence: Any = checkpointer._cadence
    cadence._clock = clock = Clock()
    cadence.note_save()
    for number in range(1, 31):
        clock.now += 10
        run.step()
        if number == 15:
            checkpointer.save(run.state)
        checkpointer.step(run.state)
    checkpointer.wait()

    # Every 60 s, and anew from the save that the user made after 150 s.
    assert checkpointer.steps() == [6, 12, 15, 21, 27]


def test_steps_and_minutes_together_save_at_whichever_comes_first(opened: Opened) -> None:
    checkpointer, run = opened(save=dckpt.Every(steps=10, minutes=1))
    cadence: Any = checkpointer._cadence
    cadence._clock = clock = Clock()
    cadence.note_save()
    for _ in range(24):
        clock.now += 10
        run.step()
        checkpointer.step(run.state)
    checkpointer.wait()

    assert checkpointer.steps() == [6, 10, 16, 20]


def test_real_minutes_pass_unnoticed_for_about_a_second_at_most(opened: Opened) -> None:
    checkpointer, run = opened(save=dckpt.Every(minutes=0.02))
    started, saved_at = time.monotonic(), []
    while len(saved_at) < 2 and time.monotonic() - started < 20:
        run.step()
        checkpointer.step(run.state)
        time.sleep(0.005)
        if len(checkpointer.steps()) > len(saved_at):
            saved_at.append(time.monotonic() - started)

    assert 1.2 <= saved_at[0] < 4
    # Seen once committed: a slow first commit must not make the second interval look short, so both are counted from the start.
    assert 2.4 <= saved_at[1] < saved_at[0] + 4


def test_the_cost_of_a_step_does_not_grow_with_the_step_rate(opened: Opened) -> None:
    checkpointer, run = opened(save=dckpt.Every(steps=100_000, minutes=60))
    calls = count_calls(checkpointer)
    counts = []
    for steps in (1000, 10_000):
        for _ in range(steps):
            run.progress.advance()
            assert checkpointer.step(run.state) is dckpt.Continue
        counts.append(calls())

    # The distance between checks doubles up to its limit; a check is two calls.
    assert counts[0] <= 1000 // 10, counts
    assert counts[1] - counts[0] <= 10_000 // 20, counts


def test_a_quick_start_does_not_hide_a_signal_for_long_from_slow_steps(opened: Opened) -> None:
    checkpointer, run = opened(signals=(signal.SIGUSR1,))
    cadence: Any = checkpointer._cadence
    cadence._clock = clock = Clock()
    for seconds in [0.001] * 4 + [60.0] * 20:
        clock.now += seconds
        run.step()
        if run.progress.step == 5:
            os.kill(os.getpid(), signal.SIGUSR1)
        if checkpointer.step(run.state) is dckpt.Stop:
            break

    assert run.progress.step <= 8


def test_ranks_pay_the_same_and_wait_for_nobody_between_checks(ranks: RankPool, tmp_path: Path) -> None:
    for calls, seconds in ranks.run(count_step_costs, 2, str(tmp_path / "run"), 2000):
        assert calls < 300
        assert seconds < 10


def test_in_the_middle_of_an_accumulation_nothing_is_saved_without_a_signal(opened: Opened) -> None:
    checkpointer, run = opened(save=dckpt.Every(steps=1, minutes=0.001), max_steps=3)
    calls = count_calls(checkpointer)
    cadence: Any = checkpointer._cadence
    cadence._clock = Clock()
    cadence._clock.now += 60
    run.progress.step = 3
    run.progress.micro_step = 1

    assert checkpointer.step(run.state) is dckpt.Continue
    assert (calls(), checkpointer.steps()) == (0, [])  # nobody said how long an accumulation is
    run.progress.batch = dckpt.Batch(micro=2, accumulation=4)
    assert checkpointer.step(run.state) is dckpt.Continue
    assert checkpointer.steps() == []
    run.progress.micro_step = 0
    checkpointer.step(run.state)
    assert checkpointer.steps() == [3]


@pytest.mark.parametrize("has_gradients", [True, False])
def test_a_signal_in_the_middle_of_an_accumulation_saves_there_or_says_why_it_cannot(
    opened: Opened, has_gradients: bool
) -> None:
    checkpointer, run = opened(signals=(signal.SIGUSR1,))
    run.progress.batch = dckpt.Batch(micro=2, accumulation=4)
    run.step()
    run.optimizer.zero_grad()
    if has_gradients:
        run.model(torch.ones(2, run.width)).sum().backward()
    run.progress.accumulate()
    os.kill(os.getpid(), signal.SIGUSR1)

    if has_gradients:
        assert checkpointer.step(run.state) is dckpt.Stop
        (name,) = [entry.name for entry in Path(checkpointer._storage.locate("")).glob("step-*")]
        assert name == "step-0000000001.g0001.m1"
        assert checkpointer.step(run.state) is dckpt.Stop
    else:
        with pytest.raises(ConfigError, match="found none on any parameter"):
            checkpointer.step(run.state)


def test_step_needs_progress_and_an_open_checkpointer(opened: Opened) -> None:
    checkpointer, run = opened()
    with pytest.raises(ConfigError, match=r"TrainState\(progress="):
        checkpointer.step(dckpt.TrainState(model=run.model))
    checkpointer.close()

    with pytest.raises(ConfigError, match="found it closed"):
        checkpointer.step(run.state)


def test_a_signal_saves_the_step_stops_and_gives_the_handler_back(opened: Opened) -> None:
    noticed = []
    before = signal.signal(signal.SIGUSR1, lambda *_: noticed.append(True))
    try:
        checkpointer, run = opened(signals=(signal.SIGUSR1,))
        assert train(checkpointer, run, 1) == [dckpt.Continue]
        os.kill(os.getpid(), signal.SIGUSR1)
        run.step()

        assert checkpointer.step(run.state) is dckpt.Stop
        assert (checkpointer.steps(), noticed) == ([2], [True])
        checkpointer.close()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert noticed == [True, True]
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("failures", [1, 2])
def test_a_save_before_a_stop_that_fails_is_tried_once_more_and_then_raised(
    opened: Opened, caplog: pytest.LogCaptureFixture, failures: int
) -> None:
    checkpointer, run = opened(signals=(signal.SIGUSR1,))
    run.step()
    os.kill(os.getpid(), signal.SIGUSR1)
    failing = break_writes(checkpointer, failures)
    try:
        if failures == 1:
            assert checkpointer.step(run.state) is dckpt.Stop
        else:
            with pytest.raises(dckpt.StorageFullError, match="save of step 1"):
                checkpointer.step(run.state)
    finally:
        failpoint.disarm()

    assert failing.num_failed == failures
    assert checkpointer.steps() == ([1] if failures == 1 else [])
    assert "save of step 1 failed" in caplog.text


@pytest.mark.parametrize("victim", [0, 2])
def test_a_signal_to_one_rank_stops_all_at_the_same_step_saved(ranks: RankPool, tmp_path: Path, victim: int) -> None:
    found = ranks.run(stop_by_signal, 3, str(tmp_path / "run"), victim)

    assert len({step for step, _ in found}) == 1
    assert all(steps == [step] for step, steps in found), found
