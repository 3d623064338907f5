"""What a rank holds, without its numbers: names, dtypes, shapes, and how each tensor is cut.

Ranks that hold alike pieces of the same tensors have equal structures, so a job of thousands of ranks has few distinct ones:
each travels once, under its digest. What a rank's own piece is follows from the structure, its meshes, and its number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dckpt.format.checksum import digest_bytes
from dckpt.format.grids import Levels, cell_box, cell_place, parts_of
from dckpt.format.shard_file import DTYPES
from dckpt.format.values import dump_json, load_json

Box: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes
Ranks: TypeAlias = npt.NDArray[np.int64]

BLOB_BYTES_MAX = 2**31


@dataclass(frozen=True, slots=True)
class Cut:
    """Regular sharding: the axes of mesh number `mesh` that cut each of the first dimensions, the first cut first."""

    mesh: int
    axes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One tensor: global `shape`; whole on every rank that has it, cut regularly, or in listed boxes.

    is_checked: plain, so that its bytes are compared between ranks. is_frozen: a parameter that is not trained.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    is_checked: bool = False
    is_frozen: bool = False
    cut: Cut | None = None
    boxes: tuple[Box, ...] | None = None

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return DTYPES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.item_bytes


@dataclass(frozen=True)
class MeshTable:
    """Which rank stands at which place of a device mesh: `ranks` row-major."""

    shape: tuple[int, ...]
    ranks: tuple[int, ...]

    @cached_property
    def _hash(self) -> int:
        return hash((self.shape, self.ranks))

    def __hash__(self) -> int:
        # Asked for once a tensor; the ranks are as many as the job has.
        return self._hash


@dataclass(frozen=True)
class Structure:
    """The tensors of one rank, in the order in which it captured them."""

    rows: tuple[TensorRow, ...]

    @cached_property
    def blob(self) -> bytes:
        """As it travels; equal structures have equal bytes."""
        return dump_json([_row_to_json(row) for row in self.rows], limit=BLOB_BYTES_MAX)

    @cached_property
    def key(self) -> str:
        """Digest of the blob, 32 hex digits."""
        return digest_bytes(self.blob)

    @classmethod
    def decode(cls, blob: bytes) -> Structure:
        """The structure that another rank of this job encoded."""
        return cls(tuple(_row_from_json(row) for row in load_json(blob, key="structure", limit=BLOB_BYTES_MAX)))


@dataclass(frozen=True)
class Meshes:
    """The device meshes that a structure's cuts refer to, by number."""

    tables: tuple[MeshTable, ...] = ()

    @cached_property
    def blob(self) -> bytes:
        """As it travels; equal meshes have equal bytes."""
        return dump_json([[table.shape, table.ranks] for table in self.tables], limit=BLOB_BYTES_MAX)

    @cached_property
    def key(self) -> str:
        """Digest of the blob, 32 hex digits."""
        return digest_bytes(self.blob)

    @classmethod
    def decode(cls, blob: bytes) -> Meshes:
        """The meshes that another rank of this job encoded."""
        rows = load_json(blob, key="meshes", limit=BLOB_BYTES_MAX)
        return cls(tuple(MeshTable(tuple(shape), tuple(ranks)) for shape, ranks in rows))


@dataclass(frozen=True)
class RankClass:
    """Ranks with one structure on the same meshes."""

    structure: Structure
    meshes: Meshes
    ranks: tuple[int, ...]
    _holders: dict[Cut, Ranks] = field(default_factory=dict, compare=False)

    def holders(self, cut: Cut) -> Ranks:
        """int64[cells, replicas]: the ranks that hold each cell of the grid, cells row-major."""
        found = self._holders.get(cut)
        if found is None:
            table = self.meshes.tables[cut.mesh]
            cutting = [axis for axes in cut.axes for axis in axes]
            others = [axis for axis in range(len(table.shape)) if axis not in cutting]
            places = np.array(table.ranks, dtype=np.int64).reshape(table.shape)
            cells = math.prod(table.shape[axis] for axis in cutting)
            found = self._holders[cut] = places.transpose(cutting + others).reshape(cells, -1)
        return found

    def levels(self, cut: Cut) -> tuple[Levels, ...]:
        """How each of the first dimensions is cut."""
        return grid_levels(cut, self.meshes.tables[cut.mesh])

    def boxes_of(self, row: TensorRow, rank: int) -> list[Box]:
        """The boxes of a tensor that `rank` holds; none if it holds nothing of it."""
        if row.boxes is not None:
            return list(row.boxes)
        if row.cut is None:
            return [((0,) * len(row.shape), row.shape)] if row.nbytes else []
        found = np.flatnonzero((self.holders(row.cut) == rank).any(axis=1))
        if not len(found):
            return []
        levels = self.levels(row.cut)
        box = cell_box(row.shape, levels, cell_place(parts_of(levels), int(found[0])))
        return [] if 0 in box[1] else [box]


def grid_levels(cut: Cut, table: MeshTable) -> tuple[Levels, ...]:
    """The levels of each dimension that the cut names; axes of one rank cut nothing."""
    levels = tuple(tuple(table.shape[axis] for axis in axes if table.shape[axis] > 1) for axes in cut.axes)
    while levels and not levels[-1]:
        levels = levels[:-1]
    return levels


def _row_to_json(row: TensorRow) -> list[Any]:
    cut = None if row.cut is None else [row.cut.mesh, row.cut.axes]
    return [row.name, row.dtype, row.shape, int(row.is_checked), int(row.is_frozen), cut, row.boxes]


def _row_from_json(found: Sequence[Any]) -> TensorRow:
    name, dtype, shape, is_checked, is_frozen, cut, boxes = found
    return TensorRow(
        name=name,
        dtype=dtype,
        shape=tuple(shape),
        is_checked=bool(is_checked),
        is_frozen=bool(is_frozen),
        cut=None if cut is None else Cut(cut[0], tuple(tuple(axes) for axes in cut[1])),
        boxes=None if boxes is None else tuple((tuple(offsets), tuple(sizes)) for offsets, sizes in boxes),
    )
