"""What is particular to local and mounted file systems: links, special files, lost answers, reads around the cache."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest

from dckpt.errors import (
    ConfigError,
    CorruptCheckpointError,
    KeyExistsError,
    StorageError,
    StorageFullError,
    StorageMissingError,
    StorageReadOnlyError,
    TransientStorageError,
    UnknownOutcomeError,
)
from dckpt.format import layout
from dckpt.storage import base
from dckpt.storage.local import LocalStorage
from dckpt.storage.posix import Posix, storage_error
from tests.support.recording import FailingPosix

NAME = "step-0000000100.g0001"


class Patched(Posix):
    """The real calls, of which a test replaces some."""


def test_storage_and_format_speak_the_same_layout():
    """Both are in one row, so neither imports the other; the words they share are held equal here."""
    assert base.MANIFEST_NAME == layout.MANIFEST_NAME
    assert (base.STAGING_PREFIX, base.TRASH_PREFIX) == (layout.STAGING_PREFIX, layout.TRASH_PREFIX)
    assert LocalStorage("/x").staging_key(NAME, "a" * 32) == layout.staging_name("a" * 32)


def test_a_relative_root_stays_where_it_was_when_the_process_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    storage = LocalStorage("run")
    storage.ensure_root()
    monkeypatch.chdir("/")

    assert storage.exists()
    assert storage.url == str(tmp_path / "run")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_root_that_cannot_be_asked_for_is_an_error_not_an_absent_root(tmp_path: Path, code: int):
    posix = Patched()

    def stat(path: str, *, follow_symlinks: bool = False) -> os.stat_result:
        raise OSError(code, os.strerror(code))

    posix.stat = stat  # type: ignore[method-assign]

    with pytest.raises(StorageError):
        LocalStorage(tmp_path, posix).exists()


def test_a_root_that_is_a_file_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("x")

    with pytest.raises(ConfigError, match="expected a directory"):
        LocalStorage(tmp_path / "file").exists()
    with pytest.raises((ConfigError, StorageError)):
        LocalStorage(tmp_path / "file" / "run").ensure_root()


def test_symbolic_links_below_the_root_are_not_followed(tmp_path: Path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    run = tmp_path / "run"
    run.mkdir()
    (run / "file").symlink_to(outside / "secret")
    (run / "directory").symlink_to(outside)
    storage = LocalStorage(run)

    for key in ("file", "directory/secret"):
        with pytest.raises(CorruptCheckpointError, match="symbolic link"):
            storage.read_bytes(key, limit=100)
    with pytest.raises(CorruptCheckpointError):
        storage.size("file")
    with pytest.raises(CorruptCheckpointError):
        storage.list_dir("directory")
    assert not any(entry.is_dir for entry in storage.list_dir())


def test_discard_removes_a_link_and_not_what_it_points_to(tmp_path: Path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "data").write_text("data")
    run = tmp_path / "run"
    (run / "tree").mkdir(parents=True)
    (run / "tree" / "link").symlink_to(outside)
    (run / "link").symlink_to(outside)
    storage = LocalStorage(run)

    storage.discard("tree")
    storage.discard("link")

    assert storage.list_dir() == []
    assert (outside / "data").read_text() == "data"


def test_the_root_itself_may_be_a_link(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    storage = LocalStorage(tmp_path / "run")
    storage.ensure_root()
    storage.create("a/file", b"x")

    assert storage.read_bytes("a/file", limit=1) == b"x"


def test_a_fifo_is_refused_and_does_not_block(tmp_path: Path):
    os.mkfifo(tmp_path / "fifo")

    with pytest.raises(CorruptCheckpointError, match="regular file"):
        LocalStorage(tmp_path).read_bytes("fifo", limit=1)


def test_an_uncached_read_goes_around_the_page_cache_where_it_can(tmp_path: Path):
    posix, direct = Patched(), []

    def open_(path: str, flags: int, *, dir_fd: int | None = None) -> int:
        fd = Posix.open(posix, path, flags, dir_fd=dir_fd)
        if flags & os.O_DIRECT:
            direct.append(fd)
        return fd

    reads = []

    def pread_into(fd: int, target: memoryview, offset: int) -> int:
        reads.append(fd)
        return Posix.pread_into(posix, fd, target, offset)

    posix.open, posix.pread_into = open_, pread_into  # type: ignore[method-assign]
    storage = LocalStorage(tmp_path, posix)
    data = os.urandom(9_000_001)
    (tmp_path / "file").write_bytes(data)
    target = bytearray(len(data) - 3)

    with storage.open_reader("file", uncached=True) as reader:
        if not direct:
            pytest.skip("this file system has no O_DIRECT; the fallback is tested below")
        reader.read_into(2, memoryview(target))

    assert target == data[2:-1]
    assert set(reads) == set(direct)


@pytest.mark.parametrize("refuses_at", ["open", "read"])
def test_an_uncached_read_drops_the_cache_where_direct_reads_are_refused(tmp_path: Path, refuses_at: str):
    posix, dropped = Patched(), []

    def open_(path: str, flags: int, *, dir_fd: int | None = None) -> int:
        if flags & os.O_DIRECT and refuses_at == "open":
            raise OSError(errno.EINVAL, "no direct I/O")
        return Posix.open(posix, path, flags & ~os.O_DIRECT, dir_fd=dir_fd)

    def pread_into(fd: int, target: memoryview, offset: int) -> int:
        if refuses_at == "read" and not dropped:
            raise OSError(errno.EINVAL, "no direct I/O")
        return Posix.pread_into(posix, fd, target, offset)

    posix.open, posix.pread_into = open_, pread_into  # type: ignore[method-assign]
    posix.forget_cached = dropped.append  # type: ignore[method-assign]
    (tmp_path / "file").write_bytes(b"0123456789")
    target = bytearray(5)

    with LocalStorage(tmp_path, posix).open_reader("file", uncached=True) as reader:
        reader.read_into(3, memoryview(target))

    assert (target, len(dropped)) == (b"34567", 1)


def test_reads_that_time_out_are_repeated_a_few_times(tmp_path: Path):
    posix, failures = Patched(), [errno.ETIMEDOUT, errno.EAGAIN]

    def pread_into(fd: int, target: memoryview, offset: int) -> int:
        if failures:
            code = failures.pop()
            raise OSError(code, os.strerror(code))
        return Posix.pread_into(posix, fd, target, offset)

    posix.pread_into = pread_into  # type: ignore[method-assign]
    (tmp_path / "file").write_bytes(b"data")
    storage = LocalStorage(tmp_path, posix)

    assert storage.read_bytes("file", limit=4) == b"data"
    assert failures == []
    failures += [errno.ETIMEDOUT] * 3
    with pytest.raises(TransientStorageError):
        storage.read_bytes("file", limit=4)


def refuse_links(posix: Posix) -> None:
    def link(source: str, target: str) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    posix.link = link  # type: ignore[method-assign]


def test_without_hard_links_create_is_still_exclusive(tmp_path: Path):
    posix = Patched()
    refuse_links(posix)
    storage = LocalStorage(tmp_path, posix)

    storage.create("generations/000001.json", b"first")
    with pytest.raises(KeyExistsError):
        storage.create("generations/000001.json", b"second")

    assert storage.read_bytes("generations/000001.json", limit=10) == b"first"
    assert len(storage.list_dir("generations")) == 1


def test_without_hard_links_a_failed_create_leaves_no_torn_file(tmp_path: Path):
    posix, writes = Patched(), []
    refuse_links(posix)

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        writes.append(len(data))
        if len(writes) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return Posix.pwrite(posix, fd, data, offset)

    posix.pwrite = pwrite  # type: ignore[method-assign]
    storage = LocalStorage(tmp_path, posix)

    with pytest.raises(StorageFullError):
        storage.create("generations/000001.json", b"first")

    assert storage.list_dir("generations") == []
    storage.create("generations/000001.json", b"again")


@pytest.mark.parametrize(
    "code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV], ids=errno.errorcode.get
)
def test_a_link_that_the_file_system_refuses_is_an_answer_and_makes_nothing(tmp_path: Path, code: int):
    storage = LocalStorage(tmp_path, FailingPosix(kind="link", errno=code, at=1))
    (tmp_path / "file").write_bytes(b"x")

    assert storage.link("file", "second") is False
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.ETIMEDOUT, errno.ENOENT, errno.EACCES])
def test_a_link_that_fails_otherwise_is_a_typed_error(tmp_path: Path, code: int):
    storage = LocalStorage(tmp_path, FailingPosix(kind="link", errno=code, at=1))
    (tmp_path / "file").write_bytes(b"x")

    with pytest.raises(StorageError, match=r"link .*/file to .*/second") as caught:
        storage.link("file", "second")
    assert caught.value.code == code


def test_a_link_whose_first_answer_was_lost_is_made(tmp_path: Path):
    storage = LocalStorage(tmp_path, FailingPosix(kind="link", errno=errno.EEXIST, at=1, lands=True))
    (tmp_path / "file").write_bytes(b"x")

    assert storage.link("file", "second") is True
    assert (tmp_path / "second").samefile(tmp_path / "file")


def test_a_symbolic_link_gets_no_second_name(tmp_path: Path):
    (tmp_path / "file").symlink_to("/etc/hostname")

    with pytest.raises(CorruptCheckpointError):
        LocalStorage(tmp_path).link("file", "second")
    assert os.listdir(tmp_path) == ["file"]


def test_short_writes_are_continued_and_a_write_of_nothing_is_an_error(tmp_path: Path):
    posix, most = Patched(), [3]
    posix.pwrite = lambda fd, data, offset: Posix.pwrite(posix, fd, data[: most[0]], offset)  # type: ignore[method-assign]
    storage = LocalStorage(tmp_path, posix)
    writer = storage.create_file("file")
    writer.write_at(0, memoryview(b"0123456789"))
    writer.finish(10)
    assert storage.read_bytes("file", limit=10) == b"0123456789"

    most[0] = 0
    other = storage.create_file("other")
    with pytest.raises(StorageError, match="0 bytes"):
        other.write_at(0, memoryview(b"x"))
    other.abandon()


def test_a_real_size_limit_is_a_full_storage(tmp_path: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = LocalStorage(tmp_path).create_file("file")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(StorageFullError, match="EFBIG"):
            writer.write_at(0, memoryview(bytes((1 << 20) + 1)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        writer.abandon()


def stage(storage: LocalStorage, attempt: str = "a" * 32) -> str:
    staging = storage.staging_key(NAME, attempt)
    storage.make_dirs(f"{staging}/{attempt}")
    storage.stage_manifest(staging, b"manifest")
    return staging


def test_a_rename_onto_an_empty_directory_that_appears_in_between_loses_nothing(tmp_path: Path):
    """The check cannot see it and the kernel replaces it; it held nothing, and the checkpoint is whole."""
    posix = Patched()
    storage = LocalStorage(tmp_path, posix)
    staging = stage(storage)

    def rename(source: str, target: str) -> None:
        Posix.mkdir(posix, target)
        Posix.rename(posix, source, target)

    posix.rename = rename  # type: ignore[method-assign]
    storage.publish(staging, NAME, b"manifest")

    assert storage.read_bytes(f"{NAME}/manifest.json", limit=10) == b"manifest"


def test_of_two_attempts_that_both_passed_the_check_the_second_is_refused(tmp_path: Path):
    posix = Patched()
    storage = LocalStorage(tmp_path, posix)
    mine, theirs = stage(storage), stage(storage, "b" * 32)

    def rename(source: str, target: str) -> None:
        Posix.rename(posix, storage.locate(theirs), target)
        Posix.rename(posix, source, target)

    posix.rename = rename  # type: ignore[method-assign]

    with pytest.raises(KeyExistsError):
        storage.publish(mine, NAME, b"manifest")
    assert [entry.name for entry in storage.list_dir()] == [mine, NAME]


def test_a_parent_that_cannot_be_synced_after_the_rename_is_an_unknown_outcome(tmp_path: Path):
    posix, renamed = Patched(), []
    storage = LocalStorage(tmp_path, posix)
    staging = stage(storage)

    def rename(source: str, target: str) -> None:
        Posix.rename(posix, source, target)
        renamed.append(target)

    def fsync(fd: int) -> None:
        if renamed:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        Posix.fsync(posix, fd)

    posix.rename, posix.fsync = rename, fsync  # type: ignore[method-assign]

    with pytest.raises(UnknownOutcomeError, match="may be gone after a power loss"):
        storage.publish(staging, NAME, b"manifest")
    assert storage.read_bytes(f"{NAME}/manifest.json", limit=10) == b"manifest"


def test_a_rename_whose_source_is_gone_is_judged_by_the_content(tmp_path: Path):
    """A server that got the request twice says ENOENT to the second one; another's checkpoint is not taken for ours."""
    posix = Patched()
    storage = LocalStorage(tmp_path, posix)
    mine, theirs = stage(storage), stage(storage, "b" * 32)

    def rename(source: str, target: str) -> None:
        Posix.rename(posix, storage.locate(theirs), target)
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))

    posix.rename = rename  # type: ignore[method-assign]

    with pytest.raises(StorageMissingError):
        storage.publish(mine, NAME, b"another manifest")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOSPC, StorageFullError),
        (errno.EDQUOT, StorageFullError),
        (errno.EFBIG, StorageFullError),
        (errno.EROFS, StorageReadOnlyError),
        (errno.EACCES, StorageReadOnlyError),
        (errno.EPERM, StorageReadOnlyError),
        (errno.ENOENT, StorageMissingError),
        (errno.ENOTDIR, StorageMissingError),
        (errno.ESTALE, StorageMissingError),
        (errno.EEXIST, KeyExistsError),
        (errno.ENOTEMPTY, KeyExistsError),
        (errno.EINTR, TransientStorageError),
        (errno.ETIMEDOUT, TransientStorageError),
        (errno.EAGAIN, TransientStorageError),
        (errno.EIO, StorageError),
    ],
)
def test_each_errno_becomes_the_error_that_says_what_to_do(code: int, kind: type[StorageError]):
    error = storage_error(OSError(code, os.strerror(code)), "fsync", "/run/file")

    assert type(error) is kind
    assert (error.key, error.code) == ("/run/file", code)
    assert "fsync /run/file" in str(error)
    assert errno.errorcode[code] in str(error)
    assert "\n" not in str(error)
