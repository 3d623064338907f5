"""Reads from the page cache that never wait, reads around it, and plain ones where a file system refuses either."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from dckpt.errors import CorruptCheckpointError, StorageError
from dckpt.storage.base import DIRECT_ALIGNMENT
from dckpt.storage.local import DIRECT_FILE_BYTES_MIN, LocalStorage
from dckpt.storage.local_file import LocalReader
from dckpt.storage.posix import SCATTER_MAX, Posix

DATA = os.urandom(DIRECT_FILE_BYTES_MIN + 12_345)  # its end is no multiple of anything


class Watched(Posix):
    """Counts reads that must not wait and direct reads; refuses them with an errno where told."""

    def __init__(self, nowait: int = 0, direct_open: int = 0, direct_read: int = 0) -> None:
        self.nowait, self.direct_open, self.direct_read = nowait, direct_open, direct_read
        self.num_nowait = self.num_direct = 0
        self._direct: set[int] = set()

    def open(self, path: str, flags: int, *, dir_fd: int | None = None) -> int:
        if flags & os.O_DIRECT and self.direct_open:
            raise OSError(self.direct_open, os.strerror(self.direct_open))
        fd = super().open(path, flags, dir_fd=dir_fd)
        if flags & os.O_DIRECT:
            self._direct.add(fd)
        return fd

    def close(self, fd: int) -> None:
        self._direct.discard(fd)
        super().close(fd)

    def pread_into(self, fd: int, target: memoryview, offset: int) -> int:
        if fd in self._direct:
            self.num_direct += 1
            if self.direct_read:
                raise OSError(self.direct_read, os.strerror(self.direct_read))
        return super().pread_into(fd, target, offset)

    def preadv(self, fd: int, targets: Sequence[memoryview], offset: int, *, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT:
            self.num_nowait += 1
            if self.nowait:
                raise OSError(self.nowait, os.strerror(self.nowait))
        return super().preadv(fd, targets, offset, flags=flags)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    with path.open("wb") as out:
        out.write(DATA)
        out.flush()
        os.fsync(out.fileno())
    return path


def forget(path: Path, begin: int = 0, size: int = 0) -> None:
    """Drops a range from the page cache; pages that the kernel still holds for a moment, once it has let go of them."""
    fd = os.open(path, os.O_RDONLY)
    try:
        for _ in range(200):
            os.posix_fadvise(fd, begin, size, os.POSIX_FADV_DONTNEED)
            if not cached_pages(fd, begin, size):
                return
            time.sleep(0.01)
    finally:
        os.close(fd)


def cached_pages(fd: int, begin: int, size: int) -> int:
    """How many pages of the range are in the page cache, asked without touching them (mincore)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    size = size or os.fstat(fd).st_size - begin
    address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, begin)
    assert address != ctypes.c_void_p(-1).value, os.strerror(ctypes.get_errno())
    found = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    try:
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), found) == 0
    finally:
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    return sum(page & 1 for page in found)


@pytest.fixture
def reader(file: Path) -> Iterator[LocalReader]:
    """Of a file system that has both; others are what the refusals below stand for."""
    posix = Watched()
    with LocalStorage(file.parent, posix).open_reader("file") as opened:
        forget(file)
        probe = memoryview(bytearray(10))
        if opened.read_cached(0, [probe]) or not opened.read_around(0, 10, pages(DIRECT_ALIGNMENT)):
            pytest.skip("this file system does not drop pages, or has no direct reads")
        yield opened


def pages(size: int) -> memoryview:
    return memoryview(mmap.mmap(-1, size))


def test_what_is_cached_is_scattered_over_more_targets_than_one_call_takes(file: Path, reader: LocalReader):
    file.read_bytes()
    targets = [memoryview(bytearray(1 + number % 3)) for number in range(2 * SCATTER_MAX + 7)]

    assert reader.read_cached(5, targets)

    assert b"".join(targets) == DATA[5 : 5 + sum(map(len, targets))]


