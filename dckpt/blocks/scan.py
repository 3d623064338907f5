"""Read whole files once, front to back, and say which byte ranges differ from their checksums."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np

from dckpt.errors import CorruptCheckpointError, StorageError
from dckpt.format.checksum import BLOCK_BYTES, FileHasher, Sums
from dckpt.storage.base import Storage

PIECE_BYTES = 8 * 2**20
"""Bytes in one read: large enough that the call costs nothing, small enough that progress moves."""

THREADS = 4
"""Files read at the same time; reads and checksums release the GIL."""


@dataclass(frozen=True, slots=True)
class FileScan:
    """What one file's bytes gave. `bad_ranges` is None when there were no block checksums to compare with."""

    key: str
    size: int
    digest: str
    bad_ranges: tuple[tuple[int, int], ...] | None
    is_unstable: bool = False
    """A first read differed from its checksums and a second, uncached one did not."""


@dataclass(frozen=True, slots=True)
class ScanItem:
    """One file to read, with what it should give. `sums` is None when its sums file cannot be used."""

    key: str
    digest: str
    sums: Sums | None


def scan_file(storage: Storage, item: ScanItem, *, on_bytes: Callable[[int], None] | None = None) -> FileScan:
    """Every byte of the file, read once; a file that differs is read again past the page cache.

    Only what the second read confirms is damage: memory that flips a bit in the page cache must not condemn
    a good file, and the answer says when that happened.
    """
    first = _read_through(storage, item, uncached=False, on_bytes=on_bytes)
    if _is_clean(first, item):
        return first
    second = _read_through(storage, item, uncached=True, on_bytes=None)
    if _is_clean(second, item):
        return FileScan(second.key, second.size, second.digest, second.bad_ranges, is_unstable=True)
    return second


def scan_files(
    storage: Storage,
    items: Sequence[ScanItem],
    *,
    threads: int = THREADS,
    on_bytes: Callable[[int], None] | None = None,
) -> Iterator[tuple[ScanItem, FileScan | CorruptCheckpointError | StorageError]]:
    """Each file's scan, or the error that stopped it, as they finish. At most `threads` files are open.

    An error belongs to its file and is handed over as a value, so that one unreadable file does not hide the
    damage in the others.
    """
    waiting = list(reversed(items))
    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="dckpt-scan") as pool:
        running: dict[Future[FileScan], ScanItem] = {}
        try:
            while waiting or running:
                while waiting and len(running) < threads:
                    item = waiting.pop()
                    running[pool.submit(scan_file, storage, item, on_bytes=on_bytes)] = item
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    item = running.pop(future)
                    try:
                        yield item, future.result()
                    except (CorruptCheckpointError, StorageError) as error:
                        yield item, error
        finally:
            for future in running:
                future.cancel()


def _is_clean(scan: FileScan, item: ScanItem) -> bool:
    return scan.digest == item.digest and not scan.bad_ranges


def _read_through(
    storage: Storage, item: ScanItem, *, uncached: bool, on_bytes: Callable[[int], None] | None
) -> FileScan:
    hasher = FileHasher()
    with storage.open_reader(item.key, uncached=uncached) as reader:
        size = reader.size
        buffer = memoryview(bytearray(min(PIECE_BYTES, max(size, 1))))
        offset = 0
        while offset < size:
            piece = buffer[: min(len(buffer), size - offset)]
            reader.read_into(offset, piece)
            hasher.update(piece)
            offset += len(piece)
            if on_bytes is not None:
                on_bytes(len(piece))
    bad = None if item.sums is None else _bad_ranges(hasher.checksums(), item.sums.blocks, size)
    return FileScan(item.key, size, hasher.digest(), bad)


def _bad_ranges(found: np.ndarray, expected: np.ndarray, size: int) -> tuple[tuple[int, int], ...]:
    """Byte ranges of the blocks that differ, neighbours merged; a block beyond the expected ones is bad."""
    shared = min(len(found), len(expected))
    bad = np.flatnonzero(found[:shared] != expected[:shared])
    if len(found) > shared:
        bad = np.concatenate([bad, np.arange(shared, len(found))])
    if not len(bad):
        return ()
    breaks = np.flatnonzero(np.diff(bad) > 1)
    firsts = bad[np.concatenate([[0], breaks + 1])]
    lasts = bad[np.concatenate([breaks, [len(bad) - 1]])]
    return tuple(
        (int(first) * BLOCK_BYTES, min((int(last) + 1) * BLOCK_BYTES, size))
        for first, last in zip(firsts, lasts, strict=True)
    )
