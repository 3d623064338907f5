"""Writes one shard file and its checksum file, checksummed in the stream and durable when the call returns."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dckpt import failpoint
from dckpt.blocks.buffer import Pin
from dckpt.blocks.fingerprints import StreamFingerprints
from dckpt.blocks.source import PIECE_BYTES, FileSource, PieceMemory, PieceRing
from dckpt.blocks.workers import ByteWorkers
from dckpt.format.checksum import (
    BLOCK_BYTES,
    SEGMENT_BYTES,
    FileHasher,
    Sums,
    combine_digests,
    digest_bytes,
    encode_sums,
)
from dckpt.format.layout import sums_file_name
from dckpt.format.manifest import FileEntry

if TYPE_CHECKING:
    from dckpt.storage.base import FileWriter, Storage

DIRECT_BYTES_MIN = 8 * 2**20  # a smaller file goes through the page cache: it is written before a thread would be idle
PLAIN_PIECE_BYTES = 2**20  # checksummed and handed to the kernel while it is in the processor's second-level cache
HASHED_BYTES = 2**20  # checksummed and fingerprinted at a time, from the processor's cache
WRITER_THREADS = 4  # enough requests in flight for one device; more fight for the processor with the training


class WriterPool:
    """The threads that checksum and write, with the piece memory of each. One batch of work at a time."""

    def __init__(self, count: int = WRITER_THREADS, pin: Pin = lambda _: None) -> None:
        self.workers = ByteWorkers(count)
        self.ring = PieceRing(count, pin)

    def start(self) -> None:
        """Starts the threads, if they do not run yet."""
        self.workers.start()

    def stop(self) -> None:
        """The threads end when they are idle; those that are stuck end with the process and keep their memory."""
        self.workers.stop()
        self.ring.release()


class _Pass:
    """One pass over a file's bytes: each segment is checksummed by itself, in any order, and written if there is a writer."""

    def __init__(
        self, source: FileSource, ring: PieceRing, on_bytes: Callable[[int], None], writer: FileWriter | None
    ) -> None:
        self._source, self._ring, self._writer = source, ring, writer
        self._on_bytes = on_bytes
        self._wants_aligned = writer is not None and writer.wants_aligned
        size = source.size
        # At least two pieces a file, so that a crash in the middle of a small one can be rehearsed too.
        half = -(-size // 2)
        largest = PIECE_BYTES if self._wants_aligned else PLAIN_PIECE_BYTES
        self._piece_bytes = max(BLOCK_BYTES, min(largest, -(-half // BLOCK_BYTES) * BLOCK_BYTES))
        self._begins = range(0, size, SEGMENT_BYTES)
        self._digests = [b""] * len(self._begins)
        self._blocks = np.empty(-(-size // BLOCK_BYTES), dtype=np.uint64)
        self._fingerprints = StreamFingerprints(source.plan)
        self._is_first = True
        self._lock = threading.Lock()

    def run(self, workers: ByteWorkers) -> Sums:
        """Every segment, one task each; returns when the last is done."""
        workers.run([lambda number=number: self._pass_segment(number) for number in range(len(self._begins))])  # type: ignore[misc]
        digest = combine_digests(b"".join(self._digests))
        return Sums(self._source.size, digest, self._blocks, self._fingerprints.values())

    def _pass_segment(self, number: int) -> None:
        begin = self._begins[number]
        end = min(begin + SEGMENT_BYTES, self._source.size)
        hasher = FileHasher()
        with self._ring.borrow() as memory:
            for at in range(begin, end, self._piece_bytes):
                for view in self._views(at, min(at + self._piece_bytes, end), memory):
                    # Before the write, while the bytes are in the processor's cache.
                    self._hash(hasher, at, view)
                    self._hand_on(at, view)
                    at += len(view)
        self._digests[number] = hasher.segment_digests()
        blocks = hasher.checksums()
        first = begin // BLOCK_BYTES
        self._blocks[first : first + len(blocks)] = blocks

    def _hash(self, hasher: FileHasher, at: int, view: memoryview) -> None:
        for begin in range(0, len(view), HASHED_BYTES):
            part = view[begin : begin + HASHED_BYTES]
            hasher.update(part)
            self._fingerprints.add(at + begin, part)

    def _views(self, begin: int, end: int, memory: PieceMemory) -> Sequence[memoryview]:
        """One piece: where it lies if the kernel copies it anyway, else in aligned memory."""
        found = None if self._wants_aligned else self._source.in_place(begin, end)
        return [self._source.piece(begin, end, memory)] if found is None else found

    def _hand_on(self, at: int, piece: memoryview) -> None:
        if self._writer is not None:
            self._writer.write_at(at, piece)
        with self._lock:
            self._on_bytes(len(piece))
            is_first, self._is_first = self._is_first, False
        if is_first and self._writer is not None:
            failpoint.reach("mid_shard_write")


def checksum_source(source: FileSource, on_bytes: Callable[[int], None], pool: WriterPool) -> Sums:
    """What the sums file of this content would say, without writing anything."""
    return _Pass(source, pool.ring, on_bytes, None).run(pool.workers)


def write_shard_file(
    storage: Storage,
    directory: str,
    attempt: str,
    rank: int,
    name: str,
    source: FileSource,
    on_bytes: Callable[[int], None],
    pool: WriterPool,
) -> list[FileEntry]:
    """Writes the bytes of `source` as `directory/name` with its sums beside it; both are fsynced when this returns.

    Returns the manifest's entries of the two files, their paths relative to the checkpoint. `on_bytes` is told of every
    piece that was handed to the kernel. The directory is *not* synced: the caller does that once after its last file.
    Raises `StorageError` and its kin; then the attempt is condemned and the files must not be used.
    """
    failpoint.reach("before_shard_write")
    writer = storage.create_file(f"{directory}/{name}", is_large=source.size >= DIRECT_BYTES_MIN, size=source.size)
    try:
        sums = _Pass(source, pool.ring, on_bytes, writer).run(pool.workers)
        failpoint.reach("after_shard_write")
        writer.finish(source.size)
    except BaseException:
        writer.abandon()
        raise
    failpoint.reach("after_shard_sync")
    encoded = encode_sums(sums)
    sums_name = sums_file_name(name)
    write_small(storage, f"{directory}/{sums_name}", encoded)
    return [
        FileEntry(path=f"{attempt}/{name}", size=source.size, digest=sums.digest, kind="shard", rank=rank),
        FileEntry(
            path=f"{attempt}/{sums_name}", size=len(encoded), digest=digest_bytes(encoded), kind="sums", rank=rank
        ),
    ]


def write_small(storage: Storage, key: str, data: bytes) -> None:
    writer = storage.create_file(key)
    try:
        writer.write_at(0, memoryview(data))
        writer.finish(len(data))
    except BaseException:
        writer.abandon()
        raise
