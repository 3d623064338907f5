"""Reads boxes of saved tensors into live ones, whatever the layouts on either side."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from dckpt.blocks.read import ByteTally, VerifiedFile
from dckpt.blocks.workers import ByteWorkers
from dckpt.dcp.lanes import LANE_BYTES, SLOTS, TORCH_DTYPES, DeviceStreams, HostLane, Lane, PinnedLane
from dckpt.dcp.spans import BoxRead, Span, plan_spans
from dckpt.errors import CorruptCheckpointError
from dckpt.format.checksum import BLOCK_BYTES
from dckpt.format.index import LayoutIndex
from dckpt.format.manifest import FileEntry, Manifest

if TYPE_CHECKING:
    from types import TracebackType

    from dckpt.storage.base import Storage

__all__ = ["READ_BYTES_MAX", "TORCH_DTYPES", "CheckpointFiles"]

OPEN_FILES_MAX = 64
READER_THREADS = 4  # enough requests in flight for one device

READ_BYTES_MAX = READER_THREADS * SLOTS * LANE_BYTES
"""Memory for reading, beside the tensors and the checksums of open files: the same for any checkpoint (41 MiB on a GPU, where
it is pinned; half of that on the host)."""


class CheckpointFiles:
    """The shard files of one checkpoint, opened when first needed and verified on every read; a bounded number at once.

    `tally` counts every byte that is read through it, checksums included.
    """

    def __init__(
        self,
        storage: Storage,
        checkpoint: str,
        manifest: Manifest,
        index: LayoutIndex,
        tally: ByteTally | None = None,
    ) -> None:
        self._storage = storage
        self._checkpoint = checkpoint
        self._manifest = manifest
        self._index = index
        self._entries: dict[str, FileEntry] = {entry.name: entry for entry in manifest.shard_entries}
        self._extents = index.file_extents()
        self._open: OrderedDict[int, VerifiedFile] = OrderedDict()
        self._workers = ByteWorkers(READER_THREADS)
        self._lock = threading.Lock()
        self.tally = tally or ByteTally()

    def __enter__(self) -> CheckpointFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes what is open and ends the reading threads; safe to repeat."""
        self._workers.stop()
        while self._open:
            self._open.popitem()[1].close()

    def open(self, number: int) -> VerifiedFile:
        """Shard file `number` of the index; it stays open until this does, or until `OPEN_FILES_MAX` others are opened."""
        return self._file(number)

    def _file(self, number: int) -> VerifiedFile:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        name = self._index.files[number]
        entry = self._entries.get(name)
        if entry is None:
            raise CorruptCheckpointError(
                f"Checkpoint {self._storage.locate(self._checkpoint)}: the layout index names shard file {name}, the "
                "manifest does not. The checkpoint is inconsistent; use an older step.",
                key=f"{self._checkpoint}/manifest.json",
                field="files",
                expected=name,
                found=None,
            )
        if self._extents[number] > entry.size:
            raise CorruptCheckpointError(
                f"{self._storage.locate(entry.key_in(self._checkpoint))}: expected at least "
                f"{self._extents[number]:,} bytes by the layout index, found {entry.size:,} in the manifest. "
                "The checkpoint is inconsistent; use an older step.",
                key=entry.key_in(self._checkpoint),
                field="size",
                expected=self._extents[number],
                found=entry.size,
            )
        if len(self._open) >= OPEN_FILES_MAX:
            self._open.popitem(last=False)[1].close()
        sums_entry = self._manifest.sums_entry(entry)
        file = VerifiedFile(self._storage, self._checkpoint, entry, sums_entry, self.tally)
        self._open[number] = file
        return file

    def read_boxes(self, reads: Iterable[BoxRead], on_bytes: Callable[[int], None]) -> None:
        """Fills every target: spans of neighbouring ranges, a few at a time, verified on the way.

        Bytes go straight into contiguous host memory; what an error leaves there was not all verified, so the targets must
        not be used after one. Targets on a GPU are filled when this returns. `on_bytes` is told how many bytes were read.
        Memory: at most `READ_BYTES_MAX`, whatever is read.
        """
        spans = plan_spans(reads)
        devices = {fill.target.device for span in spans for fill in span.fills if fill.target.is_cuda}
        streams = DeviceStreams(devices)
        own = threading.local()

        def lane() -> Lane:
            if not hasattr(own, "lane"):
                own.lane = PinnedLane(streams) if devices else HostLane()
            found: Lane = own.lane
            return found

        by_file: dict[int, list[Span]] = {}
        for span in spans:
            by_file.setdefault(span.file, []).append(span)
        numbers = sorted(by_file)
        try:
            for at in range(0, len(numbers), OPEN_FILES_MAX):
                # Opened before the threads begin, so that none is closed under one of them to make room for another.
                files = {number: self._file(number) for number in numbers[at : at + OPEN_FILES_MAX]}
                self._workers.run([self._task(files[n], span, lane, on_bytes) for n in files for span in by_file[n]])
        finally:
            streams.finish()

    def _task(
        self, file: VerifiedFile, span: Span, lane: Callable[[], Lane], on_bytes: Callable[[int], None]
    ) -> Callable[[], None]:
        def read() -> None:
            memory = lane().take(span)
            file.read_span(span.first, span.stop, memory, span.landings)
            lane().copy(span, memory)
            with self._lock:
                on_bytes(span.max_bytes)

        return read

    def read_bytes(self, name: str, *, limit: int) -> bytes:
        """The bytes of a whole record: a U8 tensor of one dimension and one chunk, at most `limit` bytes.

        A record of another shape is a `CorruptCheckpointError`, found before memory is taken for it.
        """
        meta, chunks = self._index.meta(name), self._index.chunks(name)
        length = math.prod(meta.shape)
        if (meta.dtype, len(meta.shape), len(chunks)) != ("U8", 1, 1) or length > limit:
            raise CorruptCheckpointError(
                f"Checkpoint {self._storage.locate(self._checkpoint)}: record {name}: expected one U8 chunk of at most "
                f"{limit:,} bytes, found {meta.dtype} {list(meta.shape)} in {len(chunks)} chunks. Use an older step.",
                key=f"{self._checkpoint}/{self._manifest.index_entry.path}",
                field=name,
                expected=f"U8, one dimension, at most {limit} bytes",
                found=f"{meta.dtype} {list(meta.shape)}",
            )
        chunk = chunks[0]
        return bytes(self._file(chunk.file).read(chunk.begin, chunk.begin + length))

    def verify_rest(self, number: int, is_read: Callable[[str], bool], on_bytes: Callable[[int], None]) -> None:
        """Verifies the blocks of file `number` that hold anything but tensors for which `is_read` is true.

        Those tensors are verified by whoever reads them; headers and records nobody asks for would otherwise go unseen.
        What this rank has verified already is not read again.
        """
        file = self._file(number)
        blocks = np.zeros(len(file.sums.blocks), dtype=np.bool_)
        place = 0
        for name, begin, end in self._index.chunks_in_file(number):
            if is_read(name):
                _mark(blocks, place, begin)
                place = end
        _mark(blocks, place, file.entry.size)
        blocks &= file.unread_blocks
        edges = np.flatnonzero(np.diff(np.concatenate(([False], blocks, [False])).astype(np.int8)))
        for first, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            file.verify_blocks(first, stop, on_bytes)


def _mark(blocks: np.ndarray[tuple[int], np.dtype[np.bool_]], begin: int, end: int) -> None:
    if end > begin:
        blocks[begin // BLOCK_BYTES : -(-end // BLOCK_BYTES)] = True
