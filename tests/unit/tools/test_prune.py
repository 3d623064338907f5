"""`prune` shows what it will do, never touches the newest or a pinned checkpoint, and does what it showed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dckpt.catalog.catalog import Catalog
from dckpt.catalog.retention import Best, Retention
from dckpt.errors import CommitConflictError, CorruptCheckpointError
from dckpt.storage.local import LocalStorage
from dckpt.tools.prune import PruneRequest, apply_prune, plan_prune
from tests.support.runs import training_tensors, write_checkpoint

NOW = 1_700_000_060.0


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    """Generation 1: steps 10 to 40. Generation 2 continues from 30: step 50; so step 40 is superseded."""
    storage = LocalStorage(str(tmp_path / "run"))
    for step, loss in ((10, 1.0), (20, 4.0), (30, 2.0)):
        parent = write_checkpoint(storage, step, 1, training_tensors(), metrics={"loss": loss})
    write_checkpoint(storage, 40, 1, training_tensors())
    write_checkpoint(storage, 50, 2, training_tensors(), parent=parent, metrics={"loss": 3.0})
    return storage


def steps(storage: LocalStorage) -> list[int]:
    return [checkpoint.step for checkpoint in Catalog(storage).checkpoints()]


def test_a_policy_expires_old_steps_of_the_line_and_says_why_the_others_stay(storage: LocalStorage) -> None:
    request = PruneRequest(Retention(last=2, best=Best("loss")))

    plan = plan_prune(storage, request, now_unix_s=NOW)

    assert [row.name for row in plan.remove] == ["step-0000000020.g0001"]
    reasons = {row.name: row.reasons for row in plan.keep}
    assert reasons["step-0000000050.g0002"] == ("newest", "last 2")
    assert reasons["step-0000000010.g0001"] == ("best loss",)
    assert "superseded" in reasons["step-0000000040.g0001"][0]
    assert plan.freed_bytes == sum(row.size_bytes or 0 for row in plan.remove) > 0
    assert steps(storage) == [10, 20, 30, 40, 50], "a plan deletes nothing"
    apply_prune(storage, plan)
    assert steps(storage) == [10, 30, 40, 50]


def test_superseded_steps_go_only_when_asked_and_pinned_ones_never(storage: LocalStorage) -> None:
    request = PruneRequest(superseded=True)
    Catalog(storage).pin("step-0000000040.g0001")
    assert plan_prune(storage, request, now_unix_s=NOW).is_empty
    Catalog(storage).unpin("step-0000000040.g0001")

    plan = plan_prune(storage, request, now_unix_s=NOW)
    apply_prune(storage, plan)

    assert steps(storage) == [10, 20, 30, 50]


def test_a_pinned_checkpoint_stays_under_any_policy(storage: LocalStorage) -> None:
    Catalog(storage).pin("step-0000000010.g0001")

    apply_prune(storage, plan_prune(storage, PruneRequest(Retention(last=1)), now_unix_s=NOW))

    assert steps(storage) == [10, 40, 50]


def test_a_damaged_checkpoint_does_not_take_the_place_of_a_good_one(storage: LocalStorage) -> None:
    (Path(storage.root) / "step-0000000030.g0001" / "manifest.json").write_bytes(b"{}")

    plan = plan_prune(storage, PruneRequest(Retention(last=2)), now_unix_s=NOW)

    reasons = {row.name: row.reasons for row in plan.keep}
    assert "cannot be read" in reasons["step-0000000030.g0001"][0]
    assert reasons["step-0000000020.g0001"] == ("last 2",)
    assert [row.name for row in plan.remove] == ["step-0000000010.g0001"]


def test_leftovers_younger_than_asked_stay(storage: LocalStorage) -> None:
    for letter, age_s in (("a", 3600), ("b", 3 * 86400)):
        directory = Path(storage.root) / f".tmp-{letter * 32}"
        directory.mkdir()
        os.utime(directory, (NOW - age_s, NOW - age_s))

    plan = plan_prune(storage, PruneRequest(leftovers=True), now_unix_s=NOW)
    apply_prune(storage, plan)

    assert [row.name for row in plan.leftovers] == [f".tmp-{'b' * 32}"]
    assert sorted(path.name for path in Path(storage.root).glob(".tmp-*")) == [f".tmp-{'a' * 32}"]


def test_a_plan_made_before_the_run_changed_deletes_nothing_that_became_the_newest(storage: LocalStorage) -> None:
    plan = plan_prune(storage, PruneRequest(Retention(last=1)), now_unix_s=NOW)
    newest_removed = plan.remove[0].name
    for row in plan.keep:
        if row.name != "step-0000000040.g0001":
            os.rename(f"{storage.root}/{row.name}", f"{storage.root}/elsewhere-{row.name}")
    assert Catalog(storage).line()[0].name == newest_removed

    with pytest.raises(CommitConflictError, match=newest_removed):
        apply_prune(storage, plan)

    assert newest_removed in os.listdir(storage.root)


def test_superseded_steps_are_not_judged_while_a_damaged_generation_hides_the_line(storage: LocalStorage) -> None:
    (Path(storage.root) / "generations" / "000002.json").write_bytes(b"{}")

    with pytest.raises(CorruptCheckpointError, match=r"000002\.json"):
        plan_prune(storage, PruneRequest(superseded=True), now_unix_s=NOW)

    assert steps(storage) == [10, 20, 30, 40, 50]
