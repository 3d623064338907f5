"""What every rank of a loading job wants of a saved chunk: from the classes of ranks alone, so all ranks find the same."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from dckpt.format.grids import cell_box, cell_place, cells_overlapping, cut_length, parts_of
from dckpt.format.index import Chunk
from dckpt.planning.structure import Box, Cut, RankClass, TensorRow

Ints: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Region:
    """A part of a chunk that one rank wants: for box `place` of row `row` of its structure, where it begins at `origin`."""

    row: int
    place: int
    offsets: tuple[int, ...]  # inside the chunk
    sizes: tuple[int, ...]
    origin: tuple[int, ...]  # inside the rank's box


@dataclass(frozen=True, slots=True)
class Intervals:
    """Byte ranges of a chunk, relative to its begin, each wanted by all ranks of one group. int64, equally long."""

    begins: Ints
    ends: Ints
    groups: Ints


@dataclass
class _Class:
    ranks: RankClass
    numbers: dict[str, list[int]]  # name -> rows
    cells: dict[Cut, dict[int, int]] = field(default_factory=dict)  # cut -> rank -> cell
    first_group: dict[Cut | None, int] = field(default_factory=dict)


class Wants:
    """The destinations of all ranks. Classes come in the same order on every rank; a rank is in exactly one."""

    def __init__(self, classes: Sequence[RankClass]) -> None:
        self._classes = [_Class(ranks, _numbers(ranks)) for ranks in classes]
        self._class_of = {rank: found for found in self._classes for rank in found.ranks.ranks}
        self._groups: list[tuple[int, ...]] = []
        self._known: dict[tuple[object, ...], Intervals] = {}
        self._boxes: dict[tuple[int, int], list[Box]] = {}

    @property
    def num_groups(self) -> int:
        """Groups named by intervals so far; their numbers are below it."""
        return len(self._groups)

    def group(self, number: int) -> tuple[int, ...]:
        """The ranks of a group, ascending."""
        return self._groups[number]

    def group_sizes(self) -> Ints:
        """Ranks in each group."""
        return np.array([len(group) for group in self._groups], dtype=np.int64)

    # -- one rank ------------------------------------------------------------------------------------------------------

    def regions(self, rank: int, name: str, chunk: Chunk) -> Iterator[Region]:
        """What `rank` wants of a chunk of the saved tensor `name`, by row and box of its structure."""
        found = self._class_of[rank]
        for number in found.numbers.get(name, ()):
            for place, (offsets, sizes) in enumerate(self._boxes_of(found, number, rank)):
                shared = _overlap(offsets, sizes, chunk.offsets, chunk.sizes)
                if shared is not None:
                    begins, extents = shared
                    inside = tuple(b - c for b, c in zip(begins, chunk.offsets, strict=True))
                    origin = tuple(b - o for b, o in zip(begins, offsets, strict=True))
                    yield Region(number, place, inside, extents, origin)

    def _boxes_of(self, found: _Class, number: int, rank: int) -> list[Box]:
        row = found.ranks.structure.rows[number]
        if row.cut is None:
            return found.ranks.boxes_of(row, rank)
        boxes = self._boxes.get((number, rank))
        if boxes is None:
            boxes = self._boxes[number, rank] = self._cell_boxes(found, row, row.cut, rank)
        return boxes

    def _cell_boxes(self, found: _Class, row: TensorRow, cut: Cut, rank: int) -> list[Box]:
        cells = found.cells.get(cut)
        if cells is None:
            holders = found.ranks.holders(cut)
            cells = {int(holder): cell for cell, row_of in enumerate(holders.tolist()) for holder in row_of}
            found.cells[cut] = cells
        cell = cells.get(rank)
        if cell is None:
            return []
        levels = found.ranks.levels(cut)
        box = cell_box(row.shape, levels, cell_place(parts_of(levels), cell))
        return [] if 0 in box[1] else [box]

    # -- all ranks -----------------------------------------------------------------------------------------------------

    def intervals(self, name: str, chunk: Chunk, item_bytes: int) -> list[Intervals]:
        """Of a chunk, for each row that wants some of it, the range from the first to the last wanted byte by group."""
        found = []
        for number, ranks in enumerate(self._classes):
            for row_number in ranks.numbers.get(name, ()):
                row = ranks.ranks.structure.rows[row_number]
                # Layers of a model are alike: what holds for a chunk holds for all of its shape and place.
                key = (number, row.cut, row.boxes, row.shape, chunk.offsets, chunk.sizes, item_bytes)
                known = self._known.get(key)
                if known is None:
                    known = self._known[key] = self._find_intervals(ranks, row, chunk, item_bytes)
                if len(known.begins):
                    found.append(known)
        return found

    def _find_intervals(self, ranks: _Class, row: TensorRow, chunk: Chunk, item_bytes: int) -> Intervals:
        if row.cut is None:
            return self._listed_intervals(ranks, row, chunk, item_bytes)
        levels = ranks.ranks.levels(row.cut)
        parts = parts_of(levels)
        strides = element_strides(chunk.sizes)
        firsts, lasts, cells = [], [], []
        for dimension, (offset, size, stride) in enumerate(zip(chunk.offsets, chunk.sizes, strides, strict=True)):
            if dimension >= len(levels):
                firsts.append(np.zeros(1, dtype=np.int64))
                lasts.append(np.full(1, (size - 1) * stride, dtype=np.int64))
                cells.append(np.zeros(1, dtype=np.int64))
                continue
            counts, below = levels[dimension], math.prod(parts[dimension + 1 :])
            numbers = [place[0] for place in cells_overlapping((row.shape[dimension],), (counts,), (offset,), (size,))]
            spans = [cut_length(row.shape[dimension], counts, at) for at in numbers]
            begins = np.array([max(begin, offset) - offset for begin, _ in spans], dtype=np.int64)
            ends = np.array([min(begin + length, offset + size) - offset for begin, length in spans], dtype=np.int64)
            firsts.append(begins * stride)
            lasts.append((ends - 1) * stride)
            cells.append(np.array(numbers, dtype=np.int64) * below)
        first_group = self._first_group(ranks, row.cut)
        found = Intervals(
            begins=_outer_sum(firsts) * item_bytes,
            ends=(_outer_sum(lasts) + 1) * item_bytes,
            groups=_outer_sum(cells) + first_group,
        )
        has_ranks = np.array([bool(self._groups[group]) for group in found.groups.tolist()], dtype=bool)
        return Intervals(found.begins[has_ranks], found.ends[has_ranks], found.groups[has_ranks])

    def _listed_intervals(self, ranks: _Class, row: TensorRow, chunk: Chunk, item_bytes: int) -> Intervals:
        boxes = row.boxes if row.boxes is not None else (((0,) * len(row.shape), row.shape),)
        strides = element_strides(chunk.sizes)
        begins, ends = [], []
        for offsets, sizes in boxes:
            shared = _overlap(offsets, sizes, chunk.offsets, chunk.sizes)
            if shared is None:
                continue
            inside = [b - c for b, c in zip(shared[0], chunk.offsets, strict=True)]
            first = sum(at * stride for at, stride in zip(inside, strides, strict=True))
            last = first + sum((size - 1) * stride for size, stride in zip(shared[1], strides, strict=True))
            begins.append(first * item_bytes)
            ends.append((last + 1) * item_bytes)
        groups = np.full(len(begins), self._first_group(ranks, None), dtype=np.int64)
        return Intervals(np.array(begins, dtype=np.int64), np.array(ends, dtype=np.int64), groups)

    def _first_group(self, ranks: _Class, cut: Cut | None) -> int:
        """The number of the group of all ranks of the class, or of the cut's first cell; the others follow it."""
        found = ranks.first_group.get(cut)
        if found is None:
            found = ranks.first_group[cut] = len(self._groups)
            members = frozenset(ranks.ranks.ranks)
            if cut is None:
                self._groups.append(tuple(sorted(members)))
            else:
                # A mesh may name ranks of another class: those speak for themselves.
                holders = ranks.ranks.holders(cut).tolist()
                self._groups += [tuple(sorted(rank for rank in cell if rank in members)) for cell in holders]
        return found


def _numbers(ranks: RankClass) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for number, row in enumerate(ranks.structure.rows):
        found.setdefault(row.name, []).append(number)
    return found


def element_strides(sizes: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides, in elements."""
    strides, step = [], 1
    for size in reversed(sizes):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def _outer_sum(parts: Sequence[Ints]) -> Ints:
    found: Ints = reduce(lambda a, b: np.add.outer(a, b).reshape(-1), parts, np.zeros(1, dtype=np.int64))
    return found


def _overlap(
    offsets_a: Sequence[int], sizes_a: Sequence[int], offsets_b: Sequence[int], sizes_b: Sequence[int]
) -> Box | None:
    begins = tuple(max(a, b) for a, b in zip(offsets_a, offsets_b, strict=True))
    ends = (min(a + s, b + t) for a, s, b, t in zip(offsets_a, sizes_a, offsets_b, sizes_b, strict=True))
    sizes = tuple(end - begin for begin, end in zip(begins, ends, strict=True))
    return None if any(size <= 0 for size in sizes) else (begins, sizes)
