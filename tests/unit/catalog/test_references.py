"""Checkpoints in which files of others lie: what may go in which order, and nothing is lost when somebody saves meanwhile."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dckpt import failpoint
from dckpt.catalog.catalog import Catalog
from dckpt.catalog.generations import create_generation
from dckpt.catalog.prune import expire, find_leftovers, sweep
from dckpt.catalog.references import References, announced, find_referable, find_references, plan_deletion
from dckpt.catalog.transaction import Transaction
from dckpt.errors import CommitConflictError, DckptError, StorageMissingError
from dckpt.format.layout import CheckpointId
from dckpt.storage.base import Entry
from dckpt.storage.local import LocalStorage
from dckpt.storage.posix import Posix
from tests.support.commits import Base, commit, ensure_whole, make_record, stage_step, start_generation
from tests.support.turns import interleave

FIRST, SECOND, THIRD = (f"step-0000000{step}00.g0001" for step in (1, 2, 3))


class Fast(Posix):
    """Without waiting for the medium, where no power is cut."""

    def fsync(self, fd: int) -> None:
        pass


class NoLinks(Fast):
    """Finished files get no second name; small files are still created by one."""

    def link(self, source: str, target: str) -> None:
        if ".new-" not in source:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        super().link(source, target)


@pytest.fixture(name="storage")
def _storage(tmp_path: Path) -> LocalStorage:
    """Step 100 holds a file of step 200."""
    storage = LocalStorage(tmp_path / "run", NoLinks())
    start_generation(storage)
    commit(storage, 100, 1, base=Base())
    commit(storage, 200, 1, base=Base(FIRST))
    return storage


def names(storage: LocalStorage) -> list[str]:
    return [item.name for item in Catalog(storage).checkpoints()]


def ensure_all_whole(storage: LocalStorage) -> None:
    for name in names(storage):
        ensure_whole(storage, name)


def test_who_refers_goes_before_what_it_refers_to_and_the_rest_stays():
    holders = {"a": {"b", "c"}, "b": {"d"}}

    assert plan_deletion(["a", "b", "c", "d"], holders) == (["c", "d", "b", "a"], {})
    assert plan_deletion(["a", "c"], holders) == (["c"], {"a": ["b"]})
    assert plan_deletion(["b", "a"], holders) == ([], {"b": ["d"], "a": ["b", "c"]})
    assert plan_deletion([], holders) == ([], {})
    assert plan_deletion(["x"], {}) == (["x"], {})


def test_references_are_found_in_whole_damaged_and_strange_manifests(storage: LocalStorage):
    manifest = Path(storage.locate(f"{SECOND}/manifest.json")).read_bytes()

    assert find_references(manifest) == {FIRST}
    assert find_references(manifest[:-40]) == {FIRST}
    assert find_references(b'{"files": [{"checkpoint" : "step-0000000007.g0002"}]}') == {"step-0000000007.g0002"}
    assert find_references(b'"checkpoint":"../x" "checkpoint":"\xff" "checkpoint":7') == set()


def test_a_checkpoint_in_which_a_file_of_another_lies_stays_until_that_one_is_gone(storage: LocalStorage):
    commit(storage, 300, 1)

    assert expire(storage, [FIRST]) == []
    ensure_whole(storage, SECOND)
    assert expire(storage, [FIRST, SECOND]) == [FIRST, SECOND]
    assert names(storage) == [THIRD]
    assert not [entry.name for entry in storage.list_dir() if entry.name.startswith(".")]


def test_a_deletion_that_dies_in_the_middle_of_both_leaves_no_dangling_reference(storage: LocalStorage):
    class DiedError(BaseException):
        pass

    def die() -> None:
        raise DiedError

    commit(storage, 300, 1)
    failpoint.arm({"mid_prune": die})
    try:
        with pytest.raises(DiedError):
            expire(storage, [FIRST, SECOND])
    finally:
        failpoint.disarm()

    assert names(storage) == [FIRST, THIRD], "the one that refers went first"
    sweep(storage, [item.name for item in find_leftovers(storage, older_than_s=0, now_unix_s=1e12)])
    assert sorted(entry.name for entry in storage.list_dir()) == ["generations", FIRST, THIRD]


def test_a_damaged_manifest_still_holds_what_it_refers_to(storage: LocalStorage):
    commit(storage, 300, 1)
    manifest = Path(storage.locate(f"{SECOND}/manifest.json"))
    manifest.write_bytes(manifest.read_bytes()[:-9])

    assert expire(storage, [FIRST]) == []


def test_an_attempt_in_flight_holds_what_its_manifest_refers_to(storage: LocalStorage):
    transaction = stage_step(storage, 300, 1, base=Base(SECOND))
    # Another job takes the run over from step 200, retrains and goes on.
    create_generation(storage, make_record(2, parent=CheckpointId(200, 0, 1)), expected_newest=1)
    commit(storage, 300, 2)

    assert expire(storage, [SECOND, FIRST]) == [SECOND]
    transaction.abandon()
    assert expire(storage, [FIRST]) == [FIRST]


def test_a_checkpoint_that_is_about_to_go_is_not_referred_to(storage: LocalStorage):
    assert find_referable(storage, [FIRST, "step-0000000007.g0001"]) == {FIRST}
    with announced(storage, [FIRST]):
        assert find_referable(storage, [FIRST, SECOND]) == {SECOND}
        name = commit(storage, 300, 1, base=Base(SECOND))
        assert Catalog(storage).read_manifest(name)[0].references == (), "written anew"
    assert find_referable(storage, [FIRST]) == {FIRST}
    assert find_referable(storage, []) == set()


def test_a_save_that_did_not_see_the_announcement_is_seen_by_whoever_made_it(tmp_path: Path):
    storage = LocalStorage(tmp_path / "run", NoLinks())
    start_generation(storage)
    commit(storage, 100, 1, base=Base())
    commit(storage, 200, 1, base=Base())

    class Interrupted(Fast):
        """A save commits just before the announcement is made."""

        def mkdir(self, path: str) -> None:
            if ".trash-" in path and THIRD not in names(storage):
                commit(storage, 300, 1, base=Base(FIRST))
            super().mkdir(path)

    assert expire(LocalStorage(storage.root, Interrupted()), [FIRST]) == []

    assert Catalog(storage).read_manifest(THIRD)[0].references == (FIRST,)
    ensure_all_whole(storage)
    assert not [entry.name for entry in storage.list_dir() if entry.name.startswith(".")]


def test_a_save_stops_whoever_looked_before_its_manifest_was_staged(storage: LocalStorage):
    transaction: Transaction | None = None

    def save() -> None:
        nonlocal transaction
        # The save has looked at step 100 already: before the deletion was announced.
        failpoint.disarm()
        transaction = stage_step(storage, 300, 1, base=Base(SECOND, has_looked=True))

    commit(storage, 250, 1)
    failpoint.arm({"before_prune": save})
    with pytest.raises(StorageMissingError, match="trash"):
        expire(storage, [SECOND, FIRST])
    assert transaction is not None
    transaction.publish()

    assert names(storage)[0] == FIRST
    ensure_whole(storage, THIRD)


def test_a_save_that_refers_to_what_is_gone_fails_before_its_commit(storage: LocalStorage):
    failpoint.arm({"before_manifest": lambda: storage.discard(FIRST)})
    try:
        with pytest.raises(StorageMissingError, match=f"expected {FIRST}"):
            stage_step(storage, 300, 1, base=Base(SECOND))
    finally:
        failpoint.disarm()

    assert names(storage) == [SECOND]
    assert not [entry.name for entry in storage.list_dir() if entry.name.startswith(".")]


def test_who_sweeps_an_announcement_stops_the_deletion(storage: LocalStorage):
    commit(storage, 300, 1)

    def sweep_all() -> None:
        found = find_leftovers(storage, older_than_s=0, now_unix_s=1e12)
        assert [item.kind for item in found] == ["trash", "trash"]
        sweep(storage, [item.name for item in found])

    failpoint.arm({"before_prune": sweep_all})
    try:
        with pytest.raises(StorageMissingError):
            expire(storage, [FIRST, SECOND])
    finally:
        failpoint.disarm()

    assert names(storage) == [FIRST, SECOND, THIRD]
    ensure_all_whole(storage)


def test_an_attempt_that_is_committed_while_the_run_is_listed_is_not_missed(storage: LocalStorage):
    transaction = stage_step(storage, 300, 1, base=Base(SECOND))

    class Torn(LocalStorage):
        """The first listing of the root sees neither the old name of the attempt nor its new one."""

        listings = 0

        def list_dir(self, key: str = "") -> list[Entry]:
            found = super().list_dir(key)
            if key == "":
                self.listings += 1
                if self.listings == 1:
                    found = [entry for entry in found if entry.name != transaction.staging]
                    transaction.publish()
            return found

    assert References(Torn(storage.root)).read() == {FIRST: {SECOND, THIRD}}


def test_manifests_are_read_once_and_again_when_a_name_comes_back(storage: LocalStorage):
    references = References(storage)
    assert references.read() == {FIRST: {SECOND}}
    Path(storage.locate(f"{SECOND}/manifest.json")).rename(storage.locate("kept"))
    assert references.read() == {FIRST: {SECOND}}

    references.forget(SECOND)

    assert references.read() == {}


SEEDS = int(os.environ.get("DCKPT_FAULT_SCALE") or 1) * 30


def saving(storage: LocalStorage, in_turns: Callable[[Posix], Posix], step: int, generation: int, parent: str) -> str:
    return commit(LocalStorage(storage.root, in_turns(NoLinks())), step, generation, base=Base(parent))


def test_no_save_fails_and_nothing_is_lost_when_another_process_prunes_meanwhile(tmp_path: Path):
    """Step 300 of the same job, while steps 100 and 200 shall go: 100 may only if the save knows and writes anew."""
    outcomes = set()
    for seed in range(SEEDS):
        storage = LocalStorage(tmp_path / str(seed), NoLinks())
        start_generation(storage)
        commit(storage, 100, 1, base=Base())
        commit(storage, 200, 1, base=Base(FIRST))

        saved, pruned = interleave(
            seed,
            [
                lambda turns, storage=storage: saving(storage, turns, 300, 1, SECOND),
                lambda turns, storage=storage: expire(LocalStorage(storage.root, turns(Fast())), [FIRST, SECOND]),
            ],
        )

        assert saved == THIRD, (seed, saved)
        refers = Catalog(storage).read_manifest(THIRD)[0].references == (FIRST,)
        assert isinstance(pruned, list | CommitConflictError | StorageMissingError), (seed, pruned)
        assert not (refers and isinstance(pruned, list) and FIRST in pruned), (seed, pruned)
        outcomes.add(("refers" if refers else "written anew", str(pruned) if isinstance(pruned, list) else "refused"))
        ensure_all_whole(storage)
    assert len(outcomes) >= 3, outcomes


def test_no_save_fails_and_nothing_is_lost_when_an_older_step_is_continued_while_it_is_pruned(tmp_path: Path):
    """The new job went back to step 100, which is not the newest of the line until its generation exists."""
    outcomes = set()
    for seed in range(SEEDS):
        storage = LocalStorage(tmp_path / str(seed), NoLinks())
        start_generation(storage)
        commit(storage, 100, 1, base=Base())
        commit(storage, 200, 1, base=Base())

        def go_back(turns: Callable[[Posix], Posix], storage: LocalStorage = storage) -> str:
            mine = LocalStorage(storage.root, turns(NoLinks()))
            create_generation(mine, make_record(2, parent=CheckpointId(100, 0, 1)), expected_newest=1)
            return saving(storage, turns, 150, 2, FIRST)

        saved, pruned = interleave(
            seed,
            [
                go_back,
                lambda turns, storage=storage: expire(LocalStorage(storage.root, turns(Fast())), [FIRST]),
            ],
        )

        # Where step 100 went before the save looked at it, there was nothing left to read its manifest from.
        if isinstance(saved, DckptError):
            assert isinstance(saved, StorageMissingError), (seed, saved)
            assert pruned == [FIRST], (seed, pruned)
            outcomes.add("gone before")
        else:
            manifest = Catalog(storage).read_manifest(str(saved))[0]
            outcomes.add("referred" if manifest.references else "written anew")
        ensure_all_whole(storage)
    assert outcomes >= {"gone before", "referred"}, outcomes
