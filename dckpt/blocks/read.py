"""Reads byte ranges of a shard file; no byte is used before its block's checksum matched.

Where the bytes go straight into live memory (`VerifiedFile.read_span`), unverified ones are there for a moment: a block that
does not match is read again, uncached, and repaired in place, or the read raises. Whoever gives live memory away for that must
not use it after such an error; a load marks its state as poisoned until another load succeeds.
"""

from __future__ import annotations

import logging
import mmap
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from dckpt.blocks.buffer import whole_pages
from dckpt.blocks.scatter import Landing, Scatter, checksums_of, overwrite
from dckpt.errors import CorruptCheckpointError, StorageMissingError
from dckpt.format.checksum import BLOCK_BYTES, Sums, block_checksums, digest_bytes, parse_sums
from dckpt.format.manifest import FileEntry

if TYPE_CHECKING:
    from types import TracebackType

    from dckpt.storage.base import Storage

log = logging.getLogger(__name__)

PIECE_BYTES = 512 * 1024
"""Read, then checksummed while it is still in the processor's cache; whole blocks."""

PROBE_BYTES = 4096
"""Asked of the page cache before a span is: enough to see whether it was read or written lately."""

AROUND_BYTES_MIN = 2**20
"""Less than this that is not cached is left to the kernel's own reads; whole blocks."""


class ByteTally:
    """Counts bytes from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.total = 0

    def add(self, count: int) -> None:
        """`count` more bytes."""
        with self._lock:
            self.total += count


def read_checked(storage: Storage, checkpoint: str, entry: FileEntry, *, tally: ByteTally | None = None) -> bytes:
    """The whole of a small file of the checkpoint (index, sums); its size and digest match the manifest's entry."""
    key = entry.key_in(checkpoint)
    tally = tally or ByteTally()
    data = _read_whole(storage, checkpoint, entry, tally)
    found = digest_bytes(data)
    if found != entry.digest:
        data = _read_whole(storage, checkpoint, entry, tally, uncached=True)
        found = digest_bytes(data)
    if found != entry.digest:
        raise CorruptCheckpointError(
            f"{storage.locate(key)}: expected digest {entry.digest}, found {found}. The file is damaged; "
            "use an older step, or run `dckpt verify` to see the rest.",
            key=key,
            field="digest",
            expected=entry.digest,
            found=found,
        )
    return data


def _read_whole(
    storage: Storage, checkpoint: str, entry: FileEntry, tally: ByteTally, *, uncached: bool = False
) -> bytes:
    ensure_size(storage, checkpoint, entry)
    data = bytearray(entry.size)
    with storage.open_reader(entry.key_in(checkpoint), uncached=uncached) as reader:
        reader.read_into(0, memoryview(data))
    tally.add(entry.size)
    return bytes(data)


def ensure_size(storage: Storage, checkpoint: str, entry: FileEntry) -> None:
    """Raises `CorruptCheckpointError` unless the file of `checkpoint` is there and as long as the manifest says."""
    key = entry.key_in(checkpoint)
    what = (
        f"a file of {checkpoint} with {entry.size:,} bytes" if entry.checkpoint else f"a file of {entry.size:,} bytes"
    )
    try:
        found = storage.size(key)
    except StorageMissingError as error:
        raise CorruptCheckpointError(
            f"{storage.locate(key)}: expected {what}, found none. The checkpoint is incomplete; use an older step.",
            key=key,
            field="size",
            expected=entry.size,
            found=None,
        ) from error
    if found != entry.size:
        raise CorruptCheckpointError(
            f"{storage.locate(key)}: expected {what}, found {found:,}. The file was cut short or replaced; use an older "
            "step.",
            key=key,
            field="size",
            expected=entry.size,
            found=found,
        )


class Memory(Protocol):
    """Where a read goes."""

    def take(self, size: int) -> memoryview:
        """A view of `size` bytes."""
        ...


class ReadMemory:
    """Page-aligned memory for one reader that is used again and again: pages touched before cost a tenth of new ones.

    The mapping is shared, not private: pages that a fork would copy while the device writes into them would be torn.
    """

    def __init__(self) -> None:
        self._held = mmap.mmap(-1, mmap.PAGESIZE)

    def take(self, size: int) -> memoryview:
        """A view of `size` bytes, whole pages of memory behind it; what the view before it showed is overwritten."""
        if len(self._held) < size:
            # Views of the older mapping keep it alive on their own.
            self._held = mmap.mmap(-1, whole_pages(size))
        return memoryview(self._held)[:size]


