"""What the caller of a save sees when it fails, is repeated, comes too soon or must not be made at all."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dckpt
from dckpt import failpoint
from dckpt.errors import (
    CommitConflictError,
    ConfigError,
    PoisonedStateError,
    SaveNotFinishedError,
    StorageError,
    StorageFullError,
)
from dckpt.storage.posix import Posix
from tests.support.fault_jobs import SmallRun, break_writes, skip_when_busy
from tests.support.ranks import RankPool

pytestmark = pytest.mark.distributed


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoint.disarm()


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., tuple[dckpt.Checkpointer, SmallRun]]]:
    """Makes a new run with one committed checkpoint of step 1; closed at the end, whatever it then says."""
    made: list[dckpt.Checkpointer] = []

    def make(*, width: int = 48, **options: Any) -> tuple[dckpt.Checkpointer, SmallRun]:
        run = SmallRun("plain", width=width)
        checkpointer = dckpt.Checkpointer(tmp_path / "run", signals=(), **options)
        made.append(checkpointer)
        assert checkpointer.resume(run.state) is None
        run.step()
        assert checkpointer.save(run.state, blocking=True).outcome == "committed"
        return checkpointer, run

    yield make
    failpoint.disarm()
    for checkpointer in made:
        with contextlib.suppress(dckpt.DckptError):
            checkpointer.close()


def save_next(checkpointer: dckpt.Checkpointer, run: SmallRun) -> dckpt.PendingSave:
    run.step()
    return checkpointer.save(run.state, blocking=True)


# -- the error policy ------------------------------------------------------------------------------------------------


def test_a_failed_save_is_in_its_handle_and_the_log_and_training_goes_on(
    opened: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer, run = opened(give_up_after=3)
    first = break_writes(checkpointer, 2)
    failed = [save_next(checkpointer, run) for _ in range(2)]
    good = save_next(checkpointer, run)
    second = break_writes(checkpointer, 2)
    failed += [save_next(checkpointer, run) for _ in range(2)]

    assert (first.num_failed, second.num_failed) == (2, 2)
    for pending in failed:
        assert (pending.outcome, pending.done, pending.staged) == ("failed", True, True)
        assert isinstance(pending.error, StorageFullError), pending.error
        assert f"save of step {pending.step}: rank 0 failed in phase write" in str(pending.error)
        assert f"save of step {pending.step} failed" in caplog.text
    assert (good.outcome, good.error) == ("committed", None)
    assert checkpointer.steps() == [1, 4]
    assert sorted(os.listdir(tmp_path / "run")) == ["generations", "step-0000000001.g0001", "step-0000000004.g0001"]


def test_saves_that_fail_in_a_row_are_given_up_after_the_stated_number(opened: Callable[..., Any]) -> None:
    checkpointer, run = opened(give_up_after=2)
    failing = break_writes(checkpointer, 2)
    save_next(checkpointer, run)

    with pytest.raises(StorageFullError, match="rank 0 failed in phase write"):
        save_next(checkpointer, run)
    assert failing.num_failed == 2
    assert save_next(checkpointer, run).outcome == "committed"


@pytest.mark.parametrize("call", ["step", "save", "wait", "close", "with"])
def test_under_raise_the_error_of_a_save_comes_out_of_the_next_call(opened: Callable[..., Any], call: str) -> None:
    checkpointer, run = opened(on_save_error="raise")
    failing = break_writes(checkpointer)
    run.step()
    assert checkpointer.save(run.state).wait(30) == "failed"
    run.step()

    calls = {
        "step": lambda: checkpointer.step(run.state),
        "save": lambda: checkpointer.save(run.state),
        "wait": checkpointer.wait,
        "close": checkpointer.close,
        "with": lambda: checkpointer.__exit__(None, None, None),
    }
    with pytest.raises(StorageFullError, match="save of step 2"):
        calls[call]()
    assert failing.num_failed == 1


def test_a_blocking_save_raises_at_once_under_raise(opened: Callable[..., Any]) -> None:
    checkpointer, run = opened(on_save_error="raise")
    break_writes(checkpointer)

    with pytest.raises(StorageFullError, match="save of step 2"):
        save_next(checkpointer, run)


def test_an_error_in_the_loop_is_not_replaced_by_that_of_the_last_save(opened: Callable[..., Any]) -> None:
    checkpointer, run = opened(on_save_error="raise")
    break_writes(checkpointer)

    with pytest.raises(ZeroDivisionError), checkpointer:
        run.step()
        checkpointer.save(run.state)
        raise ZeroDivisionError


def test_another_job_on_the_run_is_raised_under_any_policy(opened: Callable[..., Any], tmp_path: Path) -> None:
    checkpointer, run = opened()
    other = SmallRun("plain")
    with dckpt.Checkpointer(tmp_path / "run", signals=()) as second:
        second.resume(other.state)
        other.step()
        assert second.save(other.state, blocking=True).outcome == "committed"

        for _ in range(2):
            with pytest.raises(CommitConflictError, match="Another job writes into this run"):
                save_next(checkpointer, run)


# -- the same step ---------------------------------------------------------------------------------------------------


def test_the_same_step_saved_again_is_the_same_save_also_while_it_is_in_flight(opened: Callable[..., Any]) -> None:
    checkpointer, run = opened()
    run.step()
    release = threading.Event()
    failpoint.arm({"before_shard_write": lambda: release.wait(30)})
    first = checkpointer.save(run.state)
    assert (first.outcome, first.done, first.staged) == (None, False, True)
    with pytest.raises(SaveNotFinishedError, match="step 2"):
        first.wait(0.05)
    threading.Timer(0.1, release.set).start()

    assert checkpointer.save(run.state) is first
    assert checkpointer.save(run.state) is first
    assert first.outcome == "committed"
    assert failpoint.hits("before_shard_write") == 1


def test_a_step_whose_save_failed_can_be_saved_again(opened: Callable[..., Any]) -> None:
    checkpointer, run = opened()
    break_writes(checkpointer)
    first = save_next(checkpointer, run)
    second = checkpointer.save(run.state, blocking=True)

    assert (first.outcome, second.outcome, first.step, second.step) == ("failed", "committed", 2, 2)
    assert checkpointer.save(run.state) is second


def test_a_loaded_step_is_not_saved_again(opened: Callable[..., Any], tmp_path: Path) -> None:
    opened()[0].close()
    run = SmallRun("plain")
    with dckpt.Checkpointer(tmp_path / "run", signals=()) as checkpointer:
        checkpointer.resume(run.state)
        pending = checkpointer.save(run.state)

        assert (pending.step, pending.outcome) == (1, "committed")
        assert sorted(os.listdir(tmp_path / "run" / "generations")) == ["000001.json"]


def test_a_step_that_stood_still_while_the_optimizer_moved_is_refused_each_time(opened: Callable[..., Any]) -> None:
    checkpointer, run = opened()
    run.optimizer.step()

    for _ in range(2):
        with pytest.raises(ConfigError, match=r"the optimizer has moved since.*Call progress.advance\(\)"):
            checkpointer.save(run.state)
    run.progress.advance()
    assert checkpointer.save(run.state, blocking=True).outcome == "committed"
    assert checkpointer.steps() == [1, 2]


# -- saves that must not be made -------------------------------------------------------------------------------------


def test_the_first_save_into_a_run_with_history_needs_a_load(opened: Callable[..., Any], tmp_path: Path) -> None:
    opened()[0].close()
    before = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    run = SmallRun("plain")
    with dckpt.Checkpointer(tmp_path / "run", signals=()) as checkpointer:
        run.step()
        with pytest.raises(ConfigError, match=r"checkpointer.resume\(state\) first, or choose another root"):
            checkpointer.save(run.state)
        assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == before

        checkpointer.resume(run.state)
        run.step()
        assert checkpointer.save(run.state, blocking=True).outcome == "committed"


def test_a_save_in_the_middle_of_an_accumulation_needs_gradients_and_is_never_another_one_for_them(
    opened: Callable[..., Any],
) -> None:
    checkpointer, run = opened()
    run.progress.micro_step = 1
    run.optimizer.zero_grad()

    with pytest.raises(ConfigError, match="found none on any parameter"):
        checkpointer.save(run.state)
    assert checkpointer.save(run.state, gradients="drop", blocking=True).outcome == "committed"
    run.model(torch.ones(2, run.width)).sum().backward()
    with pytest.raises(ConfigError, match="saved before without its gradients"):
        checkpointer.save(run.state)
    run.progress.micro_step = 2
    assert checkpointer.save(run.state, blocking=True).outcome == "committed"
    with pytest.raises(ConfigError, match="saved before with its gradients"):
        checkpointer.save(run.state, gradients="drop")


class FailingReads(Posix):
    """Fails every read of a shard file from the `at`-th on with EIO: the disk went away in the middle of the load."""

    def __init__(self, at: int) -> None:
        self.at, self.num_reads, self.num_failed = at, 0, 0
        self._shards: set[int] = set()

    def open(self, path: str, flags: int, *, dir_fd: int | None = None) -> int:
        fd = super().open(path, flags, dir_fd=dir_fd)
        if path.endswith(".safetensors"):
            self._shards.add(fd)
        return fd

    def close(self, fd: int) -> None:
        self._shards.discard(fd)
        super().close(fd)

    def pread_into(self, fd: int, target: memoryview, offset: int) -> int:
        self._count(fd)
        return super().pread_into(fd, target, offset)

    def preadv(self, fd: int, targets: Any, offset: int, *, flags: int = 0) -> int:
        self._count(fd)
        return super().preadv(fd, targets, offset, flags=flags)

    def _count(self, fd: int) -> None:
        if fd in self._shards:
            self.num_reads += 1
            if self.num_reads >= self.at:
                self.num_failed += 1
                raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_load_that_fails_half_way_forbids_saves_until_a_load_succeeds(
    opened: Callable[..., Any], tmp_path: Path
) -> None:
    opened(width=2100)[0].close()
    run = SmallRun("plain", seed=7, width=2100)
    before = [parameter.detach().clone() for parameter in run.model.parameters()]
    with dckpt.Checkpointer(tmp_path / "run", signals=()) as checkpointer:
        storage: Any = checkpointer._storage
        healthy, failing = storage._posix, FailingReads(at=10)
        storage._posix = failing
        with pytest.raises((StorageError, dckpt.PeerFailedError), match="Input/output error"):
            checkpointer.resume(run.state)
        storage._posix = healthy

        assert failing.num_failed >= 1
        changed = [not torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True)]
        assert any(changed) and not all(changed), "the load was meant to fail in the middle"
        for _ in range(2):
            with pytest.raises(PoisonedStateError, match="step-0000000001"):
                checkpointer.save(run.state, step=5)
        run.progress.advance()
        assert checkpointer.resume(run.state) is not None
        run.step()
        assert checkpointer.save(run.state, blocking=True).outcome == "committed"
        assert checkpointer.steps() == [1, 2]


@pytest.mark.parametrize("part", ["scheduler", "scaler"])
def test_a_set_that_breaks_while_it_is_restored_is_not_trained_on_or_saved(tmp_path: Path, part: str) -> None:
    """Optimizer, scheduler and scaler belong together: if one refuses its state, what the others took counts as damaged."""

    def make() -> tuple[SmallRun, dckpt.TrainState]:
        run = SmallRun("plain")
        scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer, 1)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        state = dckpt.TrainState(
            model=run.model, optimizer=run.optimizer, scheduler=scheduler, scaler=scaler, progress=run.progress
        )
        return run, state

    def refuse(_: Any) -> None:
        raise RuntimeError("this state is not mine")

    run, state = make()
    with dckpt.Checkpointer(tmp_path / "run", signals=()) as checkpointer:
        checkpointer.resume(state)
        run.step()
        assert checkpointer.save(state, blocking=True).outcome == "committed"
    run, state = make()
    with dckpt.Checkpointer(tmp_path / "run", signals=()) as checkpointer:
        holder: Any = getattr(state, part)
        holder.load_state_dict = refuse
        with pytest.raises(dckpt.DckptError, match="this state is not mine"):
            checkpointer.resume(state)
        with pytest.raises(PoisonedStateError, match="Load or resume successfully"):
            checkpointer.save(state)
        del holder.load_state_dict  # a scheduler's state is all that it holds
        assert checkpointer.resume(state) is not None
        assert (run.progress.step, len(run.optimizer.state)) == (1, 4)


def test_a_load_that_was_refused_before_it_touched_anything_does_not_forbid_saves(
    opened: Callable[..., Any], tmp_path: Path
) -> None:
    opened()[0].close()
    with dckpt.Checkpointer(tmp_path / "run", signals=()) as checkpointer:
        with pytest.raises(dckpt.IncompatibleStateError):
            checkpointer.load(SmallRun("plain", width=50).state)
        run = SmallRun("plain")
        checkpointer.resume(run.state)
        run.step()
        assert checkpointer.save(run.state, blocking=True).outcome == "committed"


# -- a save while another is in flight -------------------------------------------------------------------------------


def test_a_second_save_waits_for_the_one_in_flight(opened: Callable[..., Any]) -> None:
    checkpointer, run = opened()
    release = threading.Event()
    failpoint.arm({"before_shard_write": lambda: release.wait(30)})
    run.step()
    first = checkpointer.save(run.state)
    run.step()
    threading.Timer(0.2, release.set).start()

    second = checkpointer.save(run.state)
    assert first.outcome == "committed", "the second save began while the first was in flight"
    assert second.wait(30) == "committed"
    assert checkpointer.steps() == [1, 2, 3]


@pytest.mark.parametrize("when_busy", ["skip", "wait"])
def test_a_save_that_comes_due_in_step_while_another_is_in_flight_waits_or_is_skipped(
    opened: Callable[..., Any], when_busy: str
) -> None:
    checkpointer, run = opened(save=dckpt.Every(steps=1), when_busy=when_busy)
    release = threading.Event()
    failpoint.arm({"before_shard_write": lambda: release.wait(30)})
    run.step()
    checkpointer.step(run.state)
    run.step()
    timer = threading.Timer(0.2, release.set)
    if when_busy == "wait":
        timer.start()
    checkpointer.step(run.state)
    release.set()
    checkpointer.wait()
    run.step()
    checkpointer.step(run.state)
    checkpointer.wait()

    assert checkpointer.steps() == ([1, 2, 4] if when_busy == "skip" else [1, 2, 3, 4])


def test_ranks_skip_together_when_one_of_them_is_busy(ranks: RankPool, tmp_path: Path) -> None:
    found = ranks.run(skip_when_busy, 2, str(tmp_path / "run"))

    assert found == [[1, 2, 4]] * 2
