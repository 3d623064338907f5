"""Each system call of a save fails once, at its 1st, 2nd, 3rd ... time, until the fault no longer fires."""

from __future__ import annotations

import errno
import itertools
from pathlib import Path

import pytest

from dckpt.catalog.catalog import Catalog
from dckpt.catalog.prune import expire, find_leftovers, sweep
from dckpt.errors import DckptError, StorageError, StorageFullError, UnknownOutcomeError
from dckpt.format.layout import GENERATIONS_DIR, checkpoint_name
from dckpt.storage.local import LocalStorage
from tests.support.commits import Base, commit, ensure_whole, start_generation
from tests.support.recording import FailingPosix

REFUSED = [
    (kind, code)
    for kind in ("create", "write", "fsync", "mkdir", "rename", "link")
    for code in (errno.EIO, errno.ENOSPC)
] + [("rename", errno.ETIMEDOUT), ("link", errno.ETIMEDOUT), ("mkdir", errno.EROFS)]

# The call took effect and its answer was lost: an error of the wire, or, from a network file system that sent
# the request twice, the second one's complaint about the first.
LANDED = [
    *((kind, errno.EIO) for kind in ("rename", "link", "mkdir", "fsync", "close")),
    *((kind, errno.ETIMEDOUT) for kind in ("rename", "link", "mkdir")),
    ("rename", errno.ENOENT),
    ("link", errno.EEXIST),
    ("mkdir", errno.EEXIST),
]


def save(storage: LocalStorage) -> str:
    return commit(storage, 200, start_generation(storage), base=Base(checkpoint_name(100, 1)))


@pytest.mark.parametrize(
    ("kind", "code", "lands"),
    [(kind, code, False) for kind, code in REFUSED] + [(kind, code, True) for kind, code in LANDED],
)
def test_a_failed_call_is_a_typed_error_and_harms_no_checkpoint(tmp_path: Path, kind: str, code: int, lands: bool):
    for number in itertools.count(1):
        root = tmp_path / f"run{number}"
        healthy = LocalStorage(root)
        healthy.ensure_root()
        first = commit(healthy, 100, start_generation(healthy), base=Base())
        posix = FailingPosix(kind=kind, errno=code, at=number, lands=lands)
        try:
            saved = save(LocalStorage(root, posix))
        except DckptError as error:
            assert posix.num_failed == 1
            assert_tells_the_truth(healthy, error, code)
        else:
            # An error that did not matter was survived, and the acknowledged checkpoint is there.
            ensure_whole(healthy, saved)
        assert_run_goes_on(healthy, first)
        if not posix.num_failed:
            break

    assert number > 1, "the fault never fired"


def assert_tells_the_truth(storage: LocalStorage, error: DckptError, code: int) -> None:
    assert isinstance(error, StorageError), error
    assert error.code == code
    if isinstance(error, UnknownOutcomeError):
        return
    if code == errno.ENOSPC:
        assert isinstance(error, StorageFullError)
    assert 200 not in {item.step for item in Catalog(storage).checkpoints()}, "a failed save must not be visible"


def assert_run_goes_on(storage: LocalStorage, first: str) -> None:
    catalog = Catalog(storage)
    ensure_whole(storage, first)
    for item in catalog.checkpoints():
        ensure_whole(storage, item.name)
    sweep(storage, [item.name for item in find_leftovers(storage, older_than_s=0, now_unix_s=1e12)])
    third = commit(storage, 300, start_generation(storage))
    ensure_whole(storage, third)
    assert catalog.resolve("latest").name == third
    assert catalog.superseded() == []
    assert all(not entry.name.startswith(".") for key in ("", GENERATIONS_DIR) for entry in storage.list_dir(key))


@pytest.mark.parametrize(
    ("kind", "code", "lands"),
    [
        ("rename", errno.EIO, False),
        ("fsync", errno.EIO, False),
        ("unlink", errno.EIO, False),
        ("rmdir", errno.EBUSY, False),
        ("rename", errno.EIO, True),
    ],
)
def test_a_failed_deletion_leaves_checkpoints_whole_or_gone(tmp_path: Path, kind: str, code: int, lands: bool):
    for number in itertools.count(1):
        root = tmp_path / f"run{number}"
        healthy = LocalStorage(root)
        healthy.ensure_root()
        generation = start_generation(healthy)
        first, second = commit(healthy, 100, generation), commit(healthy, 200, generation)
        posix = FailingPosix(kind=kind, errno=code, at=number, lands=lands)
        if _expire_fails(LocalStorage(root, posix), first):
            assert posix.num_failed == 1
        ensure_whole(healthy, second)
        for item in Catalog(healthy).checkpoints():
            ensure_whole(healthy, item.name)
        assert_run_goes_on(healthy, second)
        if not posix.num_failed:
            break

    assert number > 1, "the fault never fired"


def _expire_fails(storage: LocalStorage, name: str) -> bool:
    try:
        expire(storage, [name])
    except StorageError:
        return True
    return False


def test_a_failed_fsync_is_never_retried_and_condemns_the_file(tmp_path: Path):
    posix = FailingPosix(kind="fsync", errno=errno.EIO, at=1)
    storage = LocalStorage(tmp_path, posix)
    writer = storage.create_file("file")
    writer.write_at(0, memoryview(b"data"))

    for _ in range(3):
        with pytest.raises(StorageError):
            writer.finish(4)

    assert (posix.num_calls, posix.num_failed) == (1, 1)
