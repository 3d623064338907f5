"""`pin`, `unpin`, `rollback` and the reasons of `prune`: what people are told, and the exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dckpt.catalog.catalog import Catalog
from dckpt.cli.main import main
from dckpt.storage.local import LocalStorage
from tests.support.runs import training_tensors, write_checkpoint

DAY = 86400.0


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 10 to 60 of one generation, two a day."""
    storage = LocalStorage(str(tmp_path / "run"))
    for number in range(6):
        saved = 1_700_000_000.0 + (number // 2) * DAY
        metrics = {"loss": 5.0 - number}
        write_checkpoint(storage, 10 * number + 10, 1, training_tensors(size=8), metrics=metrics, created_unix_s=saved)
    return tmp_path / "run"


def dckpt(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def steps(run: Path) -> list[int]:
    return [item.step for item in Catalog(LocalStorage(str(run))).line()]


def test_a_pinned_step_survives_prune_until_it_is_unpinned(run: Path) -> None:
    pinned = dckpt("pin", f"{run}@20")
    assert pinned.exit_code == 0 and "step-0000000020.g0001 is pinned" in pinned.stdout
    assert "pinned already" in dckpt("pin", f"{run}@20").stdout
    assert dckpt("prune", run, "--last", 1, "--yes").exit_code == 0
    assert steps(run) == [60, 20]

    assert dckpt("unpin", f"{run}@20").exit_code == 0
    assert dckpt("unpin", f"{run}@20").exit_code == 1
    assert dckpt("prune", run, "--last", 1, "--yes").exit_code == 0

    assert steps(run) == [60]


def test_a_pin_whose_checkpoint_is_gone_can_be_taken_away_by_its_name(run: Path) -> None:
    dckpt("pin", f"{run}@20")
    LocalStorage(str(run)).discard("step-0000000020.g0001")

    change = json.loads(dckpt("unpin", f"{run}@step-0000000020.g0001", "--json").stdout)

    assert change["is_changed"] is True and change["is_pinned"] is False
    assert Catalog(LocalStorage(str(run))).pins() == set()


@pytest.mark.parametrize(("text", "code"), [("", 2), ("@70", 3), ("@step-0000000020.g0002", 3)])
def test_what_cannot_be_pinned_is_said(run: Path, text: str, code: int) -> None:
    assert dckpt("pin", f"{run}{text}").exit_code == code
    assert dckpt("unpin", f"{run}{text}").exit_code == code


def test_prune_says_for_every_checkpoint_why_it_stays_or_goes(run: Path) -> None:
    result = dckpt("prune", run, "--last", 1, "--every", 20, "--best", "loss:max", "--daily", 1, "--dry-run", "--json")

    assert result.exit_code == 0
    plan = json.loads(result.stdout)["plan"]
    assert {int(row["name"][5:15]): row["reasons"] for row in plan["keep"]} == {
        60: ["newest", "last 1", "every 20", "daily 1"],
        40: ["every 20"],
        20: ["every 20"],
        10: ["best loss"],
    }
    assert {int(row["name"][5:15]): row["reason"] for row in plan["remove"]} == {
        50: "no rule keeps it: not among the last 1; step 60 stands for steps 41 to 60; loss 1 is not among the best 1; "
        "step 60 stands for 2023-11-16",
        30: "no rule keeps it: not among the last 1; step 40 stands for steps 21 to 40; loss 3 is not among the best 1; "
        "of 2023-11-15, not among the newest 1 days",
    }
    assert steps(run) == [60, 50, 40, 30, 20, 10]


def test_daily_keeps_the_newest_of_each_day(run: Path) -> None:
    assert dckpt("prune", run, "--daily", 2, "--yes").exit_code == 0

    assert steps(run) == [60, 40]


def test_a_rollback_shows_what_changes_and_who_is_fenced(run: Path) -> None:
    shown = dckpt("rollback", run, "--to", 40, "--dry-run")

    assert shown.exit_code == 0
    assert "step-0000000060.g0001, step-0000000050.g0001: kept, and the way back" in shown.stdout
    assert "CommitConflictError" in shown.stdout
    assert steps(run)[0] == 60
    done = dckpt("rollback", run, "--to", 40, "--yes")
    assert done.exit_code == 0
    assert "step-0000000040.g0001 is the latest now (generation 2)." in done.stdout
    assert steps(run) == [40, 30, 20, 10]
    assert "generation 2 (rollback from step-0000000040.g0001" in dckpt("ls", run).stdout
    assert dckpt("verify", run).exit_code == 0


def test_a_rollback_to_the_latest_is_nothing_to_do(run: Path) -> None:
    result = dckpt("rollback", run, "--to", "latest", "--yes")

    assert result.exit_code == 1 and "Nothing to do" in result.stdout


def test_nobody_to_ask_means_no_rollback(run: Path) -> None:
    result = dckpt("rollback", run, "--to", 40)

    assert result.exit_code == 2 and "--yes" in result.stderr
    assert steps(run)[0] == 60


def test_a_damaged_step_is_no_place_to_roll_back_to(run: Path) -> None:
    next(run.glob("step-0000000040.g0001/*/rank00001.safetensors")).unlink()

    result = dckpt("rollback", run, "--to", 40, "--yes")

    assert result.exit_code == 4 and "rank00001" in result.stderr
    assert steps(run)[0] == 60


def test_an_attempt_in_flight_is_named(run: Path) -> None:
    (run / f".tmp-{'a' * 32}").mkdir()

    told = dckpt("rollback", run, "--to", 40, "--dry-run", "--json")

    assert json.loads(told.stdout)["plan"]["youngest_attempt_s"] < 60
