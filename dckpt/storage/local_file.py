"""Reading and writing one file of a local or mounted file system."""

from __future__ import annotations

import errno
import logging
import mmap
import os
from collections.abc import Sequence
from types import TracebackType

from dckpt.errors import CorruptCheckpointError, StorageError
from dckpt.storage.base import DIRECT_ALIGNMENT
from dckpt.storage.posix import (
    CREATE_FLAGS,
    DIRECT_WRITE_FLAGS,
    SCATTER_MAX,
    Posix,
    read_again,
    storage_error,
    translated,
)

logger = logging.getLogger(__name__)

_BOUNCE_BYTES = 4 * 2**20

# How file systems say that they have no direct reads, or cannot tell what is cached: at the open, or at the first read.
_REFUSALS = frozenset((errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS))


class LocalWriter:
    """A `FileWriter`. One failed call condemns the file: nothing is retried, `finish` is refused then.

    A large file has a second descriptor with O_DIRECT, for whole, aligned blocks in aligned memory: their bytes go to
    the device without a copy in the page cache, which fsync would have to wait for. What is not aligned (the tail), and
    everything once a file system says EINVAL, goes through the plain descriptor. One fsync covers both: it is the file's.
    """

    def __init__(self, posix: Posix, path: str, *, is_large: bool = False) -> None:
        self._posix = posix
        self._path = path
        self._is_condemned = False
        self._direct_fd: int | None = None
        with translated("create", path):
            self._fd: int | None = posix.open(path, CREATE_FLAGS)
        if is_large:
            try:
                self._direct_fd = open_direct(posix, path, DIRECT_WRITE_FLAGS, None)
            except OSError as error:
                self.abandon()
                raise storage_error(error, "open for direct writes", path) from error

    @property
    def wants_aligned(self) -> bool:
        return self._direct_fd is not None

    def write_at(self, offset: int, data: memoryview) -> None:
        fd = self._usable_fd()
        rest = _as_bytes(data)
        try:
            done = self._write_direct(offset, rest)
            rest, offset = rest[done:], offset + done
            while rest:
                written = self._posix.pwrite(fd, rest, offset)
                if written == 0:
                    raise OSError(errno.EIO, "the system wrote 0 bytes")
                rest = rest[written:]
                offset += written
        except OSError as error:
            self._is_condemned = True
            raise storage_error(error, f"write at byte {offset:,} of", self._path) from error

    def _write_direct(self, offset: int, data: memoryview) -> int:
        """Writes the aligned beginning of `data` around the page cache; returns how many bytes that was."""
        done = 0
        while self._direct_fd is not None:
            whole = (len(data) - done) // DIRECT_ALIGNMENT * DIRECT_ALIGNMENT
            if not whole or (offset + done) % DIRECT_ALIGNMENT or not _is_aligned(data[done:]):
                break
            try:
                written = self._posix.pwrite(self._direct_fd, data[done : done + whole], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                # Some file systems take the open and refuse the write; the plain descriptor does all of it then.
                break
            if written == 0:
                raise OSError(errno.EIO, "the system wrote 0 bytes")
            done += written
        return done

    def finish(self, size: int) -> None:
        fd = self._usable_fd()
        self._is_condemned = True
        try:
            with translated("finish", self._path):
                found = self._posix.fstat(fd).st_size
                if found < size:
                    raise StorageError(
                        f"Write {self._path}: expected {size:,} bytes, found {found:,}. Part of the file "
                        "was never written; this attempt is given up.",
                        key=self._path,
                    )
                if found > size:
                    # Direct writes are whole blocks: the padding behind the last byte goes.
                    self._posix.ftruncate(fd, size)
            with translated("fsync", self._path):
                # Once, on the descriptor that wrote. After a failure the kernel may mark the pages clean, and
                # a second fsync would say yes to data that is nowhere.
                self._posix.fsync(fd)
        except StorageError:
            self.abandon()
            raise
        direct_fd, self._direct_fd, self._fd = self._direct_fd, None, None
        with translated("close", self._path):
            try:
                if direct_fd is not None:
                    self._posix.close(direct_fd)
            finally:
                self._posix.close(fd)

    def abandon(self) -> None:
        fds = [fd for fd in (self._direct_fd, self._fd) if fd is not None]
        self._fd = self._direct_fd = None
        for fd in fds:
            try:
                self._posix.close(fd)
            except OSError as error:
                # The file is given up and will be deleted with its attempt, so the error changes nothing.
                logger.warning("close abandoned %s: %s", self._path, error)

    def _usable_fd(self) -> int:
        if self._fd is None or self._is_condemned:
            raise StorageError(
                f"Write {self._path}: the file is closed, or an earlier write or fsync failed. It is never "
                "retried: start a new attempt.",
                key=self._path,
            )
        return self._fd


class LocalReader:
    """A `RangeReader`. `direct_fd` is a second descriptor of the file, with O_DIRECT, where the file system has such.

    With `uncached` every read goes around the page cache where it can; else only `read_around` does.
    """

    def __init__(
        self, posix: Posix, path: str, fd: int, *, uncached: bool = False, direct_fd: int | None = None
    ) -> None:
        self._posix = posix
        self._path = path
        self._fd: int | None = fd
        self._is_uncached = uncached
        self._direct_fd = direct_fd
        self._can_read_direct = direct_fd is not None
        self._can_see_cache = not uncached
        with translated("stat", path):
            self.size = posix.fstat(fd).st_size

    def read_into(self, offset: int, target: memoryview) -> None:
        view = _as_bytes(target)
        if self._is_uncached and self._can_read_direct and self._read_bounced(offset, view):
            return
        self.read_scattered(offset, [view])

    def read_scattered(self, offset: int, targets: Sequence[memoryview]) -> None:
        fd = self._open_fd()
        if self._is_uncached:
            with translated("drop the cache of", self._path):
                self._posix.forget_cached(fd)
        rest = [view for target in targets if (view := _as_bytes(target))]
        position, end = offset, offset + sum(map(len, rest))
        while rest:
            with translated(f"read at byte {position:,} of", self._path):
                count = read_again(lambda: self._read_some(fd, rest, position))  # noqa: B023 (called here)
            if count == 0:
                self._raise_short(end, position)
            position += count
            rest = _behind(rest, count)

    def _read_some(self, fd: int, targets: list[memoryview], offset: int) -> int:
        if len(targets) == 1:
            return self._posix.pread_into(fd, targets[0], offset)
        return self._posix.preadv(fd, targets[:SCATTER_MAX], offset)

    def read_cached(self, offset: int, targets: Sequence[memoryview]) -> bool:
        fd = self._open_fd()
        if not (self._can_read_direct and self._can_see_cache):
            return False
        for at in range(0, len(targets), SCATTER_MAX):
            batch = targets[at : at + SCATTER_MAX]
            size = sum(map(len, batch))
            try:
                count = self._posix.preadv(fd, batch, offset, flags=os.RWF_NOWAIT)
            except OSError as error:
                if error.errno in _REFUSALS:
                    self._can_see_cache = False
                # Any other error shows again in the read that follows, which waits and reports it.
                return False
            if count < size:
                return False
            offset += size
        return True

    def read_around(self, offset: int, size: int, memory: memoryview) -> bool:
        fd, window, done = self._direct_fd, memory[: _round_up(size)], 0
        if fd is None or not (self._can_read_direct and self._can_see_cache):
            return False
        if offset % DIRECT_ALIGNMENT or len(window) % DIRECT_ALIGNMENT or not _is_aligned(window):
            return False
        while done < size:
            try:
                count = read_again(lambda: self._posix.pread_into(fd, window[done:], offset + done))  # noqa: B023 (called here)
            except OSError as error:
                if error.errno in _REFUSALS:
                    self._can_read_direct = False
                    return False
                raise storage_error(error, f"read directly at byte {offset + done:,} of", self._path) from error
            done += count
            if done < size and (count == 0 or done % DIRECT_ALIGNMENT):
                # A count that is no whole block is the end of the file.
                self._raise_short(offset + size, offset + done)
        return True

    def close(self) -> None:
        fds = [fd for fd in (self._fd, self._direct_fd) if fd is not None]
        self._fd = self._direct_fd = None
        self._can_read_direct = False
        for fd in fds:
            with translated("close", self._path):
                self._posix.close(fd)

    def __enter__(self) -> LocalReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_fd(self) -> int:
        if self._fd is None:
            raise StorageError(f"Read {self._path}: the reader is closed.", key=self._path)
        return self._fd

    def _read_bounced(self, offset: int, view: memoryview) -> bool:
        """Reads any range into any memory around the page cache; False if the file system refuses after all."""
        assert self._direct_fd is not None, "checked by the caller"
        # Anonymous shared pages: private ones that a fork copies while the device writes into them would be
        # torn.
        with mmap.mmap(-1, min(_BOUNCE_BYTES, _round_up(len(view) + DIRECT_ALIGNMENT))) as buffer:
            position, end = offset, offset + len(view)
            while position < end:
                begin = position - position % DIRECT_ALIGNMENT
                with memoryview(buffer) as whole, whole[: min(len(buffer), _round_up(end - begin))] as window:
                    try:
                        count = self._posix.pread_into(self._direct_fd, window, begin)
                    except OSError as error:
                        if error.errno in _REFUSALS:
                            self._can_read_direct = False
                            return False
                        raise storage_error(error, f"read directly at byte {begin:,} of", self._path) from error
                    useful_end = min(begin + count, end)
                    if useful_end <= position:
                        self._raise_short(end, begin + count)
                    view[position - offset : useful_end - offset] = window[position - begin : useful_end - begin]
                    position = useful_end
        return True

    def _raise_short(self, expected: int, found: int) -> None:
        raise CorruptCheckpointError(
            f"{self._path}: expected at least {expected:,} bytes, found {found:,}. The file was cut short; "
            "load an older step, and run `dckpt verify` to see the damage.",
            key=self._path,
            field="size",
            expected=expected,
            found=found,
        )


def _round_up(size: int) -> int:
    return -(-size // DIRECT_ALIGNMENT) * DIRECT_ALIGNMENT


def _as_bytes(target: memoryview) -> memoryview:
    return target if target.format == "B" and target.ndim == 1 else target.cast("B")


def _behind(targets: list[memoryview], count: int) -> list[memoryview]:
    """What is left of `targets` when their first `count` bytes are filled."""
    place = 0
    while place < len(targets) and count >= len(targets[place]):
        count -= len(targets[place])
        place += 1
    rest = targets[place:]
    if count:
        rest[0] = rest[0][count:]
    return rest


def _is_aligned(data: memoryview) -> bool:
    """Whether the memory itself begins at a block; read-only memory does not tell its address and counts as not."""
    # Imported here: commands that only list checkpoints write nothing.
    import ctypes

    return not data.readonly and ctypes.addressof(ctypes.c_char.from_buffer(data)) % DIRECT_ALIGNMENT == 0


def open_direct(posix: Posix, name: str, flags: int, dir_fd: int | None) -> int | None:
    """A descriptor for transfers around the page cache, or None where the file system has none."""
    try:
        return posix.open(name, flags | os.O_DIRECT, dir_fd=dir_fd)
    except OSError as error:
        if error.errno in _REFUSALS:
            return None
        raise
