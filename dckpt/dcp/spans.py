"""Which byte ranges to read for which parts of live tensors: pure planning, sorted and coalesced.

No block of a file is read in which no wanted byte lies, and none twice but at the seams of spans: what is read exceeds what
is needed by less than a block at each end of a contiguous range.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from dckpt.blocks.scatter import Landing
from dckpt.dcp.chunks import LocalChunk, local_chunks
from dckpt.format.checksum import BLOCK_BYTES
from dckpt.format.index import Chunk, LayoutIndex
from dckpt.format.shard_file import DTYPES

SPAN_BYTES_MAX = 4 * 2**20
"""One task of a reading thread and, where nothing is cached, one request; whole blocks.

A span is longer by less than `FILL_BYTES_MAX` where a copy of several rows crosses its end.
"""

FILL_BYTES_MAX = 2**20
"""The rows of a chunk that are copied at once."""

STRAIGHT_BYTES_MIN = 4096
"""A range from this size on is read straight into contiguous host memory; a smaller one is copied."""

_SPAN_BLOCKS = SPAN_BYTES_MAX // BLOCK_BYTES
_ALL = (slice(None),)


@dataclass(frozen=True, slots=True)
class BoxRead:
    """One piece of work: a region of a saved chunk and the view of a live tensor that it fills."""

    chunk: Chunk
    dtype: str
    region_offsets: tuple[int, ...]  # inside the chunk
    region_sizes: tuple[int, ...]
    target: torch.Tensor  # plain, shape region_sizes


def plan_reads(tensors: Iterable[tuple[str, torch.Tensor]], index: LayoutIndex) -> list[BoxRead]:
    """The reads that fill this rank's part of each tensor from the chunks of the saved one (name, same global shape)."""
    return [
        read
        for name, tensor in tensors
        for box in local_chunks(name, tensor)
        for read in reads_of_box(name, box, index)
    ]


def reads_of_box(name: str, box: LocalChunk, index: LayoutIndex) -> Iterator[BoxRead]:
    """The reads that fill one box of the saved tensor `name`."""
    dtype = index.meta(name).dtype
    for chunk in index.chunks_overlapping(name, box.offsets, box.sizes):
        if (chunk.offsets, chunk.sizes) == (box.offsets, box.sizes):
            yield BoxRead(chunk, dtype, (0,) * len(box.sizes), box.sizes, box.tensor)
            continue
        shared = _intersect(box.offsets, box.sizes, chunk.offsets, chunk.sizes)
        if shared is None:
            continue
        offsets, sizes = shared
        target = box.tensor[tuple(slice(o - b, o - b + s) for o, b, s in zip(offsets, box.offsets, sizes, strict=True))]
        inside = tuple(o - c for o, c in zip(offsets, chunk.offsets, strict=True))
        yield BoxRead(chunk, dtype, inside, sizes, target)


