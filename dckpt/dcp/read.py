"""Reads boxes of saved tensors into live ones, whatever the layouts on either side."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from dckpt.blocks.read import VerifiedFile
from dckpt.dcp.chunks import local_chunks, tensor_from_bytes
from dckpt.errors import CorruptCheckpointError
from dckpt.format.checksum import BLOCK_BYTES
from dckpt.format.index import Chunk, LayoutIndex
from dckpt.format.manifest import FileEntry, Manifest
from dckpt.format.shard_file import DTYPES
from dckpt.state.naming import DTYPE_NAMES

if TYPE_CHECKING:
    from types import TracebackType

    from dckpt.storage.base import Storage

PIECE_BYTES = 16 * 2**20
OPEN_FILES_MAX = 64

TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True, slots=True)
class BoxRead:
    """One piece of work: a region of a saved chunk and the view of a live tensor that it fills."""

    chunk: Chunk
    dtype: str
    region_offsets: tuple[int, ...]  # inside the chunk
    region_sizes: tuple[int, ...]
    target: torch.Tensor  # plain, shape region_sizes


def plan_tensor_reads(name: str, index: LayoutIndex, tensor: torch.Tensor) -> list[BoxRead]:
    """The reads that fill this rank's part of `tensor` from the chunks of the saved tensor `name` (same global shape)."""
    meta = index.meta(name)
    reads = []
    for box in local_chunks(name, tensor):
        for chunk in index.chunks(name):
            shared = _intersect(box.offsets, box.sizes, chunk.offsets, chunk.sizes)
            if shared is None:
                continue
            offsets, sizes = shared
            target = box.tensor[
                tuple(slice(o - b, o - b + s) for o, b, s in zip(offsets, box.offsets, sizes, strict=True))
            ]
            inside = tuple(o - c for o, c in zip(offsets, chunk.offsets, strict=True))
            reads.append(BoxRead(chunk, meta.dtype, inside, sizes, target))
    return reads


def _intersect(
    offsets_a: Sequence[int], sizes_a: Sequence[int], offsets_b: Sequence[int], sizes_b: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    begins = tuple(max(a, b) for a, b in zip(offsets_a, offsets_b, strict=True))
    ends = (min(a + s, b + t) for a, s, b, t in zip(offsets_a, sizes_a, offsets_b, sizes_b, strict=True))
    sizes = tuple(end - begin for begin, end in zip(begins, ends, strict=True))
    return None if any(size <= 0 for size in sizes) else (begins, sizes)


class CheckpointFiles:
    """The shard files of one checkpoint, opened when first needed and verified on every read; a bounded number at once."""

    def __init__(self, storage: Storage, checkpoint: str, manifest: Manifest, index: LayoutIndex) -> None:
        self._storage = storage
        self._checkpoint = checkpoint
        self._manifest = manifest
        self._index = index
        self._entries: dict[str, FileEntry] = {entry.path.rsplit("/", 1)[-1]: entry for entry in manifest.shard_entries}
        self._extents = index.file_extents()
        self._open: OrderedDict[int, VerifiedFile] = OrderedDict()

    def __enter__(self) -> CheckpointFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes what is open; safe to repeat."""
        while self._open:
            self._open.popitem()[1].close()

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
                f"{self._storage.locate(self._checkpoint)}/{entry.path}: expected at least "
                f"{self._extents[number]:,} bytes by the layout index, found {entry.size:,} in the manifest. "
                "The checkpoint is inconsistent; use an older step.",
                key=f"{self._checkpoint}/{entry.path}",
                field="size",
                expected=self._extents[number],
                found=entry.size,
            )
        if len(self._open) >= OPEN_FILES_MAX:
            self._open.popitem(last=False)[1].close()
        file = VerifiedFile(self._storage, self._checkpoint, entry, self._manifest.sums_entry(entry.path))
        self._open[number] = file
        return file

    def read_boxes(self, reads: Iterable[BoxRead], on_bytes: Callable[[int], None]) -> None:
        """Fills every target, in order of file and place so that neighbours share a block. `on_bytes` counts bytes read."""
        for read in sorted(reads, key=lambda read: (read.chunk.file, read.chunk.begin)):
            self._read_box(read, on_bytes)

    def _read_box(self, read: BoxRead, on_bytes: Callable[[int], None]) -> None:
        file = self._file(read.chunk.file)
        dtype, item = TORCH_DTYPES[read.dtype], DTYPES[read.dtype]
        target, chunk_shape = read.target.detach(), read.chunk.sizes
        if not chunk_shape:
            _fill(target, tensor_from_bytes(file.read(read.chunk.begin, read.chunk.begin + item), dtype, ()))
            on_bytes(item)
            return
        row_bytes = math.prod(chunk_shape[1:]) * item
        rows_a_piece = max(1, PIECE_BYTES // row_bytes)
        first, count = read.region_offsets[0], read.region_sizes[0]
        inner = tuple(slice(o, o + s) for o, s in zip(read.region_offsets[1:], read.region_sizes[1:], strict=True))
        for done in range(0, count, rows_a_piece):
            rows = min(rows_a_piece, count - done)
            begin = read.chunk.begin + (first + done) * row_bytes
            data = file.read(begin, begin + rows * row_bytes)
            source = tensor_from_bytes(data, dtype, (rows, *chunk_shape[1:]))
            _fill(target[done : done + rows], source[(slice(None), *inner)])
            on_bytes(len(data))

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
        """
        file = self._file(number)
        blocks = np.zeros(len(file.sums.blocks), dtype=bool)
        place = 0
        for name, begin, end in self._index.chunks_in_file(number):
            if is_read(name):
                _mark(blocks, place, begin)
                place = end
        _mark(blocks, place, file.entry.size)
        edges = np.flatnonzero(np.diff(np.concatenate(([False], blocks, [False])).astype(np.int8)))
        for first, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            file.verify_blocks(first, stop, on_bytes)


def _fill(target: torch.Tensor, source: torch.Tensor) -> None:
    with torch.no_grad():
        target.copy_(source)


def _mark(blocks: np.ndarray[tuple[int], np.dtype[np.bool_]], begin: int, end: int) -> None:
    if end > begin:
        blocks[begin // BLOCK_BYTES : -(-end // BLOCK_BYTES)] = True
