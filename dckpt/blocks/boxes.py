"""Boxes of arrays as ranges of bytes: which elements a range of a file holds, and where they lie in others. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from dckpt.format.index import Chunk

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes

SPAN_BYTES_MAX = 8 * 2**20
"""Read at once, unless one run of contiguous elements is longer."""
GAP_BYTES_MAX = 512 * 1024
"""Read and thrown away rather than asked for separately."""

_TYPES: dict[int, np.dtype[Any]] = {1: np.dtype("u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}


def range_boxes(sizes: Sequence[int], first: int, stop: int) -> Iterator[Box]:
    """Boxes that together are the elements `first` to `stop`, row-major, of an array; each is contiguous in it. Ascending."""
    if first >= stop:
        return
    if not sizes:
        yield (), ()
        return
    row = math.prod(sizes[1:])
    top, bottom = first // row, -(-stop // row)  # rows that are touched
    head = top + (first > top * row)
    tail = bottom - (stop < bottom * row)
    if head > tail:  # within one row
        yield from _in_row(sizes, top, first - top * row, stop - top * row)
        return
    if head > top:
        yield from _in_row(sizes, top, first - top * row, row)
    if tail > head:
        yield (head, *([0] * (len(sizes) - 1))), (tail - head, *sizes[1:])
    if bottom > tail:
        yield from _in_row(sizes, tail, 0, stop - tail * row)


def _in_row(sizes: Sequence[int], row: int, first: int, stop: int) -> Iterator[Box]:
    for offsets, found in range_boxes(sizes[1:], first, stop):
        yield (row, *offsets), (1, *found)


def intersect(one: Box, other: Box) -> Box | None:
    """The elements that two boxes share; None if there are none."""
    begins = tuple(max(a, b) for a, b in zip(one[0], other[0], strict=True))
    ends = (min(a + s, b + t) for a, s, b, t in zip(one[0], one[1], other[0], other[1], strict=True))
    sizes = tuple(end - begin for begin, end in zip(begins, ends, strict=True))
    return None if any(size <= 0 for size in sizes) else (begins, sizes)


def strides_of(sizes: Sequence[int], item: int) -> tuple[int, ...]:
    """Bytes between neighbours along each dimension of a row-major array."""
    found = []
    step = item
    for size in reversed(sizes):
        found.append(step)
        step *= size
    return tuple(reversed(found))


def offset_of(offsets: Sequence[int], strides: Sequence[int]) -> int:
    """Where an element begins in its array, in bytes."""
    return sum(at * step for at, step in zip(offsets, strides, strict=True))


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes `begin` to `end` of a file hold a region of a chunk, its elements `source_strides` apart from `begin` on; it goes to
    `target_begin` of a piece with `target_strides`."""

    file: int
    begin: int
    end: int
    sizes: tuple[int, ...]
    item: int
    source_strides: tuple[int, ...]
    target_begin: int
    target_strides: tuple[int, ...]

    def run(self, data: memoryview, target: memoryview) -> None:
        """Copies from `data`, which begins at `begin`, into the piece."""
        kind = _TYPES[self.item]
        source: npt.NDArray[np.generic] = np.ndarray(self.sizes, kind, data, 0, self.source_strides)
        into: npt.NDArray[np.generic] = np.ndarray(self.sizes, kind, target, self.target_begin, self.target_strides)
        into[...] = source


@dataclass(slots=True)
class Span:
    """One read: bytes `begin` to `end` of a file, and what is copied out of them."""

    file: int
    begin: int
    end: int
    copies: list[Copy] = field(default_factory=list)


def plan_copies(chunks: Sequence[Chunk], box: Box, item: int, offset: int, nbytes: int, at: int) -> Iterator[Copy]:
    """What fills `nbytes` bytes from byte `offset` on of a tensor's `box` (row-major), out of the tensor's saved `chunks`.

    `at`: where those bytes begin in the piece. Ranges are whole elements.
    """
    for offsets, sizes in range_boxes(box[1], offset // item, (offset + nbytes) // item):
        # The part is contiguous in the box, so it lies in the piece as an array of its own.
        strides = strides_of(sizes, item)
        part = (tuple(a + b for a, b in zip(box[0], offsets, strict=True)), sizes)
        for chunk in chunks:
            shared = intersect(part, (chunk.offsets, chunk.sizes))
            if shared is not None:
                inside = offset_of([a - b for a, b in zip(shared[0], part[0], strict=True)], strides)
                yield from _copies_from(chunk, shared, item, at + inside, strides)
        at += math.prod(sizes) * item


def _copies_from(
    chunk: Chunk, region: Box, item: int, target_begin: int, target_strides: tuple[int, ...]
) -> Iterator[Copy]:
    strides = strides_of(chunk.sizes, item)
    inside = tuple(a - b for a, b in zip(region[0], chunk.offsets, strict=True))
    for offsets, sizes in _split(region[1], strides, item):
        begin = chunk.begin + offset_of(inside, strides) + offset_of(offsets, strides)
        yield Copy(
            file=chunk.file,
            begin=begin,
            end=begin + _extent(sizes, strides, item),
            sizes=sizes,
            item=item,
            source_strides=strides,
            target_begin=target_begin + offset_of(offsets, target_strides),
            target_strides=target_strides,
        )


def _extent(sizes: Sequence[int], strides: Sequence[int], item: int) -> int:
    """Bytes from the first element of a region to the end of its last one."""
    return sum((size - 1) * step for size, step in zip(sizes, strides, strict=True)) + item


def _split(sizes: tuple[int, ...], strides: Sequence[int], item: int) -> Iterator[Box]:
    """The region in parts that are worth one read each: neither too long nor with long gaps between their elements."""
    origin = (0,) * len(sizes)
    extent = _extent(sizes, strides, item)
    dimension = next((dim for dim, size in enumerate(sizes) if size > 1), None)
    if dimension is None or extent == math.prod(sizes) * item:
        yield origin, sizes
        return
    inner = extent - (sizes[dimension] - 1) * strides[dimension]
    if strides[dimension] - inner > GAP_BYTES_MAX:
        step = 1
    elif extent > SPAN_BYTES_MAX:
        step = max(1, sizes[dimension] // 2)
    else:
        yield origin, sizes
        return
    for first in range(0, sizes[dimension], step):
        length = min(step, sizes[dimension] - first)
        for offsets, found in _split((*sizes[:dimension], length, *sizes[dimension + 1 :]), strides, item):
            yield (*offsets[:dimension], offsets[dimension] + first, *offsets[dimension + 1 :]), found


def plan_spans(copies: Sequence[Copy]) -> list[Span]:
    """The copies as reads, in the order of the files; neighbours share one if the gap and the whole stay small."""
    spans: list[Span] = []
    for copy in sorted(copies, key=lambda found: (found.file, found.begin, found.end)):
        last = spans[-1] if spans else None
        if (
            last is not None
            and last.file == copy.file
            and copy.begin - last.end <= GAP_BYTES_MAX
            and max(last.end, copy.end) - last.begin <= SPAN_BYTES_MAX
        ):
            last.end = max(last.end, copy.end)
            last.copies.append(copy)
        else:
            spans.append(Span(copy.file, copy.begin, copy.end, [copy]))
    return spans
