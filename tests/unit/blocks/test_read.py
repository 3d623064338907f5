"""A verified file: bytes arrive right wherever they land, cached or not, and a block that differs is never left in place."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from dckpt.blocks.read import AROUND_BYTES_MIN, PIECE_BYTES, ByteTally, ReadMemory, VerifiedFile
from dckpt.blocks.scatter import Landing
from dckpt.errors import CorruptCheckpointError
from dckpt.format.checksum import BLOCK_BYTES, FileHasher, Sums, digest_bytes, encode_sums
from dckpt.format.manifest import FileEntry
from dckpt.storage.local import LocalStorage
from dckpt.storage.posix import Posix

BLOCKS = 90
DATA = np.random.default_rng(1).integers(0, 256, BLOCKS * BLOCK_BYTES + 3000, dtype=np.uint8).tobytes()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "step/attempt").mkdir(parents=True)
    hasher = FileHasher()
    hasher.update(DATA)
    sums = encode_sums(Sums(len(DATA), hasher.digest(), hasher.checksums()))
    (tmp_path / "step/attempt/rank00000.sums").write_bytes(sums)
    with (tmp_path / "step/attempt/rank00000.safetensors").open("wb") as out:
        out.write(DATA)
        out.flush()
        os.fsync(out.fileno())
    return tmp_path


def shard(place: Path) -> Path:
    return place / "step/attempt/rank00000.safetensors"


def opened(place: Path, posix: Posix | None = None, tally: ByteTally | None = None) -> VerifiedFile:
    hasher = FileHasher()
    hasher.update(DATA)
    sums = shard(place).with_suffix(".sums").read_bytes()
    return VerifiedFile(
        LocalStorage(place, posix),
        "step",
        FileEntry("attempt/rank00000.safetensors", len(DATA), hasher.digest(), "shard", 0),
        FileEntry("attempt/rank00000.sums", len(sums), digest_bytes(sums), "sums", 0),
        tally,
    )


def forget(place: Path) -> None:
    fd = os.open(shard(place), os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def forget_half(place: Path) -> None:
    shard(place).read_bytes()
    fd = os.open(shard(place), os.O_RDONLY)
    os.posix_fadvise(fd, 2**20, 2**20, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def warm(place: Path) -> None:
    shard(place).read_bytes()


class Refusing(Posix):
    """A file system without reads that do not wait, or without direct ones."""

    def __init__(self, refused: str) -> None:
        self.refused = refused

    def open(self, path: str, flags: int, *, dir_fd: int | None = None) -> int:
        if self.refused == "direct" and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct I/O")
        return super().open(path, flags, dir_fd=dir_fd)

    def preadv(self, fd: int, targets: Sequence[memoryview], offset: int, *, flags: int = 0) -> int:
        if self.refused == "nowait" and flags:
            raise OSError(errno.EOPNOTSUPP, "no such flag")
        return super().preadv(fd, targets, offset, flags=flags)


@pytest.mark.parametrize("refused", ["nothing", "nowait", "direct"])
@pytest.mark.parametrize("prepare", [warm, forget, forget_half])
@pytest.mark.parametrize(("first", "stop"), [(0, BLOCKS + 1), (3, 5), (1, 41), (BLOCKS, BLOCKS + 1)])
def test_a_span_arrives_right_in_its_landings_and_its_memory(
    place: Path, refused: str, prepare: Callable[[Path], None], first: int, stop: int
):
    begin, end = first * BLOCK_BYTES, min(stop * BLOCK_BYTES, len(DATA))
    cuts = np.linspace(begin + 100, end - 100, 6).astype(int).tolist()
    landings = [Landing(a, memoryview(bytearray(b - a))) for a, b in zip(cuts[::2], cuts[1::2], strict=True)]
    tally = ByteTally()
    with opened(place, Refusing(refused), tally) as file:
        before = tally.total
        prepare(place)
        memory = ReadMemory().take((stop - first) * BLOCK_BYTES)
        file.read_span(first, stop, memory, landings)

        assert tally.total - before == end - begin
        assert np.flatnonzero(~file.unread_blocks).tolist() == list(range(first, stop))
    for landing in landings:
        assert landing.memory == DATA[landing.begin : landing.end]
    edges = [begin, *cuts, end]
    for a, b in zip(edges[::2], edges[1::2], strict=True):
        assert memory[a - begin : b - begin] == DATA[a:b]


@pytest.mark.parametrize(("begin", "end"), [(0, 1), (65_535, 65_537), (70_000, 70_000), (10, len(DATA))])
def test_any_range_is_read_into_kept_or_new_memory(place: Path, begin: int, end: int):
    kept = ReadMemory()
    with opened(place) as file:
        assert file.read(begin, end) == DATA[begin:end]
        assert file.read(begin, end, kept) == DATA[begin:end]


class Flipping(Posix):
    """Flips a bit in what comes out of the page cache, in the middle of the `at`-th read of a shard file."""

    def __init__(self, at: int) -> None:
        self.at, self.seen, self._shards = at, 0, set[int]()

    def open(self, path: str, flags: int, *, dir_fd: int | None = None) -> int:
        fd = super().open(path, flags, dir_fd=dir_fd)
        if path.endswith(".safetensors") and not flags & os.O_DIRECT:
            self._shards.add(fd)
        return fd

    def pread_into(self, fd: int, target: memoryview, offset: int) -> int:
        return self._flip(fd, [target], super().pread_into(fd, target, offset))

    def preadv(self, fd: int, targets: Sequence[memoryview], offset: int, *, flags: int = 0) -> int:
        return self._flip(fd, targets, super().preadv(fd, targets, offset, flags=flags))

    def _flip(self, fd: int, targets: Sequence[memoryview], count: int) -> int:
        self.seen += fd in self._shards
        if fd in self._shards and self.seen == self.at and count:
            middle = targets[len(targets) // 2]
            middle[len(middle) // 2] ^= 1
        return count


def test_a_flipped_bit_on_the_way_is_mended_in_place_and_told(place: Path, caplog: pytest.LogCaptureFixture):
    warm(place)
    landing = Landing(BLOCK_BYTES + 10, memoryview(bytearray(2 * PIECE_BYTES)))
    posix = Flipping(at=3)
    with opened(place, posix) as file, caplog.at_level(logging.WARNING, logger="dckpt"):
        file.read_span(0, BLOCKS, ReadMemory().take(BLOCKS * BLOCK_BYTES), [landing])

    assert posix.seen >= 3
    assert landing.memory == DATA[landing.begin : landing.end]
    (record,) = caplog.records
    assert "memory or the page cache was not" in record.getMessage()


@pytest.mark.parametrize("prepare", [warm, forget])
def test_a_damaged_byte_names_its_block_and_leaves_no_landing_trusted(place: Path, prepare: Callable[[Path], None]):
    with shard(place).open("r+b") as out:
        out.seek(20 * BLOCK_BYTES + 5)
        out.write(bytes([DATA[20 * BLOCK_BYTES + 5] ^ 4]))
        out.flush()
        os.fsync(out.fileno())
    with opened(place) as file:
        prepare(place)
        with pytest.raises(CorruptCheckpointError, match="bytes 1,310,720-1,376,256") as caught:
            file.read_span(0, BLOCKS, ReadMemory().take(BLOCKS * BLOCK_BYTES))
        assert file.unread_blocks[20]
    assert caught.value.field == "bytes 1310720-1376256"


def test_what_is_not_cached_comes_in_one_request_around_the_cache(place: Path):
    requests: list[tuple[str, int]] = []

    class Watched(Posix):
        def pread_into(self, fd: int, target: memoryview, offset: int) -> int:
            requests.append(("one", len(target)))
            return super().pread_into(fd, target, offset)

        def preadv(self, fd: int, targets: Sequence[memoryview], offset: int, *, flags: int = 0) -> int:
            requests.append(("nowait" if flags else "many", sum(map(len, targets))))
            return super().preadv(fd, targets, offset, flags=flags)

    with opened(place, Watched()) as file:
        warm(place)
        is_told = file._reader.read_cached(0, [memoryview(bytearray(1))])
        forget(place)
        if not is_told or file._reader.read_cached(0, [memoryview(bytearray(1))]):
            pytest.skip("this file system does not tell what is cached, or does not drop pages")
        # Far behind the place that was just asked for: that made the kernel read ahead.
        first, size = 40, 2 * AROUND_BYTES_MIN
        requests.clear()
        file.read_span(first, first + size // BLOCK_BYTES, ReadMemory().take(size))

    assert requests == [("nowait", 4096), ("one", size)]
