"""Which byte ranges to read for which parts of live tensors: pure planning, sorted and coalesced."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from dckpt.dcp.chunks import local_chunks
from dckpt.format.index import Chunk, LayoutIndex
from dckpt.format.shard_file import DTYPES

SPAN_BYTES_MAX = 16 * 2**20  # read at once, unless one row is longer
GAP_BYTES_MAX = 512 * 1024  # read and thrown away rather than asked for separately


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
        for chunk in index.chunks_overlapping(name, box.offsets, box.sizes):
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


@dataclass(frozen=True, slots=True)
class Fill:
    """A piece of a span and where it goes: bytes `begin` to `end` of the file, as `shape`, of which `inner` is copied."""

    begin: int
    end: int
    dtype: str
    shape: tuple[int, ...]
    inner: tuple[slice, ...]
    target: torch.Tensor


@dataclass(slots=True)
class Span:
    """One read: bytes `begin` to `end` of file number `file`."""

    file: int
    begin: int
    end: int
    fills: list[Fill] = field(default_factory=list)


def plan_spans(reads: Iterable[BoxRead]) -> list[Span]:
    """The reads as spans in the order of the files; neighbours share one if the gap and the whole stay small."""
    pieces = [(read.chunk.file, fill) for read in reads for fill in _pieces(read)]
    pieces.sort(key=lambda piece: (piece[0], piece[1].begin, piece[1].end))
    spans: list[Span] = []
    for file, fill in pieces:
        last = spans[-1] if spans else None
        if last is not None and last.file == file and _joins(last, fill):
            last.end = max(last.end, fill.end)
            last.fills.append(fill)
        else:
            spans.append(Span(file, fill.begin, fill.end, [fill]))
    return spans


def _joins(span: Span, fill: Fill) -> bool:
    return fill.begin - span.end <= GAP_BYTES_MAX and max(span.end, fill.end) - span.begin <= SPAN_BYTES_MAX


def _pieces(read: BoxRead) -> Iterator[Fill]:
    """Whole rows of the chunk, at most a span's worth each; rows are contiguous, columns are cut out after reading."""
    item, shape = DTYPES[read.dtype], read.chunk.sizes
    target = read.target.detach()
    if not shape:
        yield Fill(read.chunk.begin, read.chunk.begin + item, read.dtype, (), (), target)
        return
    row_bytes = math.prod(shape[1:]) * item
    rows_a_piece = max(1, SPAN_BYTES_MAX // row_bytes)
    first, count = read.region_offsets[0], read.region_sizes[0]
    columns = tuple(slice(o, o + s) for o, s in zip(read.region_offsets[1:], read.region_sizes[1:], strict=True))
    for done in range(0, count, rows_a_piece):
        rows = min(rows_a_piece, count - done)
        begin = read.chunk.begin + (first + done) * row_bytes
        yield Fill(
            begin,
            begin + rows * row_bytes,
            read.dtype,
            (rows, *shape[1:]),
            (slice(None), *columns),
            target[done : done + rows],
        )
