"""The hardware's limits by our own hand: aligned O_DIRECT writes and reads, buffered ones where that is the medium, copies.

Each rank moves its own file of as many bytes as its part of the state, `IN_FLIGHT` blocks at a time. Its memory is touched
beforehand: first touch is many times slower than a copy, and a contender that reuses its memory does not pay for it either.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

import numpy as np

BLOCK_BYTES = 8 << 20
ALIGNMENT = 4096
IN_FLIGHT = 4


class RawFile(AbstractContextManager["RawFile"]):
    """One rank's file of `size` bytes (rounded up to whole pages) and the memory that it is written from and read into."""

    def __init__(self, path: Path, size: int, *, is_direct: bool) -> None:
        self.path = path
        self.size = -(-size // ALIGNMENT) * ALIGNMENT
        self._flags = os.O_DIRECT if is_direct else 0
        self._memory = mmap.mmap(-1, self.size)  # page-aligned, as O_DIRECT asks
        words = np.frombuffer(self._memory, dtype=np.uint64)
        words[:] = np.arange(len(words), dtype=np.uint64) * np.uint64(
            0x9E3779B97F4A7C15
        )  # not compressible, and touched
        self._pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="raw")

    def write(self) -> None:
        """A new file, written and fsynced."""
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | self._flags, 0o644)
        try:
            self._blocks(lambda view, offset: os.pwrite(fd, view, offset))
            os.fsync(fd)
        finally:
            os.close(fd)

    def read(self, *, is_direct: bool) -> None:
        """The whole file, into memory."""
        fd = os.open(self.path, os.O_RDONLY | (os.O_DIRECT if is_direct else 0))
        try:
            self._blocks(lambda view, offset: os.preadv(fd, [view], offset))
        finally:
            os.close(fd)

    def _blocks(self, move: Callable[[memoryview, int], int]) -> None:
        with memoryview(self._memory) as memory:
            list(self._pool.map(lambda offset: _whole(move, memory, offset), range(0, self.size, BLOCK_BYTES)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()


def _whole(move: Callable[[memoryview, int], int], memory: memoryview, offset: int) -> None:
    end = min(offset + BLOCK_BYTES, len(memory))
    while offset < end:
        moved = move(memory[offset:end], offset)
        if moved <= 0:
            raise OSError(f"a block at {offset} moved {moved} bytes")
        offset += moved


def takes_direct(directory: Path) -> bool:
    """Whether this file system opens and writes files with O_DIRECT."""
    path = directory / f".probe-{os.getpid()}"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
    except OSError:
        return False
    try:
        with mmap.mmap(-1, ALIGNMENT) as page:
            os.pwrite(fd, page, 0)
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(fd)
        path.unlink()
