"""One rank fails, dies, stands still or leaves a call out: the others hear the same error in time, and go on."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dckpt.tools.target import open_target
from dckpt.tools.verify_run import verify_target
from tests.support.fault_jobs import (
    Layout,
    Seen,
    die_in_a_save,
    disagree,
    fail_in_turn,
    leave_a_save_out,
    stop_in_turn,
)
from tests.support.ranks import RankLost, RankPool

pytestmark = [pytest.mark.distributed, pytest.mark.crash]

DEADLINE_S = 2.5
MARGIN_S = 2.0
STANDS = "The save is abandoned; the previous checkpoint stands."


def same_error(seen: list[Seen]) -> tuple[str, str]:
    """Asserts that these ranks have the same error, before the deadline and two seconds; returns type and message."""
    assert {(one["type"], one["message"]) for one in seen} == {(seen[0]["type"], seen[0]["message"])}, seen
    assert seen[0]["message"] is not None, seen
    assert max(one["seconds"] for one in seen) < DEADLINE_S + MARGIN_S, seen
    return seen[0]["type"], seen[0]["message"]


def assert_whole(root: Path, steps: list[int]) -> None:
    """Exactly these steps are there, every byte of them as written."""
    report = verify_target(open_target(str(root)), is_all=True)
    assert sorted(int(one.checkpoint[5:15]) for one in report.checkpoints) == steps
    # PARTIAL: a small run has no scheduler and no data position, and is told so.
    assert {one.verdict for one in report.checkpoints} == {"PARTIAL"}, report
    assert not report.run_damages, report


# -- a rank that fails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "world_size"), [("plain", 2), ("fsdp", 3)])
def test_a_failing_rank_is_named_by_all_training_goes_on_and_the_next_save_commits(
    ranks: RankPool, tmp_path: Path, layout: Layout, world_size: int
) -> None:
    last = world_size - 1
    cases = [
        (phase, kind, at_rank)
        for phase in ("plan", "stage", "write")
        for kind in ("EIO", "ENOSPC")
        for at_rank in (0, last)
    ] + [("commit", "EIO", 0), ("commit", "ENOSPC", 0)]
    by_rank = ranks.run(fail_in_turn, world_size, str(tmp_path / "run"), layout, cases, DEADLINE_S)

    for number, (phase, kind, at_rank) in enumerate(cases):
        seen = [found[number] for found in by_rank]
        case = (phase, kind, at_rank, seen)
        kind_found, message = same_error(seen)
        assert seen[at_rank]["struck"] >= 1, case
        assert f"save of step {seen[0]['step']}: rank {at_rank} failed in phase {phase}" in message, case
        assert kind in message or {"EIO": "Input/output", "ENOSPC": "No space left"}[kind] in message, case
        assert {"EIO": ("PeerFailedError", "StorageError"), "ENOSPC": ("PeerFailedError", "StorageFullError")}[
            kind
        ].index(kind_found) == (phase == "commit"), case
        assert all(one["outcome"] == "failed" and one["collective"] and one["next"] == "committed" for one in seen)
        assert all(seen[0]["step"] not in one["steps"] and one["names"] == ["generations"] for one in seen), case
    assert_whole(tmp_path / "run", [1, *(2 * number + 3 for number in range(len(cases)))])


# -- a rank that dies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("phase", "world_size"), [("plan", 3), ("stage", 2), ("write", 3)])
def test_a_killed_rank_is_named_by_the_survivors(ranks: RankPool, tmp_path: Path, phase: str, world_size: int) -> None:
    root = tmp_path / "run"
    seen = ranks.run(die_in_a_save, world_size, str(root), phase, world_size - 1, DEADLINE_S, allow_loss=True)

    assert isinstance(seen.pop(), RankLost)
    named = "plan" if phase == "plan" else "write"
    expected = f"save of step 2: rank {world_size - 1} made no progress in phase {named} for 2.5 s. {STANDS}"
    assert same_error(seen) == ("CoordinationTimeoutError", expected)
    assert all(one["outcome"] == "failed" and one["close_s"] < DEADLINE_S + MARGIN_S for one in seen)
    assert_whole(root, [1])


def test_a_rank_that_is_killed_after_its_part_is_durable_does_not_stop_the_commit(
    ranks: RankPool, tmp_path: Path
) -> None:
    seen = ranks.run(die_in_a_save, 3, str(tmp_path / "run"), "commit", 2, DEADLINE_S, allow_loss=True)

    assert isinstance(seen.pop(), RankLost)
    assert [one["outcome"] for one in seen] == ["committed", "committed"], seen
    assert_whole(tmp_path / "run", [1, 2])


@pytest.mark.parametrize(
    ("phase", "moment", "outcome", "steps"),
    [
        ("plan", "before_plan", "failed", [1]),
        ("stage", "before_stage", None, [1]),
        ("write", "mid_shard_write", None, [1]),
        ("commit", "before_manifest", "unknown", [1]),
        ("commit", "before_commit", "unknown", [1]),
        ("commit", "before_rename", "unknown", [1]),
        ("commit", "after_rename", "committed", [1, 2]),
        ("commit", "after_commit", "committed", [1, 2]),
    ],
)
def test_a_killed_coordinator_is_named_and_never_called_failed_when_it_may_have_committed(
    ranks: RankPool, tmp_path: Path, phase: str, moment: str, outcome: str | None, steps: list[int]
) -> None:
    root = tmp_path / "run"
    first, *seen = ranks.run(die_in_a_save, 3, str(root), phase, 0, DEADLINE_S, moment, allow_loss=True)

    assert isinstance(first, RankLost)
    if outcome is None:
        # Whether a survivor had told the coordinator of its files before it was killed is a race.
        assert {one["outcome"] for one in seen} <= {"failed", "unknown"}, seen
        assert all("the coordinator (rank 0)" in one["message"] for one in seen), seen
    else:
        assert [one["outcome"] for one in seen] == [outcome, outcome], seen
    if outcome in ("failed", "unknown"):
        kind, message = same_error(seen)
        assert kind == {"failed": "PeerFailedError", "unknown": "UnknownOutcomeError"}[outcome]
        assert "coordinator (rank 0)" in message
    assert max(one["seconds"] for one in seen) < DEADLINE_S + MARGIN_S, seen
    assert_whole(root, steps)


# -- a rank that stands still ----------------------------------------------------------------------------------------


class Waker:
    """Continues each stopped rank once all the others have ended their wait."""

    def __init__(self, signals: Path, cases: list[tuple[str, int]], world_size: int) -> None:
        self._signals, self._cases, self._world_size = signals, cases, world_size
        self.stopped: list[int] = []
        self._thread: threading.Thread | None = None

    def start(self, pids: list[int]) -> None:
        self._thread = threading.Thread(target=self._run, args=(pids,), daemon=True)
        self._thread.start()

    def _run(self, pids: list[int]) -> None:
        for number, (_, victim) in enumerate(self._cases):
            limit = time.monotonic() + 30
            while time.monotonic() < limit and not self._is_stopped(pids[victim]):
                time.sleep(0.02)
            self.stopped.append(number)
            others = [rank for rank in range(self._world_size) if rank != victim]
            while time.monotonic() < limit and not all((self._signals / f"{number}-{r}").exists() for r in others):
                time.sleep(0.02)
            with contextlib.suppress(ProcessLookupError):  # the job failed, and its ranks were ended
                os.kill(pids[victim], signal.SIGCONT)

    @staticmethod
    def _is_stopped(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        except FileNotFoundError:
            return False

    def join(self) -> None:
        assert self._thread is not None
        self._thread.join(5)


def test_a_stopped_rank_is_named_in_time_hears_the_same_and_joins_the_next_save(
    ranks: RankPool, tmp_path: Path
) -> None:
    cases = [("plan", 2), ("stage", 2), ("write", 2), ("plan", 0), ("stage", 0), ("write", 0), ("commit", 0)]
    root, signals = tmp_path / "run", tmp_path / "signals"
    signals.mkdir()
    waker = Waker(signals, cases, 3)
    by_rank: list[list[Seen]] = ranks.run(
        stop_in_turn, 3, str(root), cases, str(signals), DEADLINE_S, on_started=waker.start, deadline_s=150
    )
    waker.join()

    assert waker.stopped == list(range(len(cases)))
    steps = [1]
    for number, (phase, victim) in enumerate(cases):
        seen = [found[number] for found in by_rank]
        survivors = [one for rank, one in enumerate(seen) if rank != victim]
        _, message = same_error(survivors)
        case = (phase, victim, seen)
        if victim:
            where = "plan" if phase == "plan" else "write"
            assert (
                message
                == f"save of step {2 * number + 2}: rank 2 made no progress in phase {where} for 2.5 s. {STANDS}"
            )
            assert seen[2]["message"] == message, case
        else:
            assert "the coordinator (rank 0)" in message, case
            expected = "failed" if phase == "plan" else "unknown"
            assert {one["outcome"] for one in survivors} == {expected}, case
        is_there = 2 * number + 2 in seen[0]["steps"]
        # A save that turns out to be committed was never called failed by anyone, and the other way round.
        assert all(one["outcome"] != ("failed" if is_there else "committed") for one in seen), case
        assert all(one["collective"] and one["next"]["outcome"] == "committed" for one in seen), case
        steps += ([2 * number + 2] if is_there else []) + [2 * number + 3]
    assert_whole(root, steps)


# -- calls that do not fit together ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("absent", "calls"), [([1, 2, 3], 1), ([0], 2)])
def test_ranks_that_leave_a_save_out_are_named_and_take_part_in_the_next(
    ranks: RankPool, tmp_path: Path, absent: list[int], calls: int
) -> None:
    found: list[dict[str, Any]] = ranks.run(leave_a_save_out, 4, str(tmp_path / "run"), absent, DEADLINE_S, calls)

    named = "ranks 1-3" if 1 in absent else "rank 0"
    for number in range(calls):
        kind, message = same_error([one["seen"][number] for rank, one in enumerate(found) if rank not in absent])
        assert kind == "CoordinationTimeoutError"
        step = 100 + number
        assert message == (
            f"save of step {step}: {named} did not call save(step={step}) within 2.5 s; every rank must call it. {STANDS}"
        )
    assert all(one["collective"] and one["after"]["outcome"] == "committed" for one in found), found
    assert_whole(tmp_path / "run", [1, 200])


@pytest.mark.parametrize(
    ("about", "kind", "told"),
    [
        ("shape", "ConfigError", "model.0.weight"),
        ("dtype", "ConfigError", "model.0.weight"),
        ("step", "ConfigError", "rank 0 saves step 10 (micro-step 0), rank 2 step 11"),
        ("values", "ConfigError", "extra.notes"),
        ("optimizer", "ConfigError", "the optimizer has moved since"),
    ],
)
def test_ranks_that_disagree_raise_the_same_typed_error_at_once(
    ranks: RankPool, tmp_path: Path, about: str, kind: str, told: str
) -> None:
    found = ranks.run(disagree, 3, str(tmp_path / "run"), about, 30.0)

    assert same_error([one["seen"] for one in found])[0] == kind, found
    assert told in found[0]["seen"]["message"], found[0]["seen"]
    assert all(one["seen"]["raised"] and one["collective"] for one in found)
    assert all(one["after"]["outcome"] == "committed" for one in found), found
    assert_whole(tmp_path / "run", [10, 20] if about == "optimizer" else [20])