def test_what_is_cached_in_part_is_not_cached(file: Path, reader: LocalReader):
    file.read_bytes()
    forget(file, 2**20, 2**20)

    assert reader.read_cached(0, [memoryview(bytearray(2**20))])
    assert not reader.read_cached(0, [memoryview(bytearray(2**20)), memoryview(bytearray(2**20))])


@pytest.mark.parametrize("size", [1, DIRECT_ALIGNMENT, 100_001])
def test_a_read_around_the_cache_gives_the_bytes_also_at_the_end_and_leaves_none_in_the_cache(
    reader: LocalReader, size: int
):
    memory = pages(mmap.PAGESIZE * 30)
    begin = (len(DATA) - size) // DIRECT_ALIGNMENT * DIRECT_ALIGNMENT

    for offset, count in [(0, size), (begin, len(DATA) - begin)]:
        assert reader.read_around(offset, count, memory)
        assert memory[:count] == DATA[offset : offset + count]

    assert not reader.read_cached(begin, [memoryview(bytearray(1))])


def test_a_read_around_the_cache_needs_aligned_memory_with_room(reader: LocalReader):
    memory = pages(4 * mmap.PAGESIZE)

    assert not reader.read_around(0, 5000, memory[1:])
    assert not reader.read_around(0, 5000, memory[:5000])
    assert not reader.read_around(1, 5000, memory)


def test_a_file_that_was_cut_short_is_corrupt_and_not_an_endless_read(file: Path, reader: LocalReader):
    os.truncate(file, 2**20 + 77)

    for size in (2**20 + 78, 2 * 2**20):
        with pytest.raises(CorruptCheckpointError, match=f"expected at least {size:,} bytes, found 1,048,653"):
            reader.read_around(0, size, pages(2 * 2**20))


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("what", ["nowait", "direct_open", "direct_read"])
def test_a_file_system_that_refuses_is_asked_once_and_read_plainly(file: Path, what: str, code: int):
    posix = Watched(**{what: code})
    targets = [memoryview(bytearray(100)), memoryview(bytearray(200))]
    with LocalStorage(file.parent, posix).open_reader("file") as reader:
        for _ in range(3):
            if what != "direct_read":
                assert not reader.read_cached(0, targets)
            assert not reader.read_around(0, 5000, pages(8192))
            reader.read_scattered(7, targets)

    assert b"".join(targets) == DATA[7:307]
    assert posix.num_nowait == (what == "nowait")
    assert posix.num_direct == (what == "direct_read")


def test_an_error_of_a_direct_read_is_no_refusal(file: Path):
    posix = Watched(direct_read=errno.EIO)
    with LocalStorage(file.parent, posix).open_reader("file") as reader:
        if posix._direct:
            with pytest.raises(StorageError, match=r"read directly at byte 4,096 of .*Input/output error"):
                reader.read_around(4096, 100, pages(4096))


def test_a_small_file_is_left_to_the_page_cache(tmp_path: Path):
    (tmp_path / "small").write_bytes(b"x" * (DIRECT_FILE_BYTES_MIN - 1))
    posix = Watched()
    with LocalStorage(tmp_path, posix).open_reader("small") as reader:
        assert not posix._direct
        assert not reader.read_around(0, 100, pages(4096))


def test_scattered_reads_go_on_after_short_ones(file: Path):
    class Short(Posix):
        def pread_into(self, fd: int, target: memoryview, offset: int) -> int:
            return super().pread_into(fd, target[:3], offset)

        def preadv(self, fd: int, targets: Sequence[memoryview], offset: int, *, flags: int = 0) -> int:
            return super().preadv(fd, [targets[0], targets[1][:1]], offset, flags=flags)

    targets = [memoryview(bytearray(size)) for size in (5, 0, 2, 9, 1)]
    with LocalStorage(file.parent, Short()).open_reader("file") as reader:
        reader.read_scattered(11, targets)

    assert b"".join(targets) == DATA[11:28]
