"""Writes one shard file and its checksum file, checksummed in the stream and durable when the call returns."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from dckpt import failpoint
from dckpt.blocks.workers import ByteWorkers
from dckpt.format.checksum import (
    BLOCK_BYTES,
    SEGMENT_BYTES,
    Sums,
    block_checksums,
    combine_digests,
    digest_bytes,
    encode_sums,
    segment_digests,
)
from dckpt.format.layout import sums_file_name
from dckpt.format.manifest import FileEntry

if TYPE_CHECKING:
    from dckpt.storage.base import FileWriter, Storage

PIECE_BYTES = 8 * 2**20  # one write call; a multiple of the block
WRITER_THREADS = 4  # enough requests in flight for one device; more fight for the processor with the training


class _Image:
    """The image of one file on its way out: each segment is checksummed and written by itself, in any order."""

    def __init__(self, writer: FileWriter, image: memoryview, on_bytes: Callable[[int], None]) -> None:
        self._writer = writer
        self._image = image
        self._on_bytes = on_bytes
        # At least two pieces a file, so that a crash in the middle of a small one can be rehearsed too.
        half = -(-len(image) // 2)
        self._piece_bytes = max(BLOCK_BYTES, min(PIECE_BYTES, -(-half // BLOCK_BYTES) * BLOCK_BYTES))
        self._begins = range(0, len(image), SEGMENT_BYTES)
        self._digests = [b""] * len(self._begins)
        self._blocks = np.empty(-(-len(image) // BLOCK_BYTES), dtype=np.uint64)
        self._is_first = True
        self._lock = threading.Lock()

    def tasks(self) -> list[Callable[[], None]]:
        """One task a segment."""
        return [lambda number=number: self._write_segment(number) for number in range(len(self._begins))]  # type: ignore[misc]

    def _write_segment(self, number: int) -> None:
        begin = self._begins[number]
        end = min(begin + SEGMENT_BYTES, len(self._image))
        segment = self._image[begin:end]
        self._digests[number] = segment_digests(segment)
        first = begin // BLOCK_BYTES
        self._blocks[first : first + -(-len(segment) // BLOCK_BYTES)] = block_checksums(segment)
        for at in range(0, len(segment), self._piece_bytes):
            piece = segment[at : at + self._piece_bytes]
            self._writer.write_at(begin + at, piece)
            with self._lock:
                self._on_bytes(len(piece))
                is_first, self._is_first = self._is_first, False
            if is_first:
                failpoint.reach("mid_shard_write")

    def sums(self) -> Sums:
        """The file's checksums, once every task is done."""
        return Sums(len(self._image), combine_digests(b"".join(self._digests)), self._blocks)


def write_shard_file(
    storage: Storage,
    directory: str,
    attempt: str,
    rank: int,
    name: str,
    image: memoryview,
    on_bytes: Callable[[int], None],
    workers: ByteWorkers,
) -> list[FileEntry]:
    """Writes `image` as `directory/name` with its sums beside it; both are fsynced when this returns.

    Returns the manifest's entries of the two files, their paths relative to the checkpoint. `on_bytes` is told of every
    piece that was handed to the kernel. The directory is *not* synced: the caller does that once after its last file.
    Raises `StorageError` and its kin; then the attempt is condemned and the files must not be used.
    """
    failpoint.reach("before_shard_write")
    writer = storage.create_file(f"{directory}/{name}", is_large=len(image) >= PIECE_BYTES)
    try:
        outgoing = _Image(writer, image, on_bytes)
        workers.run(outgoing.tasks())
        failpoint.reach("after_shard_write")
        writer.finish(len(image))
    except BaseException:
        writer.abandon()
        raise
    failpoint.reach("after_shard_sync")
    sums = outgoing.sums()
    encoded = encode_sums(sums)
    sums_name = sums_file_name(name)
    _write_small(storage, f"{directory}/{sums_name}", encoded)
    return [
        FileEntry(path=f"{attempt}/{name}", size=len(image), digest=sums.digest, kind="shard", rank=rank),
        FileEntry(
            path=f"{attempt}/{sums_name}", size=len(encoded), digest=digest_bytes(encoded), kind="sums", rank=rank
        ),
    ]


def _write_small(storage: Storage, key: str, data: bytes) -> None:
    writer = storage.create_file(key)
    try:
        writer.write_at(0, memoryview(data))
        writer.finish(len(data))
    except BaseException:
        writer.abandon()
        raise
