"""Regular sharding in a few numbers: a grid of equal parts, one file a cell (FORMAT.md, section 7.1)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from dckpt.format.index_checks import Ints


@dataclass(frozen=True, slots=True)
class Grid:
    """`parts[d]` equal parts along dimension d (1 along the dimensions that are not named), each in its own file.

    The part length of a tensor of shape S is ceil(S[d] / parts[d]), the last part may be shorter, later ones are empty:
    the rule of `torch.chunk`, by which FSDP2 shards. `files`: number of the file of each cell, row-major.
    """

    parts: tuple[int, ...]
    files: tuple[int, ...]

    def __post_init__(self) -> None:
        assert math.prod(self.parts) == len(self.files), (self.parts, len(self.files))


def part_lengths(shape: Sequence[int], parts: Sequence[int]) -> tuple[int, ...]:
    """Length of a part along each dimension of `parts`."""
    return tuple(-(-size // count) for size, count in zip(shape, parts, strict=False))


def cell_box(
    shape: Sequence[int], parts: Sequence[int], place: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and sizes of the box at `place` in the grid."""
    offsets, sizes = [], []
    for dimension, size in enumerate(shape):
        if dimension < len(parts):
            length = -(-size // parts[dimension])
            offset = min(place[dimension] * length, size)
            offsets.append(offset)
            sizes.append(min(length, size - offset))
        else:
            offsets.append(0)
            sizes.append(size)
    return tuple(offsets), tuple(sizes)


def cells_overlapping(
    shape: Sequence[int], parts: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]
) -> Iterator[tuple[int, ...]]:
    """Places of the cells whose box shares an element with the given, non-empty box; ascending."""
    ranges = []
    for dimension, length in enumerate(part_lengths(shape, parts)):
        if sizes[dimension] <= 0 or length == 0:
            return iter(())
        first = offsets[dimension] // length
        last = (offsets[dimension] + sizes[dimension] - 1) // length
        ranges.append(range(first, min(last, parts[dimension] - 1) + 1))
    return product(*ranges)


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


def cell_volumes(heads: Ints, tails: Ints, parts: Sequence[int], place: Sequence[int]) -> Ints:
    """Elements in the box at `place` of many tensors at once.

    heads: int64[tensors, len(parts)], their first dimensions; tails: int64[tensors], the product of the others.
    """
    volumes = tails.copy()
    for dimension, (count, at) in enumerate(zip(parts, place, strict=True)):
        size = heads[:, dimension]
        length = -(-size // count)
        volumes *= np.clip(size - at * length, 0, length)
    return volumes


def grid_totals(heads: Ints, tails: Ints, item_bytes: Ints, parts: Sequence[int]) -> Ints:
    """Bytes in each cell, summed over tensors that share the grid: int64[cells], row-major.

    One outer product a tensor group would be large; the sum runs over tensors with equal lengths together.
    """
    totals = np.zeros(math.prod(parts), dtype=np.int64)
    kinds, inverse = np.unique(heads, axis=0, return_inverse=True)
    weights = np.zeros(len(kinds), dtype=np.int64)
    np.add.at(weights, inverse.reshape(-1), tails * item_bytes)
    for kind, weight in zip(kinds, weights.tolist(), strict=True):
        box: npt.NDArray[np.int64] = np.ones(1, dtype=np.int64)
        for size, count in zip(kind.tolist(), parts, strict=True):
            length = -(-size // count)
            along = np.clip(size - np.arange(count, dtype=np.int64) * length, 0, length)
            box = np.multiply.outer(box, along).reshape(-1)
        totals += box * weight
    return totals


def find_grid(shape: Sequence[int], boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> tuple[int, ...] | None:
    """`parts` if the boxes, ascending by offsets, are exactly the non-empty cells of a grid; else None."""
    if not shape or not boxes or math.prod(shape) == 0:
        return (() if len(boxes) == 1 else None) if not shape else None
    parts = tuple(len({offsets[dimension] for offsets, _ in boxes}) for dimension in range(len(shape)))
    if math.prod(parts) != len(boxes):
        return None
    while parts and parts[-1] == 1:
        parts = parts[:-1]
    for (offsets, sizes), place in zip(boxes, product(*(range(count) for count in parts)), strict=True):
        if cell_box(shape, parts, place) != (tuple(offsets), tuple(sizes)):
            return None
    return parts
