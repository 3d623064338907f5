"""The elements of a rank's boxes that lie in a byte range of a file: what a reader of that range has for that rank."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dckpt.format.index import Chunk
from dckpt.planning.structure import Box
from dckpt.planning.wants import Wants, element_strides


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A chunk with what is needed to find it in its file."""

    name: str
    item_bytes: int
    chunk: Chunk

    @property
    def begin(self) -> int:
        """Its first byte in the file."""
        return self.chunk.begin

    @property
    def end(self) -> int:
        """The byte after its last one."""
        return self.chunk.begin + math.prod(self.chunk.sizes) * self.item_bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements of a byte range for one box of a rank.

    In the range they begin at byte `offset` with `strides` (bytes) and `sizes`; in box `place` of row `row` of the rank's
    structure they begin at `origin`.
    """

    row: int
    place: int
    item_bytes: int
    offset: int
    strides: tuple[int, ...]
    sizes: tuple[int, ...]
    origin: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.sizes) * self.item_bytes


class FileChunks:
    """The chunks of one file, ascending by begin."""

    def __init__(self, chunks: Sequence[StoredChunk]) -> None:
        self.chunks = sorted(chunks, key=lambda stored: stored.begin)
        self._begins = [stored.begin for stored in self.chunks]

    @property
    def is_aligned(self) -> bool:
        """Whether every element lies within one block: whoever cuts between blocks cuts between elements."""
        return all(stored.begin % stored.item_bytes == 0 for stored in self.chunks)

    def within(self, begin: int, end: int) -> Iterator[StoredChunk]:
        """Those that have bytes in the range."""
        for stored in self.chunks[max(0, bisect_right(self._begins, begin) - 1) :]:
            if stored.begin >= end:
                return
            if stored.end > begin:
                yield stored


@dataclass(frozen=True, slots=True)
class Part:
    """A box of a chunk, at `offsets` inside it, that goes to `origin` of box `place` of row `row` of a rank's structure."""

    stored: StoredChunk
    row: int
    place: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    origin: tuple[int, ...]


def find_parts(wants: Wants, chunks: FileChunks, rank: int, begin: int, end: int) -> Iterator[Part]:
    """What `rank` wants of bytes `begin` to `end` of the file, in one order on every rank. Both are ends of elements."""
    for stored in chunks.within(begin, end):
        item = stored.item_bytes
        first, stop = (begin - stored.begin) // item, (end - stored.begin) // item
        for region in wants.regions(rank, stored.name, stored.chunk):
            for offsets, extents in clip_box(stored.chunk.sizes, region.offsets, region.sizes, first, stop):
                origin = tuple(o - r + to for o, r, to in zip(offsets, region.offsets, region.origin, strict=True))
                yield Part(stored, region.row, region.place, offsets, extents, origin)


def find_pieces(wants: Wants, chunks: FileChunks, rank: int, begin: int, end: int) -> Iterator[Piece]:
    """As `find_parts`, as they lie in memory that holds these bytes."""
    for part in find_parts(wants, chunks, rank, begin, end):
        item = part.stored.item_bytes
        strides = element_strides(part.stored.chunk.sizes)
        at = sum(o * stride for o, stride in zip(part.offsets, strides, strict=True))
        offset = part.stored.begin + at * item - begin
        byte_strides = tuple(stride * item for stride in strides)
        yield Piece(part.row, part.place, item, offset, byte_strides, part.sizes, part.origin)


def clip_box(
    shape: Sequence[int], offsets: tuple[int, ...], sizes: tuple[int, ...], first: int, stop: int
) -> Iterator[Box]:
    """The elements of a box whose row-major number in `shape` is in `first` to `stop` (exclusive), as boxes, ascending.

    A range cuts a box into at most two boxes a dimension and one more.
    """
    if not shape:
        if first <= 0 < stop:
            yield (), ()
        return
    inner = math.prod(shape[1:])
    begin = max(offsets[0], first // inner)
    end = min(offsets[0] + sizes[0], -(-stop // inner))
    if begin >= end:
        return
    rest, extents = offsets[1:], sizes[1:]
    if first > begin * inner:
        for o, s in clip_box(shape[1:], rest, extents, first - begin * inner, stop - begin * inner):
            yield (begin, *o), (1, *s)
        begin += 1
    has_tail = begin < end and stop < end * inner
    whole = end - 1 if has_tail else end
    if begin < whole:
        yield (begin, *rest), (whole - begin, *extents)
    if has_tail:
        for o, s in clip_box(shape[1:], rest, extents, 0, stop - whole * inner):
            yield (whole, *o), (1, *s)
