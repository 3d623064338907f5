"""The one place with file-system calls. A test records, fails or delays them by giving another `Posix`."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from dckpt.errors import (
    KeyExistsError,
    StorageError,
    StorageFullError,
    StorageMissingError,
    StorageReadOnlyError,
    TransientStorageError,
)

READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""For files of a checkpoint: a symbolic link is refused, and a FIFO put there does not block the open."""

DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC

SCATTER_MAX = 1024
"""Pieces of memory that one `preadv` takes: Linux's IOV_MAX."""

DIRECT_WRITE_FLAGS = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC

CREATE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Posix:
    """One method a system call; no policy. Paths are absolute unless a directory descriptor is given."""

    def open(self, path: str, flags: int, *, dir_fd: int | None = None) -> int:
        return os.open(path, flags, 0o666, dir_fd=dir_fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def pread_into(self, fd: int, target: memoryview, offset: int) -> int:
        return os.preadv(fd, [target], offset)

    def preadv(self, fd: int, targets: Sequence[memoryview], offset: int, *, flags: int = 0) -> int:
        return os.preadv(fd, targets, offset, flags)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def ftruncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def forget_cached(self, fd: int) -> None:
        """Asks the kernel to drop the file's clean pages; advice, so a file system may ignore it."""
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def fstat(self, fd: int) -> os.stat_result:
        return os.fstat(fd)

    def stat(self, path: str, *, follow_symlinks: bool = False) -> os.stat_result:
        return os.stat(path, follow_symlinks=follow_symlinks)

    def access(self, path: str, mode: int) -> bool:
        return os.access(path, mode)

    def statvfs(self, path: str) -> os.statvfs_result:
        return os.statvfs(path)

    def file_system(self, path: str) -> str | None:
        """Type of the file system that holds `path` ("ext4", "tmpfs"); None where the system does not tell."""
        device = os.stat(path).st_dev
        wanted = f"{os.major(device)}:{os.minor(device)}"
        try:
            with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
                rows = [line.split() for line in mounts]
        except OSError:
            return None
        return next((row[row.index("-") + 1] for row in rows if row[2] == wanted), None)

    def scandir(self, path: str | int) -> Sequence[os.DirEntry[str]]:
        with os.scandir(path) as entries:
            return list(entries)

    def mkdir(self, path: str) -> None:
        os.mkdir(path)

    def rename(self, source: str, target: str) -> None:
        os.rename(source, target)

    def link(self, source: str, target: str) -> None:
        os.link(source, target, follow_symlinks=False)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def rmdir(self, path: str) -> None:
        os.rmdir(path)


_FULL = "Free space (or quota, or inodes) there; the previous checkpoint stands."
_READ_ONLY = "Check the mount and the permissions; the previous checkpoint stands."
_TAKEN = "Choose another name, or remove what is there."
_MISSING = "It was deleted, never written, or the storage is not mounted."
_TRANSIENT = "The storage did not answer in time; try again."
_OTHER = "Check the storage and the kernel log; after an I/O error the file must not be trusted."

_KINDS: dict[int, tuple[type[StorageError], str]] = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), (StorageFullError, _FULL)),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), (StorageReadOnlyError, _READ_ONLY)),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.ESTALE), (StorageMissingError, _MISSING)),
    **dict.fromkeys((errno.EEXIST, errno.ENOTEMPTY), (KeyExistsError, _TAKEN)),
    **dict.fromkeys((errno.EINTR, errno.ETIMEDOUT, errno.EAGAIN), (TransientStorageError, _TRANSIENT)),
}


def storage_error(error: OSError, operation: str, path: str) -> StorageError:
    """The typed form of `error`, one sentence with the operation, the place and the remedy."""
    kind, remedy = _KINDS.get(error.errno or 0, (StorageError, _OTHER))
    name = errno.errorcode.get(error.errno or 0, "unknown error")
    reason = error.strerror or str(error)
    return kind(f"{operation} {path}: {reason} ({name}). {remedy}", key=path, code=error.errno)


@contextlib.contextmanager
def translated(operation: str, path: str) -> Iterator[None]:
    """Turns an `OSError` of the system into the typed error for `operation` on `path`."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise storage_error(error, operation, path) from error


_TRANSIENT_ERRNOS = frozenset((errno.EINTR, errno.ETIMEDOUT, errno.EAGAIN))
_READ_TRIES = 3

T = TypeVar("T")


def read_again(call: Callable[[], T]) -> T:
    """The result of `call`, a read, which is repeated a few times if it fails in a way that may pass.

    Only reads: a write or an fsync that failed is never repeated. There is no pause, because the kernel has
    already waited for its own time-out when it says ETIMEDOUT.
    """
    for _ in range(_READ_TRIES - 1):
        try:
            return call()
        except OSError as error:
            if error.errno not in _TRANSIENT_ERRNOS:
                raise
    return call()
