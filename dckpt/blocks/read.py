"""Reads byte ranges of a shard file; no byte is handed out before its block's checksum matched."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from dckpt.errors import CorruptCheckpointError, StorageMissingError
from dckpt.format.checksum import BLOCK_BYTES, Sums, block_checksums, digest_bytes, parse_sums
from dckpt.format.manifest import FileEntry

if TYPE_CHECKING:
    from types import TracebackType

    from dckpt.storage.base import Storage

log = logging.getLogger(__name__)

SUMS_BYTES_MAX = 2**31  # checksums of a 16 TiB shard file


def read_checked(storage: Storage, checkpoint: str, entry: FileEntry) -> bytes:
    """The whole of a small file of the checkpoint (index, sums); its size and digest match the manifest's entry."""
    key = f"{entry.checkpoint or checkpoint}/{entry.path}"
    data = _read_whole(storage, key, entry)
    found = digest_bytes(data)
    if found != entry.digest:
        data = _read_whole(storage, key, entry, uncached=True)
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


def _read_whole(storage: Storage, key: str, entry: FileEntry, *, uncached: bool = False) -> bytes:
    ensure_size(storage, key, entry)
    data = bytearray(entry.size)
    with storage.open_reader(key, uncached=uncached) as reader:
        reader.read_into(0, memoryview(data))
    return bytes(data)


def ensure_size(storage: Storage, key: str, entry: FileEntry) -> None:
    """Raises `CorruptCheckpointError` unless the file is there and as long as the manifest says."""
    try:
        found = storage.size(key)
    except StorageMissingError as error:
        raise CorruptCheckpointError(
            f"{storage.locate(key)}: expected a file of {entry.size:,} bytes, found none. The checkpoint is "
            "incomplete; use an older step.",
            key=key,
            field="size",
            expected=entry.size,
            found=None,
        ) from error
    if found != entry.size:
        raise CorruptCheckpointError(
            f"{storage.locate(key)}: expected {entry.size:,} bytes, found {found:,}. The file was cut short or "
            "replaced; use an older step.",
            key=key,
            field="size",
            expected=entry.size,
            found=found,
        )


class ReadMemory:
    """Memory for one reader that is used again and again: pages that were touched before cost a tenth of new ones."""

    def __init__(self) -> None:
        self._held = bytearray()

    def take(self, size: int) -> memoryview:
        """A view of `size` bytes; what the view before it showed is overwritten."""
        if len(self._held) < size:
            self._held = bytearray(size)
        return memoryview(self._held)[:size]


class VerifiedFile:
    """One shard file, read in whole blocks of 64 KiB that are compared with its sums as they arrive.

    A block that does not match is read a second time past the page cache; only when that differs too is it corruption.
    Several threads may read at once.
    """

    def __init__(self, storage: Storage, checkpoint: str, entry: FileEntry, sums_entry: FileEntry) -> None:
        self.entry = entry
        self.key = f"{entry.checkpoint or checkpoint}/{entry.path}"
        self._storage = storage
        sums_key = f"{checkpoint}/{sums_entry.path}"
        self._sums = parse_sums(read_checked(storage, checkpoint, sums_entry), key=sums_key)
        self._ensure_sums_fit(sums_key)
        ensure_size(storage, self.key, entry)
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

    def read(self, begin: int, end: int, memory: ReadMemory | None = None) -> memoryview:
        """Bytes `begin` to `end` of the file, verified. Reads whole blocks: keep the range below some tens of MiB.

        With `memory` the result lies in it and holds until its next use; else in memory of its own.
        """
        assert 0 <= begin <= end <= self.entry.size, (begin, end, self.entry.size)
        if begin == end:
            return memoryview(b"")
        first, last = begin // BLOCK_BYTES, (end - 1) // BLOCK_BYTES
        blocks = self._read_blocks(first, last + 1, memory)
        return blocks[begin - first * BLOCK_BYTES : end - first * BLOCK_BYTES]

    def verify_blocks(self, first: int, stop: int, on_bytes: Callable[[int], None]) -> None:
        """Reads blocks `first` to `stop` (exclusive) for their checksums alone, 16 MiB at a time."""
        step = 16 * 2**20 // BLOCK_BYTES
        memory = ReadMemory()
        for begin in range(first, stop, step):
            on_bytes(len(self._read_blocks(begin, min(stop, begin + step), memory)))

    def _read_blocks(self, first: int, stop: int, memory: ReadMemory | None) -> memoryview:
        begin, end = first * BLOCK_BYTES, min(stop * BLOCK_BYTES, self.entry.size)
        data = (memory or ReadMemory()).take(end - begin)
        self._reader.read_into(begin, data)
        expected = self._sums.blocks[first:stop]
        bad = np.flatnonzero(block_checksums(data) != expected)
        for place in bad.tolist():
            self._read_again(first + place, data[place * BLOCK_BYTES : (place + 1) * BLOCK_BYTES])
        return data

    def _read_again(self, block: int, target: memoryview) -> None:
        begin = block * BLOCK_BYTES
        with self._storage.open_reader(self.key, uncached=True) as reader:
            reader.read_into(begin, target)
        found = int(block_checksums(target)[0])
        expected = int(self._sums.blocks[block])
        end = begin + len(target)
        if found != expected:
            raise CorruptCheckpointError(
                f"{self._storage.locate(self.key)}: bytes {begin:,}-{end:,}: expected xxh3-64 {expected:016x}, found "
                f"{found:016x} in two reads. The file is damaged; use an older step, or run `dckpt verify` to see the rest.",
                key=self.key,
                field=f"bytes {begin}-{end}",
                expected=f"{expected:016x}",
                found=f"{found:016x}",
            )
        log.warning(
            "%s: bytes %d-%d did not match their checksum in a first read and did in a second, uncached one; "
            "the medium is right, memory or the page cache was not.",
            self._storage.locate(self.key),
            begin,
            end,
        )
