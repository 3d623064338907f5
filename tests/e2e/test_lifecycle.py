"""Whatever way a training process ends, nothing hangs, nothing is half committed, and the last save lands or is reported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dckpt.tools.target import open_target
from dckpt.tools.verify_run import verify_target

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[2]
START_S = 120.0  # until a process has imported torch, on a busy machine
END_S = 15.0  # from a rank's last word to the end of its process

LANDS = {
    "close_in_flight": 0,
    "leave_the_block": 0,
    "raise_in_the_loop": 1,
    "raise_without_a_block": 1,
    "exit_without_close": 0,
    "exit_holding_it": 0,
    "sys_exit_in_the_block": 3,
    "sys_exit_without_close": 3,
    "interrupt_a_blocking_save": -signal.SIGINT,
}
OTHERS = ["fail_at_the_end", "interrupt_the_staging", "interrupt_anywhere"]


@dataclass(frozen=True)
class Ended:
    """How one scenario ended in one process."""

    root: Path
    code: int | None
    seconds: float
    stderr: str
    report: dict[str, Any]


def steps_of(root: Path) -> list[int]:
    """Every checkpoint that is visible, each of them whole."""
    report = verify_target(open_target(str(root)), is_all=True)
    assert {one.verdict for one in report.checkpoints} == {"PARTIAL"}, report  # no scheduler and no data position
    assert not report.run_damages, report
    return sorted(int(one.checkpoint[5:15]) for one in report.checkpoints)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


# -- one process -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """All scenarios of a single process, run once."""
    root = tmp_path_factory.mktemp("alone")
    names = [*LANDS, *OTHERS]
    command = [sys.executable, "-m", "tests.support.lifecycle", str(root), *names]
    subprocess.run(command, cwd=REPOSITORY, env=environment(), timeout=START_S + 60 * len(names), check=True)
    found = {}
    for name in names:
        report, ended = (json.loads((root / file).read_text()) for file in (f"{name}-0.json", f"{name}.exit"))
        seconds, stderr = ended["at"] - report["at"], (root / f"{name}.stderr").read_text()
        found[name] = Ended(root / name, ended["code"], seconds, stderr, report)
    return found


@pytest.mark.parametrize("name", LANDS)
def test_the_save_in_flight_lands_however_the_process_ends(alone: dict[str, Ended], name: str) -> None:
    ended = alone[name]

    assert not ended.report["done"], "the save was meant to be in flight"
    assert ended.code == LANDS[name], ended
    assert ended.seconds < END_S
    assert steps_of(ended.root) == [1, 2]
    told = {1: "the loop's own error", -signal.SIGINT: "KeyboardInterrupt"}.get(LANDS[name], "")
    assert told in ended.stderr


def test_a_save_that_fails_after_the_script_has_ended_is_reported_on_stderr(alone: dict[str, Ended]) -> None:
    ended = alone["fail_at_the_end"]

    assert not ended.report["done"]
    assert "save of step 2 failed" in ended.stderr, ended.stderr
    assert "No space left on device" in ended.stderr, ended.stderr
    assert ended.seconds < END_S
    assert steps_of(ended.root) == [1]


def test_ctrl_c_while_the_state_is_copied_ends_the_save_and_the_process(alone: dict[str, Ended]) -> None:
    ended = alone["interrupt_the_staging"]

    assert ended.code == -signal.SIGINT
    assert "KeyboardInterrupt" in ended.stderr
    assert ended.seconds < END_S
    assert steps_of(ended.root) == [1]
    assert sorted(os.listdir(ended.root)) == ["generations", "step-0000000001.g0001"]


def test_ctrl_c_at_any_moment_of_a_save_never_blocks_the_end_nor_the_next_run(alone: dict[str, Ended]) -> None:
    ended = alone["interrupt_anywhere"]

    assert ended.code == 0, ended.stderr
    assert ended.report["interrupted"] >= 10, ended.report
    assert ended.report["finished"] >= 3, ended.report
    assert ended.report["slowest_close_s"] < 5, ended.report
    assert len(steps_of(ended.root)) >= ended.report["finished"]


# -- two ranks under torchrun ----------------------------------------------------------------------------------------


def launch(root: Path, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--signals-to-handle=SIGTERM,SIGINT,SIGUSR1", "-m", "tests.support.lifecycle", str(root), name]
    with open(root / f"{name}.stderr", "w") as stderr:
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment(), stderr=stderr, text=True)


def read_report(root: Path, name: str, rank: int) -> dict[str, Any]:
    return json.loads((root / f"{name}-{rank}.json").read_text())


def finish(process: subprocess.Popen[str], root: Path, name: str) -> list[Ended]:
    """What both ranks reported; the launcher's exit code stands for both."""
    try:
        code = process.wait(START_S + END_S)
    finally:
        process.kill()
    now, stderr = time.monotonic(), (root / f"{name}.stderr").read_text()
    reports = [read_report(root, name, rank) for rank in (0, 1)]
    last = max(report["at"] for report in reports)
    return [Ended(root / name, code, now - last, stderr, report) for report in reports]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_stops_all_at_one_step_with_that_step_saved(
    tmp_path: Path, number: signal.Signals
) -> None:
    name = "stop_on_a_signal"
    process = launch(tmp_path, name)
    limit = time.monotonic() + START_S
    while time.monotonic() < limit and not all((tmp_path / f"{name}-{rank}.json").exists() for rank in (0, 1)):
        assert process.poll() is None, (tmp_path / f"{name}.stderr").read_text()
        time.sleep(0.05)
    victim = 1 if number == signal.SIGTERM else 0
    sent = time.monotonic()
    os.kill(read_report(tmp_path, name, victim)["pid"], number)
    first, second = finish(process, tmp_path, name)

    assert (first.code, second.code) == (0, 0), first.stderr
    assert first.report["stopped_at"] == second.report["stopped_at"]
    assert max(first.report["at"], second.report["at"]) - sent < 10
    assert first.report["steps"] == [first.report["stopped_at"]]
    assert steps_of(first.root) == [first.report["stopped_at"]]


