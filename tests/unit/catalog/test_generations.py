"""Generation records on storage: exclusive creation, the fence, and a creation whose answer was lost."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from dckpt.catalog.generations import create_generation, ensure_not_fenced, list_generations, read_generation
from dckpt.errors import CommitConflictError, CorruptCheckpointError, StorageMissingError, UnknownOutcomeError
from dckpt.storage.local import LocalStorage
from dckpt.storage.posix import Posix
from tests.support.commits import make_record


@pytest.fixture(name="storage")
def _storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "run")


def test_a_run_that_was_never_made_has_no_generations(storage: LocalStorage):
    assert list_generations(storage) == []
    storage.ensure_root()
    assert list_generations(storage) == []


def test_a_record_reads_back_and_makes_the_root(storage: LocalStorage):
    made = make_record(1)

    create_generation(storage, made, expected_newest=0)

    assert list_generations(storage) == [1]
    assert read_generation(storage, 1) == made


def test_temporary_and_foreign_files_are_not_records(storage: LocalStorage):
    create_generation(storage, make_record(1), expected_newest=0)
    for name in (".new-" + "a" * 32, "7.json", "000002.json.bak", "notes"):
        storage.create(f"generations/{name}", b"x")

    assert list_generations(storage) == [1]


def test_two_jobs_that_observed_the_same_generation_cannot_both_continue(storage: LocalStorage):
    create_generation(storage, make_record(1), expected_newest=0)
    create_generation(storage, make_record(2), expected_newest=1)

    with pytest.raises(CommitConflictError) as caught:
        create_generation(storage, make_record(2), expected_newest=1)

    for words in ("generation 2", "world size 2", "1970-01-01T00:00:01", "stop one of the two"):
        assert words in str(caught.value)
    assert list_generations(storage) == [1, 2]


def test_a_generation_that_came_in_between_is_a_conflict(storage: LocalStorage):
    for number in (1, 2, 3):
        create_generation(storage, make_record(number), expected_newest=number - 1)

    with pytest.raises(CommitConflictError, match="found generation 3"):
        create_generation(storage, make_record(2), expected_newest=1)


def test_the_fence_lets_the_newest_pass_and_stops_a_zombie(storage: LocalStorage):
    create_generation(storage, make_record(1), expected_newest=0)
    ensure_not_fenced(storage, 1)
    create_generation(storage, make_record(2), expected_newest=1)

    with pytest.raises(CommitConflictError, match="expected generation 1 to be the newest, found generation 2"):
        ensure_not_fenced(storage, 1)
    ensure_not_fenced(storage, 2)


def test_a_fence_that_cannot_see_its_own_record_lets_nothing_pass(storage: LocalStorage):
    """Somebody deleted the run under a running job: committing into the remains would make an orphan."""
    create_generation(storage, make_record(1), expected_newest=0)
    storage.discard("generations/000001.json")

    with pytest.raises(CommitConflictError, match="found none"):
        ensure_not_fenced(storage, 1)


def test_a_creation_of_unknown_outcome_succeeds_when_the_same_record_is_created_again(storage: LocalStorage):
    class OnceUnsynced(Posix):
        linked = failed = 0

        def link(self, source: str, target: str) -> None:
            super().link(source, target)
            self.linked += 1

        def fsync(self, fd: int) -> None:
            if self.linked and not self.failed:
                self.failed += 1
                raise OSError(errno.EIO, "Input/output error")
            super().fsync(fd)

    posix, mine = OnceUnsynced(), make_record(1)
    broken = LocalStorage(storage.root, posix)

    with pytest.raises(UnknownOutcomeError):
        create_generation(broken, mine, expected_newest=0)
    with pytest.raises(CommitConflictError):
        create_generation(broken, make_record(1), expected_newest=0)
    create_generation(broken, mine, expected_newest=0)

    assert posix.failed == 1
    assert read_generation(storage, 1) == mine
    assert len(storage.list_dir("generations")) == 1


def test_a_renamed_record_is_corrupt_and_an_absent_one_missing(storage: LocalStorage):
    create_generation(storage, make_record(1), expected_newest=0)
    storage.create("generations/000002.json", storage.read_bytes("generations/000001.json", limit=10_000))

    with pytest.raises(CorruptCheckpointError, match="expected generation 2, found 1"):
        read_generation(storage, 2)
    with pytest.raises(StorageMissingError):
        read_generation(storage, 3)


def test_a_conflict_is_told_also_if_the_others_record_is_unreadable(storage: LocalStorage):
    create_generation(storage, make_record(1), expected_newest=0)
    storage.create("generations/000002.json", b"torn")

    with pytest.raises(CommitConflictError, match="cannot be read"):
        ensure_not_fenced(storage, 1)