def _intersect(
    offsets_a: Sequence[int], sizes_a: Sequence[int], offsets_b: Sequence[int], sizes_b: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    begins = tuple(max(a, b) for a, b in zip(offsets_a, offsets_b, strict=True))
    ends = (min(a + s, b + t) for a, s, b, t in zip(offsets_a, sizes_a, offsets_b, sizes_b, strict=True))
    sizes = tuple(end - begin for begin, end in zip(begins, ends, strict=True))
    return None if any(size <= 0 for size in sizes) else (begins, sizes)


@dataclass(frozen=True, slots=True)
class Fill:
    """A copy to make: bytes `begin` to `end` of a file, as `shape`, of which `inner` goes to `target`."""

    begin: int
    end: int
    dtype: str
    shape: tuple[int, ...]
    inner: tuple[slice, ...]
    target: torch.Tensor


@dataclass(slots=True)
class Span:
    """One read: blocks `first` to `stop` (exclusive) of file number `file`.

    Bytes of `landings` go straight to their memory; `fills` are copied out of the memory of the span.
    """

    file: int
    first: int
    stop: int
    landings: list[Landing] = field(default_factory=list)
    fills: list[Fill] = field(default_factory=list)

    @property
    def begin(self) -> int:
        """Its first byte."""
        return self.first * BLOCK_BYTES

    @property
    def max_bytes(self) -> int:
        """Its length; shorter if it holds the end of its file."""
        return (self.stop - self.first) * BLOCK_BYTES


def plan_spans(reads: Iterable[BoxRead]) -> list[Span]:
    """The reads as spans in the order of the files; ranges share a span where their blocks touch.

    Bytes that go to two targets, to one of them straight, are read twice.
    """
    pieces = [(read.chunk.file, piece) for read in reads for piece in _pieces(read)]
    spans: list[Span] = []
    while pieces:
        pieces.sort(key=_place)
        pieces = _plan_pass(pieces, spans)
    return sorted(spans, key=lambda span: (span.file, span.first))


def _place(item: tuple[int, Landing | Fill]) -> tuple[int, int]:
    return item[0], item[1].begin


def _plan_pass(pieces: list[tuple[int, Landing | Fill]], spans: list[Span]) -> list[tuple[int, Landing | Fill]]:
    """Appends spans for the sorted `pieces`; returns those left over, whose bytes land elsewhere in these spans."""
    left_over = []
    span = Span(-1, 0, 0)
    reach = landed = 0  # one past the last byte of the file that any piece takes, and a landing
    for file, piece in pieces:
        if file != span.file:
            reach = landed = 0
        is_landing = isinstance(piece, Landing)
        if piece.begin < (reach if is_landing else landed):
            left_over.append((file, piece))
            continue
        reach = max(reach, piece.end)
        landed = piece.end if is_landing else landed
        first = piece.begin // BLOCK_BYTES
        if file != span.file or not span.first <= first <= min(span.stop, span.first + _SPAN_BLOCKS - 1):
            span = _begin(spans, file, first)
        rest = _add(span, piece)
        while rest is not None:
            span = _begin(spans, file, rest.begin // BLOCK_BYTES)
            rest = _add(span, rest)
    return left_over


def _begin(spans: list[Span], file: int, first: int) -> Span:
    spans.append(Span(file, first, first))
    return spans[-1]


def _add(span: Span, piece: Landing | Fill) -> Landing | Fill | None:
    """Adds what fits into the span; returns the rest. What cannot be cut is added whole and makes the span longer."""
    limit = span.begin + SPAN_BYTES_MAX
    rest: Landing | Fill | None = None
    if piece.end > limit:
        parts = _cut(piece, limit)
        if parts is not None:
            piece, rest = parts
    span.stop = max(span.stop, -(-piece.end // BLOCK_BYTES))
    if isinstance(piece, Landing):
        span.landings.append(piece)
    else:
        span.fills.append(piece)
    return rest


def _cut(piece: Landing | Fill, at: int) -> tuple[Landing | Fill, Landing | Fill] | None:
    """The piece in two, the first ending at byte `at` or just before; None if its rows cannot be cut there."""
    size = at - piece.begin
    if isinstance(piece, Landing):
        return Landing(piece.begin, piece.memory[:size]), Landing(at, piece.memory[size:])
    count = size // DTYPES[piece.dtype]
    if len(piece.shape) != 1 or not count:
        return None
    at = piece.begin + count * DTYPES[piece.dtype]
    head, tail = piece.target[:count], piece.target[count:]
    return (
        Fill(piece.begin, at, piece.dtype, (count,), _ALL, head),
        Fill(at, piece.end, piece.dtype, (len(tail),), _ALL, tail),
    )


def _pieces(read: BoxRead) -> Iterable[Landing | Fill]:
    if read.region_sizes == read.chunk.sizes and read.target.is_contiguous():
        return (_run(read.chunk.begin, read.dtype, read.target.detach()),)
    return _cut_box(
        read.chunk.begin, read.dtype, read.chunk.sizes, read.region_offsets, read.region_sizes, read.target.detach()
    )


def _cut_box(
    begin: int,
    dtype: str,
    shape: Sequence[int],
    offsets: Sequence[int],
    sizes: Sequence[int],
    target: torch.Tensor,
) -> Iterator[Landing | Fill]:
    """Pieces for a region of the row-major box of `shape` that begins at byte `begin` of its file."""
    item = DTYPES[dtype]
    strides = _strides(shape, item)
    if _is_run(shape, sizes) and target.is_contiguous():
        yield _run(begin + sum(map(operator.mul, offsets, strides)), dtype, target)
        return
    rows = FILL_BYTES_MAX // strides[0]
    if rows and _widest_gap(strides, sizes, item) < BLOCK_BYTES:
        inner = (slice(None), *(slice(o, o + s) for o, s in zip(offsets[1:], sizes[1:], strict=True)))
        for done in range(0, sizes[0], rows):
            count = min(rows, sizes[0] - done)
            at = begin + (offsets[0] + done) * strides[0]
            part = target[done : done + count]
            yield Fill(at, at + count * strides[0], dtype, (count, *shape[1:]), inner, part)
        return
    for row in range(sizes[0]):
        at = begin + (offsets[0] + row) * strides[0]
        yield from _cut_box(at, dtype, shape[1:], offsets[1:], sizes[1:], target[row])


def _run(begin: int, dtype: str, target: torch.Tensor) -> Landing | Fill:
    """The piece for consecutive bytes that fill contiguous memory."""
    flat = target.view(-1)
    size = flat.numel() * DTYPES[dtype]
    is_lazy = flat.is_conj() or flat.is_neg()  # their values differ from their memory
    if size >= STRAIGHT_BYTES_MIN and flat.device.type == "cpu" and not is_lazy:
        return Landing(begin, flat.view(torch.uint8).numpy().data)
    return Fill(begin, begin + size, dtype, (flat.numel(),), _ALL, flat)


def _strides(shape: Sequence[int], item: int) -> list[int]:
    """Bytes from one index to the next, by dimension."""
    found = [item] * len(shape)
    for place in range(len(shape) - 2, -1, -1):
        found[place] = found[place + 1] * shape[place + 1]
    return found


def _is_run(shape: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether the region's bytes are consecutive: all dimensions are whole behind the first of more than one index."""
    place = next((place for place, size in enumerate(sizes) if size > 1), len(sizes))
    return tuple(sizes[place + 1 :]) == tuple(shape[place + 1 :])


def _widest_gap(strides: Sequence[int], sizes: Sequence[int], item: int) -> int:
    """The most bytes between two neighbouring elements of the region, or beside it in a row."""
    extent, widest = item, 0
    for place in range(len(sizes) - 1, -1, -1):
        if sizes[place] > 1 or place == 0:
            widest = max(widest, strides[place] - extent)
        extent += (sizes[place] - 1) * strides[place]
    return widest
