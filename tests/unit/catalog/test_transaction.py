"""The coordinator's side of a commit: taken names, the listing, the fence, and who is committed in the end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dckpt import failpoint
from dckpt.catalog.catalog import Catalog
from dckpt.catalog.generations import create_generation
from dckpt.catalog.prune import sweep
from dckpt.catalog.transaction import Transaction, read_attempt
from dckpt.errors import CommitConflictError, StorageError, StorageMissingError, UnknownOutcomeError
from dckpt.format.manifest import FileEntry
from dckpt.storage.local import LocalStorage
from tests.support.commits import commit, ensure_whole, make_record, stage_step, start_generation

ATTEMPT = "a" * 32
NAME = "step-0000000100.g0001"


@pytest.fixture(name="storage")
def _storage(tmp_path: Path) -> LocalStorage:
    storage = LocalStorage(tmp_path / "run")
    start_generation(storage)
    return storage


def begin(storage: LocalStorage) -> Transaction:
    transaction = Transaction(storage, checkpoint=NAME, attempt=ATTEMPT, generation=1)
    transaction.begin()
    return transaction


def put(storage: LocalStorage, transaction: Transaction, name: str, size: int) -> FileEntry:
    writer = storage.create_file(f"{transaction.attempt_dir}/{name}")
    writer.write_at(0, memoryview(bytes(size)))
    writer.finish(size)
    kind = "sums" if name.endswith(".sums") else "shard"
    return FileEntry(f"{ATTEMPT}/{name}", size, "0" * 32, kind, int(name[4:9]))


def test_a_commit_is_whole_and_readable_by_its_attempt(storage: LocalStorage):
    name = commit(storage, 100, 1)

    ensure_whole(storage, name)
    assert read_attempt(storage, name) == Catalog(storage).read_manifest(name)[0].attempt
    assert read_attempt(storage, "step-0000000200.g0001") is None


@pytest.mark.parametrize("what", ["directory", "empty directory", "file", "link"])
def test_begin_refuses_a_taken_name_whatever_it_is(storage: LocalStorage, what: str):
    place = Path(storage.locate(NAME))
    if what == "file":
        place.write_text("x")
    elif what == "link":
        place.symlink_to("/")
    else:
        place.mkdir()
        if what == "directory":
            (place / "manifest.json").write_text("x")

    with (
        pytest.raises(CommitConflictError, match=what.split()[0])
        if what != "directory"
        else pytest.raises(CommitConflictError, match="1 entries")
    ):
        begin(storage)


def test_the_listing_accepts_exactly_what_was_reported(storage: LocalStorage):
    transaction = begin(storage)
    entries = [put(storage, transaction, "rank00000.safetensors", 10), put(storage, transaction, "rank00000.sums", 5)]

    transaction.ensure_files(entries)


def test_a_file_that_only_its_rank_can_see_names_rank_file_and_sizes(storage: LocalStorage):
    transaction = begin(storage)
    entries = [put(storage, transaction, "rank00000.safetensors", 10)]
    entries.append(FileEntry(f"{ATTEMPT}/rank00003.safetensors", 77, "0" * 32, "shard", 3))
    entries.append(FileEntry(f"{ATTEMPT}/rank00003.sums", 7, "0" * 32, "sums", 3))

    with pytest.raises(StorageError) as caught:
        transaction.ensure_files(entries, patience_s=0)

    for words in ("rank00003.safetensors", "rank 3", "77 bytes", "nothing", "node-local", "1 more"):
        assert words in str(caught.value)


@pytest.mark.parametrize("found", [9, 11, 0])
def test_a_file_of_another_size_names_both_sizes(storage: LocalStorage, found: int):
    transaction = begin(storage)
    entry = put(storage, transaction, "rank00001.safetensors", found)
    reported = FileEntry(entry.path, 10, entry.digest, entry.kind, entry.rank)

    with pytest.raises(StorageError, match=f"expected 10 bytes, found {found} bytes"):
        transaction.ensure_files([reported], patience_s=0)


def test_a_file_that_nobody_reported_is_refused(storage: LocalStorage):
    transaction = begin(storage)
    entry = put(storage, transaction, "rank00000.safetensors", 10)
    put(storage, transaction, "rank00001.safetensors", 10)

    with pytest.raises(StorageError, match=r"rank00001\.safetensors.*only files that a rank reported"):
        transaction.ensure_files([entry], patience_s=0)


def test_a_file_that_shows_late_is_waited_for(storage: LocalStorage):
    transaction = begin(storage)
    lists = iter([[], storage.list_dir()])
    entry = put(storage, transaction, "rank00000.safetensors", 10)

    class Late(LocalStorage):
        def list_dir(self, key: str = ""):
            found = next(lists, None)
            return super().list_dir(key) if found is None else found

    late = Transaction(Late(storage.root), checkpoint=NAME, attempt=ATTEMPT, generation=1)
    late.ensure_files([entry], patience_s=30)

    assert next(lists, None) is None


def test_a_fenced_attempt_is_not_published_and_can_be_abandoned(storage: LocalStorage):
    transaction = stage_step(storage, 100, 1)
    create_generation(storage, make_record(2), expected_newest=1)

    with pytest.raises(CommitConflictError, match="Another job"):
        transaction.publish()
    transaction.abandon()

    assert Catalog(storage).checkpoints() == []
    assert [entry.name for entry in storage.list_dir()] == ["generations"]


def test_a_stand_alone_checkpoint_is_not_fenced(tmp_path: Path):
    storage = LocalStorage(tmp_path)
    transaction = Transaction(storage, checkpoint="final", attempt=ATTEMPT, generation=0)
    transaction.begin()
    transaction.abandon()

    assert storage.list_dir() == []


def test_an_attempt_that_was_swept_is_not_published(storage: LocalStorage):
    transaction = stage_step(storage, 100, 1)
    sweep(storage, [transaction.staging])

    with pytest.raises(StorageMissingError, match="swept"):
        transaction.publish()
    transaction.abandon()

    assert Catalog(storage).checkpoints() == []


def test_of_two_attempts_at_one_name_the_second_is_a_conflict_and_the_first_stays(storage: LocalStorage):
    first, second = stage_step(storage, 100, 1), stage_step(storage, 100, 1)
    first.publish()
    attempt = read_attempt(storage, NAME)

    with pytest.raises(CommitConflictError, match=f"attempt {attempt}"):
        second.publish()
    second.abandon()

    ensure_whole(storage, NAME)
    assert read_attempt(storage, NAME) == attempt
    assert [entry.name for entry in storage.list_dir()] == ["generations", NAME]


def test_a_name_taken_by_something_unreadable_is_an_unknown_outcome(storage: LocalStorage):
    transaction = stage_step(storage, 100, 1)
    storage.make_dirs(NAME)
    storage.create(f"{NAME}/manifest.json", b"torn")

    with pytest.raises(UnknownOutcomeError, match="could not be established"):
        transaction.publish()
    transaction.abandon()

    assert transaction.staging in {entry.name for entry in storage.list_dir()}


def test_our_own_rename_whose_answer_was_lost_is_committed(storage: LocalStorage):
    transaction = stage_step(storage, 100, 1)
    os.rename(storage.locate(transaction.staging), storage.locate(NAME))

    transaction.publish()

    ensure_whole(storage, NAME)


def test_abandon_removes_the_attempt_and_never_raises(storage: LocalStorage):
    transaction = begin(storage)
    put(storage, transaction, "rank00000.safetensors", 10)

    transaction.abandon()
    transaction.abandon()

    assert [entry.name for entry in storage.list_dir()] == ["generations"]


def test_abandon_touches_nothing_once_the_commit_may_have_happened(storage: LocalStorage):
    class StopError(Exception):
        pass

    def stop() -> None:
        raise StopError

    transaction = stage_step(storage, 100, 1)
    failpoint.arm({"after_rename": stop})
    try:
        with pytest.raises(StopError):
            transaction.publish()
        assert failpoint.hits("after_rename") == 1
    finally:
        failpoint.disarm()
    transaction.abandon()

    ensure_whole(storage, NAME)


def test_the_failpoints_of_a_commit_are_passed_in_order(storage: LocalStorage):
    points = ("before_listing", "before_index", "before_manifest", "after_manifest", "before_rename", "after_rename")
    passed: list[str] = []
    failpoint.arm({point: (lambda point=point: passed.append(point)) for point in points})
    try:
        commit(storage, 100, 1)
    finally:
        failpoint.disarm()

    assert tuple(passed) == points
