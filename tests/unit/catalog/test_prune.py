"""Deleting: what is refused, what a stale plan cannot do, what counts as a leftover."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dckpt import failpoint
from dckpt.catalog.catalog import Catalog
from dckpt.catalog.generations import create_generation
from dckpt.catalog.prune import expire, find_leftovers, sweep
from dckpt.errors import CheckpointNotFoundError, CommitConflictError, ConfigError, CorruptCheckpointError, StorageError
from dckpt.format.layout import CheckpointId
from dckpt.storage.local import LocalStorage
from tests.support.commits import commit, ensure_whole, make_record, stage_step, start_generation


@pytest.fixture(name="storage")
def _storage(tmp_path: Path) -> LocalStorage:
    storage = LocalStorage(tmp_path / "run")
    start_generation(storage)
    return storage


def steps(storage: LocalStorage) -> list[int]:
    return [item.step for item in Catalog(storage).checkpoints()]


def test_expire_removes_what_it_is_told_and_nothing_twice(storage: LocalStorage):
    first, second, _ = (commit(storage, step, 1) for step in (100, 200, 300))

    assert expire(storage, [first, second, first]) == [first, second]
    assert expire(storage, [first]) == []
    assert expire(storage, []) == []
    assert steps(storage) == [300]
    assert not [entry for entry in storage.list_dir() if entry.name.startswith(".")]


def test_the_newest_of_the_line_is_never_expired_and_nothing_else_with_it(storage: LocalStorage):
    first, second = (commit(storage, step, 1) for step in (100, 200))

    with pytest.raises(CommitConflictError, match="the newest of the line"):
        expire(storage, [first, second])
    assert steps(storage) == [100, 200]


def test_a_rollback_after_the_plan_protects_what_it_went_back_to(storage: LocalStorage):
    first, second, third = (commit(storage, step, 1) for step in (100, 200, 300))
    create_generation(storage, make_record(2, parent=CheckpointId(100, 0, 1)), expected_newest=1)

    with pytest.raises(CommitConflictError):
        expire(storage, [first, second])
    assert expire(storage, [second, third]) == [second, third], "superseded ones go on request"


def test_a_pin_after_the_plan_protects(storage: LocalStorage):
    first, second, _ = (commit(storage, step, 1) for step in (100, 200, 300))
    Catalog(storage).pin(second)

    with pytest.raises(CommitConflictError, match="pin"):
        expire(storage, [first, second])
    assert steps(storage) == [100, 200, 300]


def test_a_pin_that_comes_after_the_pins_were_looked_at_still_holds(storage: LocalStorage):
    first, _ = (commit(storage, step, 1) for step in (100, 200))
    failpoint.arm({"before_prune": lambda: Catalog(storage).pin(first)})

    try:
        with pytest.raises(StorageError):
            expire(storage, [first])
    finally:
        failpoint.disarm()

    assert steps(storage) == [100, 200]
    assert Catalog(storage).pins() == {first}
    ensure_whole(storage, first)


def test_a_pin_that_comes_too_late_is_refused_and_leaves_none(storage: LocalStorage):
    """The checkpoint goes after it was found, and before the pin is there."""
    first, _ = (commit(storage, step, 1) for step in (100, 200))

    class Late(LocalStorage):
        def create(self, key: str, data: bytes) -> None:
            if key.endswith(first):
                assert expire(storage, [first]) == [first]
            super().create(key, data)

    with pytest.raises(CheckpointNotFoundError):
        Catalog(Late(storage.root)).pin(first)

    assert Catalog(storage).pins() == set()


def test_nothing_goes_while_the_newest_cannot_be_read(storage: LocalStorage):
    first, second = (commit(storage, step, 1) for step in (100, 200))
    manifest = Path(storage.locate(f"{second}/manifest.json"))
    manifest.write_bytes(manifest.read_bytes()[:-9])

    with pytest.raises(CorruptCheckpointError):
        expire(storage, [first])
    ensure_whole(storage, first)


def test_a_zombie_may_not_expire(storage: LocalStorage):
    first, _ = (commit(storage, step, 1) for step in (100, 200))
    start_generation(storage)

    with pytest.raises(CommitConflictError):
        expire(storage, [first], generation=1)
    assert steps(storage) == [100, 200]


@pytest.mark.parametrize("name", ["generations", "step-100", "../run", ".tmp-" + "a" * 32])
def test_expire_takes_only_names_of_checkpoints(storage: LocalStorage, name: str):
    commit(storage, 100, 1)

    with pytest.raises(ConfigError):
        expire(storage, [name])


def test_a_deletion_that_dies_in_the_middle_leaves_no_torn_name(storage: LocalStorage):
    class DiedError(BaseException):  # a dead process cleans nothing up
        pass

    def die() -> None:
        raise DiedError

    first, second = (commit(storage, step, 1) for step in (100, 200))
    failpoint.arm({"mid_prune": die})
    try:
        with pytest.raises(DiedError):
            expire(storage, [first])
        assert failpoint.hits("mid_prune") == 1
    finally:
        failpoint.disarm()

    assert steps(storage) == [200]
    ensure_whole(storage, second)
    left = find_leftovers(storage, older_than_s=0, now_unix_s=1e12)
    assert [item.kind for item in left] == ["trash"]
    sweep(storage, [item.name for item in left])
    assert [entry.name for entry in storage.list_dir()] == ["generations", second]


def test_leftovers_are_found_with_their_size_and_age(storage: LocalStorage):
    transaction = stage_step(storage, 100, 1)
    storage.create("generations/.new-" + "a" * 32, b"123")
    storage.make_dirs(".trash-" + "b" * 32)
    (Path(storage.root) / "unrelated.tmp").write_text("mine")
    root = Path(storage.root)
    for place in (root / transaction.staging).rglob("*"):
        os.utime(place, (1000, 1000))
    os.utime(root / transaction.staging, (1000, 1000))
    os.utime(root / "generations" / (".new-" + "a" * 32), (2000, 2000))
    os.utime(root / (".trash-" + "b" * 32), (3000, 3000))

    found = find_leftovers(storage, older_than_s=0, now_unix_s=3500)

    assert [(item.kind, item.age_s) for item in found] == [("staging", 2500), ("trash", 500), ("temporary", 1500)]
    assert found[0].bytes == sum(p.stat().st_size for p in (root / transaction.staging).rglob("*") if p.is_file())
    assert found[2].bytes == 3
    assert [item.kind for item in find_leftovers(storage, older_than_s=1000, now_unix_s=3500)] == [
        "staging",
        "temporary",
    ]


def test_a_save_that_still_writes_is_young_whatever_the_age_of_its_directory(storage: LocalStorage):
    transaction = stage_step(storage, 100, 1)
    root = Path(storage.root)
    os.utime(root / transaction.staging, (1000, 1000))

    assert find_leftovers(storage, older_than_s=3600, now_unix_s=root.stat().st_mtime) == []


def test_a_run_that_was_never_made_has_no_leftovers(tmp_path: Path):
    assert find_leftovers(LocalStorage(tmp_path / "none"), older_than_s=0, now_unix_s=0) == []


def test_sweep_takes_only_leftovers(storage: LocalStorage):
    name = commit(storage, 100, 1)

    for refused in (name, "generations", "generations/000001.json", "pins/.tmp-" + "a" * 32, ".tmp-x"):
        with pytest.raises(ConfigError):
            sweep(storage, [refused])
    ensure_whole(storage, name)