@pytest.mark.parametrize("name", ["destroy_the_group_first", "exit_without_close"])
def test_the_save_in_flight_lands_on_two_ranks(tmp_path: Path, name: str) -> None:
    first, second = finish(launch(tmp_path, name), tmp_path, name)

    assert not first.report["done"]
    assert not second.report["done"]
    assert first.code == 0, first.stderr
    assert first.seconds < END_S
    assert steps_of(first.root) == [1, 2]


def test_an_exception_on_one_rank_lets_the_save_in_flight_land_and_hangs_nobody(tmp_path: Path) -> None:
    first, _ = finish(launch(tmp_path, "one_rank_raises"), tmp_path, "one_rank_raises")

    assert first.code == 1
    assert "the loop's own error" in first.stderr
    assert first.seconds < END_S
    assert first.report["first"] == "committed"
    assert steps_of(first.root) == [1, 2]


def test_ctrl_c_on_one_rank_is_told_to_the_other_at_once(tmp_path: Path) -> None:
    name = "interrupt_the_staging"
    first, second = finish(launch(tmp_path, name), tmp_path, name)

    assert first.report["outcome"] == "failed"
    assert "rank 1 failed in phase stage: KeyboardInterrupt" in first.report["error"]
    assert "outcome" not in second.report
    assert first.report["at"] - second.report["at"] < 5
    assert steps_of(first.root) == [1]


def test_a_rank_that_left_without_a_word_is_named_in_time(tmp_path: Path) -> None:
    first, _ = finish(launch(tmp_path, "one_rank_leaves"), tmp_path, "one_rank_leaves")

    assert first.report["outcome"] == "failed"
    assert "rank 1 did not call save(step=2) within 2 s" in first.report["error"]
    assert first.report["seconds"] < 4
    assert first.seconds < END_S
    assert steps_of(first.root) == [1]