class VerifiedFile:
    """One shard file, read in whole blocks of 64 KiB that are compared with its sums as they arrive.

    A block that does not match is read a second time past the page cache; only when that differs too is it corruption.
    Several threads may read at once. `tally` counts every byte that is read, also of the sums.
    """

    def __init__(
        self,
        storage: Storage,
        checkpoint: str,
        entry: FileEntry,
        sums_entry: FileEntry,
        tally: ByteTally | None = None,
    ) -> None:
        self.entry = entry
        self.key = entry.key_in(checkpoint)
        self._storage = storage
        self._tally = tally or ByteTally()
        sums_key = sums_entry.key_in(checkpoint)
        self._sums = parse_sums(read_checked(storage, checkpoint, sums_entry, tally=self._tally), key=sums_key)
        self._ensure_sums_fit(sums_key)
        self._is_verified = np.zeros(len(self._sums.blocks), dtype=np.bool_)
        ensure_size(storage, checkpoint, entry)
        self._reader = storage.open_reader(self.key)

    def _ensure_sums_fit(self, sums_key: str) -> None:
        expected, found = (self.entry.size, self.entry.digest), (self._sums.file_bytes, self._sums.digest)
        if expected != found:
            raise CorruptCheckpointError(
                f"{self._storage.locate(sums_key)}: expected the checksums of {expected[0]:,} bytes with digest "
                f"{expected[1]}, found those of {found[0]:,} bytes with {found[1]}. Files were swapped; use an older step.",
                key=sums_key,
                field="digest",
                expected=expected[1],
                found=found[1],
            )

    def __enter__(self) -> VerifiedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; reading afterwards is an error."""
        self._reader.close()

    @property
    def sums(self) -> Sums:
        """The file's block checksums, already verified against the manifest."""
        return self._sums

    @property
    def unread_blocks(self) -> npt.NDArray[np.bool_]:
        """Which blocks were not verified yet through this object."""
        return ~self._is_verified

    def read(self, begin: int, end: int, memory: Memory | None = None) -> memoryview:
        """Bytes `begin` to `end` of the file, verified. Reads whole blocks: keep the range below some tens of MiB.

        With `memory` the result lies in it and holds until its next use; else in memory of its own.
        """
        assert 0 <= begin <= end <= self.entry.size, (begin, end, self.entry.size)
        if begin == end:
            return memoryview(b"")
        first, stop = begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)
        blocks = (memory or ReadMemory()).take(whole_pages(self._end_of(stop) - first * BLOCK_BYTES))
        self.read_span(first, stop, blocks)
        return blocks[begin - first * BLOCK_BYTES : end - first * BLOCK_BYTES]

    def verify_blocks(self, first: int, stop: int, on_bytes: Callable[[int], None]) -> None:
        """Reads blocks `first` to `stop` (exclusive) for their checksums alone, 4 MiB at a time."""
        step = 4 * 2**20 // BLOCK_BYTES
        memory = ReadMemory()
        for begin in range(first, stop, step):
            end = min(stop, begin + step)
            size = self._end_of(end) - begin * BLOCK_BYTES
            self.read_span(begin, end, memory.take(whole_pages(size)))
            on_bytes(size)

    def read_span(self, first: int, stop: int, memory: memoryview, landings: Sequence[Landing] = ()) -> None:
        """Reads blocks `first` to `stop` (exclusive), verified: bytes of `landings` to their memory, all others to `memory`.

        `memory` mirrors the blocks. landings: ascending, disjoint, inside the blocks. What the page cache holds is copied
        from there piece by piece; from the first piece on that is missing, the rest comes around the cache in one request,
        by way of `memory`, if that is page-aligned, has room for whole pages, and the storage can. An error leaves any
        bytes in all of the memory.
        """
        begin, end = first * BLOCK_BYTES, self._end_of(stop)
        assert len(memory) >= end - begin, (len(memory), begin, end)
        scatter = Scatter(begin, memory, landings)
        place = begin
        # A whole piece that is asked for in vain makes the kernel read it ahead, beside the read around the cache.
        is_cached = end - begin < AROUND_BYTES_MIN or self._reader.read_cached(begin, [memory[:PROBE_BYTES]])
        while place < end:
            piece_end = min(place + PIECE_BYTES, end)
            targets = scatter.targets(place, piece_end)
            is_cached = is_cached and self._reader.read_cached(place, targets)
            if not is_cached:
                if end - place >= AROUND_BYTES_MIN and self._read_around(place, end, scatter):
                    return
                self._reader.read_scattered(place, targets)
            self._verify(place, targets)
            place = piece_end

    def _end_of(self, stop: int) -> int:
        return min(stop * BLOCK_BYTES, self.entry.size)

    def _read_around(self, begin: int, end: int, scatter: Scatter) -> bool:
        """Reads the range from the medium; False if this storage cannot."""
        size = end - begin
        if not self._reader.read_around(begin, size, scatter.mirror(begin, begin + whole_pages(size))):
            return False
        for place in range(begin, end, PIECE_BYTES):
            piece_end = min(place + PIECE_BYTES, end)
            self._verify(place, [scatter.mirror(place, piece_end)])
            scatter.deliver(place, piece_end)
        return True

    def _verify(self, begin: int, targets: Sequence[memoryview]) -> None:
        """Compares the bytes from the block boundary `begin` on with their checksums; reads again what differs."""
        found = checksums_of(targets)
        first = begin // BLOCK_BYTES
        self._tally.add(sum(map(len, targets)))
        for place in np.flatnonzero(found != self._sums.blocks[first : first + len(found)]).tolist():
            self._read_again(first + place, place * BLOCK_BYTES, targets)
        self._is_verified[first : first + len(found)] = True

    def _read_again(self, block: int, skip: int, targets: Sequence[memoryview]) -> None:
        """Reads one block past the page cache into its place, `skip` bytes behind the beginning of `targets`."""
        begin, end = block * BLOCK_BYTES, self._end_of(block + 1)
        data = memoryview(bytearray(end - begin))
        with self._storage.open_reader(self.key, uncached=True) as reader:
            reader.read_into(begin, data)
        self._tally.add(len(data))
        found = int(block_checksums(data)[0])
        expected = int(self._sums.blocks[block])
        if found != expected:
            raise CorruptCheckpointError(
                f"{self._storage.locate(self.key)}: bytes {begin:,}-{end:,}: expected xxh3-64 {expected:016x}, found "
                f"{found:016x} in two reads. The file is damaged; use an older step, or run `dckpt verify` to see the rest.",
                key=self.key,
                field=f"bytes {begin}-{end}",
                expected=f"{expected:016x}",
                found=f"{found:016x}",
            )
        overwrite(targets, skip, data)
        log.warning(
            "%s: bytes %d-%d did not match their checksum in a first read and did in a second, uncached one; "
            "the medium is right, memory or the page cache was not.",
            self._storage.locate(self.key),
            begin,
            end,
        )
