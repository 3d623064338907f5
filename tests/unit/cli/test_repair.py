"""`dckpt repair` and `verify --fix`: the plan before anything is written, the exit codes, and a kill in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dckpt.catalog.catalog import Catalog
from dckpt.cli.main import main
from dckpt.storage.local import LocalStorage
from tests.support.runs import FULL_PARTS, training_tensors, write_checkpoint

STEP = "step-0000000010.g0001"
REPAIRED = "step-0000000010.g0002"

KILLED = """
import os, signal, sys
from dckpt import failpoint
from dckpt.cli.main import main
failpoint.arm({sys.argv.pop(1): lambda: os.kill(os.getpid(), signal.SIGKILL)})
main()
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_checkpoint(LocalStorage(str(tmp_path / "run")), 10, 1, training_tensors())
    return tmp_path / "run"


@pytest.fixture
def damaged(run: Path) -> Path:
    """One bit of rank 0's file is the wrong way round."""
    flip(run, 0x04)
    return run


def flip(run: Path, mask: int) -> None:
    path = next(run.glob(f"{STEP}/*/rank00000.safetensors"))
    data = bytearray(path.read_bytes())
    data[4096 + 100] ^= mask
    path.write_bytes(data)


def dckpt(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def names(run: Path) -> list[str]:
    return [item.name for item in Catalog(LocalStorage(str(run))).checkpoints()]


def content(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_dry_run_shows_the_plan_and_writes_nothing(damaged: Path) -> None:
    before = content(damaged)

    shown = dckpt("repair", damaged, "--dry-run")
    as_json = json.loads(dckpt("repair", damaged, "--dry-run", "--json").stdout)

    assert shown.exit_code == 0
    assert "one flipped bit of rank00000.safetensors turned back, in byte 4,196" in shown.stdout
    assert f"New checkpoint: {REPAIRED}, generation 2" in shown.stdout
    assert "It will be COMPLETE" in shown.stdout and "not touched" in shown.stdout
    assert as_json["is_applied"] is False and as_json["plan"]["outcome"] == "COMPLETE"
    assert as_json["plan"]["changes"][0]["action"] == "restored"
    assert content(damaged) == before


def test_nobody_to_ask_means_that_nothing_is_written(damaged: Path) -> None:
    result = dckpt("repair", damaged)

    assert result.exit_code == 2 and "--yes" in result.stderr
    assert names(damaged) == [STEP]


def test_repair_commits_a_new_checkpoint_that_verifies(damaged: Path) -> None:
    assert dckpt("verify", damaged).exit_code == 4

    result = dckpt("repair", damaged, "--yes")

    assert result.exit_code == 0 and f"{REPAIRED} is committed" in result.stdout
    assert dckpt("verify", damaged).exit_code == 0
    assert dckpt("verify", f"{damaged}@{STEP}").exit_code == 4
    assert "generation 2 (repair from step-0000000010.g0001" in dckpt("ls", damaged).stdout


def test_verify_with_fix_does_both(damaged: Path) -> None:
    result = dckpt("verify", damaged, "--fix", "--yes")

    assert result.exit_code == 0
    assert "CORRUPT" in result.stdout and f"{REPAIRED} is committed" in result.stdout
    assert dckpt("verify", damaged).exit_code == 0
    again = dckpt("verify", damaged, "--fix", "--yes", "--json")
    assert again.exit_code == 0
    assert json.loads(again.stdout)["plan"] is None
    assert len(names(damaged)) == 2


def test_verify_with_fix_is_one_json_object(damaged: Path) -> None:
    found = json.loads(dckpt("verify", damaged, "--fix", "--yes", "--json").stdout)

    assert found["report"]["verdict"] == "CORRUPT"
    assert found["is_applied"] is True


@pytest.mark.parametrize("arguments", [["--fix", "--all"], ["--fix", "--quick"], ["--yes"], ["--from", "x"]])
def test_options_that_contradict_each_other_are_a_usage_error(run: Path, arguments: list[str]) -> None:
    assert dckpt("verify", run, *arguments).exit_code == 2


def test_a_wrong_byte_is_found_too(run: Path) -> None:
    flip(run, 0xFF)

    result = dckpt("repair", run, "--yes")

    assert result.exit_code == 0 and "one wrong byte" in result.stdout


def test_a_whole_checkpoint_is_nothing_to_repair(run: Path) -> None:
    result = dckpt("repair", run, "--yes")

    assert result.exit_code == 1 and "Nothing to repair" in result.stdout
    assert names(run) == [STEP]


def test_what_nobody_has_exits_4_and_says_where_to_go(run: Path) -> None:
    path = next(run.glob(f"{STEP}/*/rank00000.safetensors"))
    path.write_bytes(path.read_bytes()[:-40] + bytes(40))

    result = dckpt("repair", run, "--yes")

    assert result.exit_code == 4
    assert "--from" in result.stdout and "are lost" in result.stdout
    assert names(run) == [STEP]


def test_lost_parts_need_a_word_of_consent(tmp_path: Path) -> None:
    """Rank 1's file holds its half of the moments and nothing else."""
    found = training_tensors(world_size=0)
    tensors = {"model.weight": found["model.weight"][:1], "optim.weight.exp_avg": found["optim.weight.exp_avg"][:2]}
    write_checkpoint(LocalStorage(str(tmp_path)), 10, 1, tensors, parts=("model", "optim"))
    next(tmp_path.glob(f"{STEP}/*/rank00001.safetensors")).unlink()

    refused = dckpt("repair", tmp_path, "--yes")
    assert refused.exit_code == 4 and "--accept-loss" in refused.stdout
    assert names(tmp_path) == [STEP]
    accepted = dckpt("repair", tmp_path, "--yes", "--accept-loss")

    assert accepted.exit_code == 1 and "moments are lost and are not invented" in accepted.stdout
    report = json.loads(dckpt("verify", tmp_path, "--json").stdout)
    assert report["verdict"] == "PARTIAL"
    assert report["checkpoints"][0]["damages"] == []


def test_a_part_that_is_missing_stays_partial_and_says_so(tmp_path: Path) -> None:
    parts = [part for part in FULL_PARTS if part not in ("rng", "optim")]
    found = {name: array for name, array in training_tensors(world_size=0).items() if name.startswith("model.")}
    values = {"scheduler": {}, "progress": {}, "data": {}}
    write_checkpoint(LocalStorage(str(tmp_path)), 10, 1, found, parts=parts, values=values)

    result = dckpt("repair", tmp_path, "--yes")

    assert result.exit_code == 1
    assert "moments are lost" in result.stdout and "It will be PARTIAL" in result.stdout
    assert dckpt("verify", tmp_path).exit_code == 1
    assert "rng        present" in dckpt("verify", tmp_path).stdout


POINTS = [
    "mid_shard_write",
    "after_shard_sync",
    "after_directory_sync",
    "before_manifest",
    "after_manifest",
    "before_generation",
    "after_generation",
    "before_rename",
]


def repair_killed_at(point: str, run: Path) -> int:
    command = [sys.executable, "-c", KILLED, point, "repair", str(run), "--yes"]
    return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode


@pytest.mark.crash
@pytest.mark.parametrize("point", POINTS)
def test_a_repair_killed_before_its_commit_is_as_if_it_had_not_been(damaged: Path, point: str) -> None:
    before = content(damaged)

    assert repair_killed_at(point, damaged) == -signal.SIGKILL

    assert {path: data for path, data in content(damaged).items() if path in before} == before
    assert names(damaged) == [STEP]
    assert Catalog(LocalStorage(str(damaged))).line()[0].name == STEP
    assert dckpt("repair", damaged, "--yes").exit_code == 0
    assert dckpt("verify", damaged).exit_code == 0


@pytest.mark.crash
def test_a_repair_killed_after_its_commit_is_done(damaged: Path) -> None:
    assert repair_killed_at("after_rename", damaged) == -signal.SIGKILL

    assert len(os.listdir(damaged / REPAIRED)) == 3
    assert dckpt("verify", damaged).exit_code == 0
