"""A rollback is one record on top: an earlier step is the latest, nothing is deleted, and every way back stays open."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dckpt import failpoint
from dckpt.catalog.catalog import Catalog
from dckpt.catalog.generations import list_generations, read_generation
from dckpt.catalog.prune import expire
from dckpt.catalog.rollback import plan_rollback, roll_back
from dckpt.errors import CheckpointNotFoundError, CommitConflictError, CorruptCheckpointError
from dckpt.storage.local import LocalStorage
from tests.support.runs import training_tensors, write_checkpoint, write_generation

NOW = 1_700_000_060.0


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    """Generation 1: steps 10, 20, 30. Generation 2 continues from 20: steps 40, 50; so step 30 is superseded."""
    storage = LocalStorage(str(tmp_path / "run"))
    write_checkpoint(storage, 10, 1, training_tensors())
    parent = write_checkpoint(storage, 20, 1, training_tensors())
    write_checkpoint(storage, 30, 1, training_tensors())
    write_checkpoint(storage, 40, 2, training_tensors(), parent=parent)
    write_checkpoint(storage, 50, 2, training_tensors())
    return storage


@pytest.fixture(autouse=True)
def _disarmed():
    yield
    failpoint.disarm()


def line(storage: LocalStorage) -> list[int]:
    return [item.step for item in Catalog(storage).line()]


def go_to(storage: LocalStorage, which: str | int) -> None:
    plan = plan_rollback(storage, which, now_unix_s=NOW)
    assert plan is not None
    roll_back(storage, plan)


def test_an_earlier_step_becomes_the_latest_and_everything_stays(storage: LocalStorage) -> None:
    before = sorted(os.listdir(storage.root))

    plan = plan_rollback(storage, 40, now_unix_s=NOW)
    assert plan is not None
    assert [item.step for item in plan.superseded] == [50]
    assert plan.restored == ()
    assert line(storage) == [50, 40, 20, 10], "a plan changes nothing"
    roll_back(storage, plan)

    assert line(storage) == [40, 20, 10]
    assert sorted(os.listdir(storage.root)) == before
    record = read_generation(storage, 3)
    assert record.reason == "rollback"
    assert record.parent is not None and record.parent.checkpoint == "step-0000000040.g0002"


def test_it_goes_across_generations_and_back_again(storage: LocalStorage) -> None:
    go_to(storage, 10)
    assert line(storage) == [10]

    plan = plan_rollback(storage, "step-0000000050.g0002", now_unix_s=NOW)
    assert plan is not None
    assert [item.step for item in plan.restored] == [50, 40, 20]
    roll_back(storage, plan)

    assert line(storage) == [50, 40, 20, 10]
    go_to(storage, "step-0000000030.g0001")
    assert line(storage) == [30, 20, 10]


def test_what_is_committed_next_continues_from_there(storage: LocalStorage) -> None:
    go_to(storage, 20)
    parent, _ = Catalog(storage).read_manifest("step-0000000020.g0001")

    write_checkpoint(storage, 25, 4, training_tensors(), parent=parent)

    assert line(storage) == [25, 20, 10]


def test_the_latest_itself_is_nothing_to_do(storage: LocalStorage) -> None:
    assert plan_rollback(storage, 50, now_unix_s=NOW) is None
    assert list_generations(storage) == [1, 2]


def test_a_superseded_step_needs_its_full_name(storage: LocalStorage) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"step-0000000030\.g0001"):
        plan_rollback(storage, 30, now_unix_s=NOW)


def test_a_damaged_manifest_is_no_place_to_go(storage: LocalStorage) -> None:
    (Path(storage.root) / "step-0000000040.g0002" / "manifest.json").write_bytes(b"{}")

    with pytest.raises(CorruptCheckpointError):
        plan_rollback(storage, 40, now_unix_s=NOW)

    assert list_generations(storage) == [1, 2]


def test_a_job_that_began_meanwhile_wins(storage: LocalStorage) -> None:
    plan = plan_rollback(storage, 40, now_unix_s=NOW)
    assert plan is not None
    parent, _ = Catalog(storage).read_manifest("step-0000000050.g0002")
    write_generation(storage, 3, parent=parent, reason="resume")

    with pytest.raises(CommitConflictError, match="found generation 3"):
        roll_back(storage, plan)

    assert line(storage) == [50, 40, 20, 10]


def test_who_deletes_the_target_meanwhile_fails_or_is_named(storage: LocalStorage) -> None:
    """A deletion that looked before the record was there cannot act on what it saw."""
    plan = plan_rollback(storage, 40, now_unix_s=NOW)
    assert plan is not None
    failpoint.arm({"before_prune": lambda: roll_back(storage, plan)})

    with pytest.raises(Exception, match=r"step-0000000040\.g0002"):
        expire(storage, ["step-0000000040.g0002"])
    assert failpoint.hits("before_prune") == 1
    assert line(storage) == [40, 20, 10]

    failpoint.disarm()
    plan = plan_rollback(storage, 20, now_unix_s=NOW)
    assert plan is not None
    failpoint.arm({"before_generation": lambda: storage.discard("step-0000000020.g0001")})
    with pytest.raises(CommitConflictError, match="deleted meanwhile"):
        roll_back(storage, plan)
    assert failpoint.hits("before_generation") == 1
    assert line(storage) == [10]


def test_a_kill_before_or_after_the_record_leaves_one_of_two_lines(storage: LocalStorage) -> None:
    class Killed(BaseException):
        pass

    def die() -> None:
        raise Killed

    plan = plan_rollback(storage, 20, now_unix_s=NOW)
    assert plan is not None
    failpoint.arm({"before_generation": die})
    with pytest.raises(Killed):
        roll_back(storage, plan)
    assert line(storage) == [50, 40, 20, 10]

    failpoint.arm({"after_generation": die})
    with pytest.raises(Killed):
        roll_back(storage, plan)
    assert line(storage) == [20, 10]
