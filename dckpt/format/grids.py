"""Regular sharding in a few numbers: a grid of equal parts, one file a cell (FORMAT.md, section 7.1)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np

from dckpt.format.index_checks import Ints

Levels = tuple[int, ...]
"""Parts along one dimension, of parts: (8, 512) is 8 parts, each cut into 512. () is no cut."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Parts along each dimension, each cell in its own file.

    One level of P parts cuts a length S into pieces of ceil(S / P); the last may be shorter, later ones are empty: the rule of
    `torch.chunk`, by which FSDP2 and tensor parallelism shard. Further levels cut each piece, by its own length, by the
    same rule. `levels` says so for the first dimensions; the others are not cut. `files`: number of the file of each cell,
    row-major, and along a dimension the first level is the major one.
    """

    levels: tuple[Levels, ...]
    files: tuple[int, ...]

    def __post_init__(self) -> None:
        assert math.prod(self.parts) == len(self.files), (self.levels, len(self.files))

    @property
    def parts(self) -> tuple[int, ...]:
        """Number of parts along each of the first dimensions."""
        return parts_of(self.levels)


def parts_of(levels: Iterable[Levels]) -> tuple[int, ...]:
    """Number of parts along each dimension."""
    return tuple(math.prod(counts) for counts in levels)


def cut_length(size: int, counts: Levels, at: int) -> tuple[int, int]:
    """Offset and length of part number `at` of a dimension of length `size`."""
    offset = 0
    below = math.prod(counts)
    for count in counts:
        below //= count
        number, at = divmod(at, below)
        length = -(-size // count)
        begin = min(number * length, size)
        offset += begin
        size = min(length, size - begin)
    return offset, size


@lru_cache(maxsize=256)
def _cuts(size: int, counts: Levels) -> tuple[Ints, Ints]:
    """Offsets and lengths of all parts of a dimension."""
    offsets = np.zeros(1, dtype=np.int64)
    sizes = np.full(1, size, dtype=np.int64)
    for count in counts:
        lengths = -(-sizes // count)
        begins = np.minimum(np.arange(count, dtype=np.int64)[None, :] * lengths[:, None], sizes[:, None])
        offsets = (offsets[:, None] + begins).reshape(-1)
        sizes = np.minimum(lengths[:, None], sizes[:, None] - begins).reshape(-1)
    return offsets, sizes


def has_empty_cells(shape: Sequence[int], levels: Sequence[Levels]) -> bool:
    """Whether a cell has no elements. Not always the last one: 9 in (2, 4) parts is 2, 2, 1, 0 and 1, 1, 1, 1."""
    return 0 in shape or any(
        int(_cuts(size, counts)[1].min()) == 0 for size, counts in zip(shape, levels, strict=False) if counts
    )


def cell_box(
    shape: Sequence[int], levels: Sequence[Levels], place: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and sizes of the box at `place` in the grid."""
    offsets, sizes = [], []
    for dimension, size in enumerate(shape):
        is_cut = dimension < len(levels)
        offset, length = cut_length(size, levels[dimension], place[dimension]) if is_cut else (0, size)
        offsets.append(offset)
        sizes.append(length)
    return tuple(offsets), tuple(sizes)


def cells_overlapping(
    shape: Sequence[int], levels: Sequence[Levels], offsets: Sequence[int], sizes: Sequence[int]
) -> Iterable[tuple[int, ...]]:
    """Places of the cells whose box shares an element with the given, non-empty box; ascending."""
    return product(
        *(
            _parts_overlapping(shape[dimension], counts, offsets[dimension], sizes[dimension])
            for dimension, counts in enumerate(levels)
        )
    )


def _parts_overlapping(size: int, counts: Levels, offset: int, wanted: int) -> Iterable[int]:
    if len(counts) <= 1:
        count = counts[0] if counts else 1
        length = -(-size // count)
        first = offset // length
        return range(first, min((offset + wanted - 1) // length, count - 1) + 1)
    begins, lengths = _cuts(size, counts)
    found: list[int] = np.flatnonzero((begins < offset + wanted) & (begins + lengths > offset) & (lengths > 0)).tolist()
    return found


def cell_number(parts: Sequence[int], place: Sequence[int]) -> int:
    """The row-major number of a cell."""
    number = 0
    for count, at in zip(parts, place, strict=True):
        number = number * count + at
    return number


def cell_place(parts: Sequence[int], number: int) -> tuple[int, ...]:
    """The place of a cell by its row-major number."""
    place = []
    for count in reversed(parts):
        number, at = divmod(number, count)
        place.append(at)
    return tuple(reversed(place))


def cell_volumes(heads: Ints, tails: Ints, levels: Sequence[Levels], place: Sequence[int]) -> Ints:
    """Elements in the box at `place` of many tensors at once.

    heads: int64[tensors, len(levels)], their first dimensions; tails: int64[tensors], the product of the others.
    """
    volumes = tails.copy()
    for dimension, (counts, at) in enumerate(zip(levels, place, strict=True)):
        size = heads[:, dimension]
        below = math.prod(counts)
        for count in counts:
            below //= count
            number, at = divmod(at, below)
            length = -(-size // count)
            size = np.clip(size - number * length, 0, length)
        volumes *= size
    return volumes


def grid_totals(heads: Ints, tails: Ints, item_bytes: Ints, levels: Sequence[Levels]) -> tuple[Ints, Ints]:
    """Bytes in each cell, summed over tensors that share the grid (int64[cells], row-major), and how many chunks all have.

    Tensors with equal first dimensions are summed together: an outer product for each tensor would be large.
    """
    totals = np.zeros(math.prod(parts_of(levels)), dtype=np.int64)
    num_chunks = np.zeros(1, dtype=np.int64)
    kinds, inverse = np.unique(heads, axis=0, return_inverse=True)
    weights, members = np.zeros((2, len(kinds)), dtype=np.int64)
    np.add.at(weights, inverse.reshape(-1), tails * item_bytes)
    np.add.at(members, inverse.reshape(-1), np.minimum(tails, 1))
    for kind, weight, count in zip(kinds, weights.tolist(), members.tolist(), strict=True):
        box = np.ones(1, dtype=np.int64)
        for size, counts in zip(kind.tolist(), levels, strict=True):
            box = np.multiply.outer(box, _cuts(size, counts)[1]).reshape(-1)
        totals += box * weight
        num_chunks += np.count_nonzero(box) * count
    return totals, num_chunks


def find_grid(
    shape: Sequence[int], boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
) -> tuple[Levels, ...] | None:
    """Levels if the boxes, ascending by offsets, are exactly the non-empty cells of a grid of one level; else None."""
    if not boxes or math.prod(shape) == 0:
        return None
    parts = tuple(len({offsets[dimension] for offsets, _ in boxes}) for dimension in range(len(shape)))
    if math.prod(parts) != len(boxes):
        return None
    while parts and parts[-1] == 1:
        parts = parts[:-1]
    levels = tuple((count,) if count > 1 else () for count in parts)
    for (offsets, sizes), place in zip(boxes, product(*(range(count) for count in parts)), strict=True):
        if cell_box(shape, levels, place) != (tuple(offsets), tuple(sizes)):
            return None
    return levels
