"""What a layout index answers: where every chunk of every tensor lies (FORMAT.md, section 7)."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dckpt.format import grids, index_checks
from dckpt.format.refusal import corrupt
from dckpt.format.shard_file import DTYPES

Columns: TypeAlias = dict[str, npt.NDArray[Any]]

FILE_TABLES_KEPT = 512
"""Files whose tables stay in memory; a load touches few, a tool that walks over all needs each once."""


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """A tensor as a whole."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype]

    def chunk_nbytes(self, chunk: Chunk) -> int:
        """Bytes of one of its chunks."""
        return math.prod(chunk.sizes) * DTYPES[self.dtype]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor and where it lies: `file` is a number in the index's `files`, -1 for an empty box."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: int
    begin: int


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """Derived from the columns once: names as strings, where the rows of each tensor, chunk and grid begin."""

    names: tuple[str, ...]
    item_bytes: index_checks.Ints
    shape_begins: index_checks.Ints
    chunk_begins: index_checks.Ints
    box_begins: index_checks.Ints
    owner: index_checks.Ints
    nbytes: index_checks.Ints
    grid_levels: tuple[tuple[grids.Levels, ...], ...]
    cell_begins: index_checks.Ints


@dataclass(frozen=True, slots=True, eq=False)
class _FileTable:
    """The chunks of one file in the order of their data. `rows`: tensors; `by_row` sorts them for lookups."""

    rows: index_checks.Ints
    begins: index_checks.Ints
    ends: index_checks.Ints
    by_row: index_checks.Ints

    def begin_of(self, row: int) -> int:
        place = int(np.searchsorted(self.rows, row, sorter=self.by_row))
        return int(self.begins[self.by_row[place]])


class LayoutIndex:
    """Where every chunk of every tensor lies. Made by `build_index` and `parse_index`, which have checked it.

    It holds columns; records are made for what is asked. A tensor's chunks are listed one by one, or are the cells of a
    grid; callers need not tell them apart. Ask from one thread at a time.
    """

    def __init__(
        self, files: tuple[str, ...], dtypes: tuple[str, ...], columns: Columns, placed: Placed, *, key: str
    ) -> None:
        self.files = files
        """Shard files, relative to the attempt directory."""
        self.dtypes = dtypes
        self.columns = columns
        self._placed = placed
        self._names = placed.names
        self._key = key
        self._tables: dict[int, _FileTable] = {}
        self._grids: dict[int, grids.Grid] = {}
        self._known_totals: tuple[list[int], int] | None = None
        self._by_file: _ByFile | None = None

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._find(name) is not None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LayoutIndex):
            return NotImplemented
        same = (self.files, self.dtypes) == (other.files, other.dtypes)
        return same and all(np.array_equal(data, other.columns[name]) for name, data in self.columns.items())

    __hash__ = None  # type: ignore[assignment]

    @property
    def num_chunks(self) -> int:
        """Chunks of all tensors: the listed ones, and the cells of grids that are not empty."""
        return len(self.columns["file"]) + self._totals()[1]

    def names(self) -> tuple[str, ...]:
        """All tensor names, ascending."""
        return self._names

    def _find(self, name: str) -> int | None:
        place = bisect_left(self._names, name)
        return place if place < len(self._names) and self._names[place] == name else None

    def _row(self, name: str) -> int:
        row = self._find(name)
        if row is None:
            raise KeyError(name)
        return row

    def _shape(self, row: int) -> tuple[int, ...]:
        begin, end = self._placed.shape_begins[row : row + 2].tolist()
        return tuple(self.columns["shape"][begin:end].tolist())

    def meta(self, name: str) -> TensorMeta:
        """dtype and global shape of a tensor; KeyError if there is none of this name."""
        row = self._row(name)
        return TensorMeta(name=name, dtype=self.dtypes[self.columns["dtype"][row]], shape=self._shape(row))

    def chunks(self, name: str) -> list[Chunk]:
        """The chunks of a tensor, ascending by offsets; KeyError if there is none of this name."""
        row = self._row(name)
        if self.columns["grid"][row] < 0:
            return self._listed(row)
        shape = self._shape(row)
        return self._cells(row, shape, (0,) * len(shape), shape)

    def chunks_overlapping(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> list[Chunk]:
        """Those of `chunks(name)` that share an element with the box at `offsets` of shape `sizes`."""
        row = self._row(name)
        if self.columns["grid"][row] >= 0:
            return self._cells(row, self._shape(row), offsets, sizes)
        return [chunk for chunk in self._listed(row) if _overlap(chunk.offsets, chunk.sizes, offsets, sizes)]

    def grid(self, name: str) -> grids.Grid | None:
        """How a tensor is cut, None if its chunks are listed; tensors that share a grid get one object. KeyError as above."""
        number = int(self.columns["grid"][self._row(name)])
        if number < 0:
            return None
        found = self._grids.get(number)
        if found is None:
            begin, end = self._placed.cell_begins[number : number + 2].tolist()
            files = tuple(self.columns["cells"][begin:end].tolist())
            found = self._grids[number] = grids.Grid(self._placed.grid_levels[number], files)
        return found

    def _listed(self, row: int) -> list[Chunk]:
        begin, end = self._placed.chunk_begins[row : row + 2].tolist()
        dimensions = int(self.columns["ndim"][row])
        first = int(self._placed.box_begins[begin]) if begin < end else 0
        places = slice(first, first + (end - begin) * dimensions)
        offsets = self.columns["offsets"][places].reshape(end - begin, dimensions).tolist()
        sizes = self.columns["sizes"][places].reshape(end - begin, dimensions).tolist()
        files = self.columns["file"][begin:end].tolist()
        begins = self.columns["begin"][begin:end].tolist()
        return [
            Chunk(offsets=tuple(offset), sizes=tuple(size), file=file, begin=place)
            for offset, size, file, place in zip(offsets, sizes, files, begins, strict=True)
        ]

    # -- grids ---------------------------------------------------------------------------------------------------------

    def _cells(self, row: int, shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]) -> list[Chunk]:
        if 0 in shape or min(sizes, default=1) <= 0:
            return []
        grid = int(self.columns["grid"][row])
        levels, first = self._placed.grid_levels[grid], int(self._placed.cell_begins[grid])
        parts = grids.parts_of(levels)
        found = []
        for place in grids.cells_overlapping(shape, levels, offsets, sizes):
            file = int(self.columns["cells"][first + grids.cell_number(parts, place)])
            box = grids.cell_box(shape, levels, place)
            found.append(Chunk(*box, file=file, begin=self._table(file).begin_of(row)))
        return found

    def _rows_by_grid(self) -> Iterator[tuple[int, index_checks.Ints]]:
        """Each grid that is used, with the tensors that use it."""
        numbers = self.columns["grid"]
        order = np.argsort(numbers, kind="stable")
        grids_used, begins = np.unique(numbers[order], return_index=True)
        ends = np.append(begins, len(order))[1:]
        for grid, begin, end in zip(grids_used.tolist(), begins.tolist(), ends.tolist(), strict=True):
            if grid >= 0:
                yield grid, order[begin:end]

    def _heads_and_tails(self, rows: index_checks.Ints, dimensions: int) -> tuple[index_checks.Ints, index_checks.Ints]:
        """Of these tensors the first `dimensions`, and the product of the others."""
        begins = self._placed.shape_begins[rows]
        ends = self._placed.shape_begins[rows + 1]
        shapes = self.columns["shape"]
        heads = shapes[begins[:, None] + np.arange(dimensions)[None, :]].reshape(len(rows), dimensions)
        tails = np.ones(len(rows), dtype=np.int64)
        for dimension in range(dimensions, int((ends - begins).max(initial=0))):
            has = np.flatnonzero(ends - begins > dimension)
            tails[has] *= shapes[begins[has] + dimension]
        return heads, tails

    # -- files ---------------------------------------------------------------------------------------------------------

    def _table(self, file: int) -> _FileTable:
        found = self._tables.get(file)
        if found is None:
            if len(self._tables) >= FILE_TABLES_KEPT:
                self._tables.clear()
            found = self._tables[file] = self._make_table(file)
        return found

    def _make_table(self, file: int) -> _FileTable:
        if self._by_file is None:
            self._by_file = _ByFile.of(self.columns, self._placed, dict(self._rows_by_grid()))
        by_file, placed = self._by_file, self._placed
        listed = by_file.listed(file)
        rows = [placed.owner[listed]]
        nbytes = [placed.nbytes[listed]]
        for grid, number in by_file.cells(file):
            members = by_file.members[grid]
            levels = placed.grid_levels[grid]
            heads, tails = self._heads_and_tails(members, len(levels))
            volumes = grids.cell_volumes(heads, tails, levels, grids.cell_place(grids.parts_of(levels), number))
            has = np.flatnonzero(volumes)
            rows.append(members[has])
            nbytes.append(volumes[has] * placed.item_bytes[members[has]])
        all_rows, all_bytes = np.concatenate(rows), np.concatenate(nbytes)
        if len(rows) == 1:
            order = np.argsort(self.columns["begin"][listed], kind="stable")
            begins = self.columns["begin"][listed][order].astype(np.int64)
            return _FileTable(all_rows[order], begins, begins + all_bytes[order], np.argsort(all_rows[order]))
        order = np.lexsort((all_rows, -placed.item_bytes[all_rows]))
        ends = int(self.columns["data_begin"][file]) + np.cumsum(all_bytes[order])
        table = _FileTable(all_rows[order], ends - all_bytes[order], ends, np.argsort(all_rows[order]))
        self._ensure_listed_fit(file, listed, table)
        return table

    def _ensure_listed_fit(self, file: int, listed: index_checks.Ints, table: _FileTable) -> None:
        """Where grids and listed chunks share a file, the order of its data says where the listed ones lie too."""
        for chunk in listed.tolist():
            row, stated = int(self._placed.owner[chunk]), int(self.columns["begin"][chunk])
            expected = table.begin_of(row)
            if stated != expected:
                raise corrupt(
                    self._key, self._names[row], f"begin {expected} in {self.files[file]}, by its order", str(stated)
                )

    def chunks_in_file(self, file: int) -> list[tuple[str, int, int]]:
        """(tensor name, begin, end) of the chunks in one file, ascending; to name damaged tensors."""
        table = self._table(file)
        return [
            (self._names[row], begin, end)
            for row, begin, end in zip(table.rows.tolist(), table.begins.tolist(), table.ends.tolist(), strict=True)
        ]

    def located_chunks(self, file: int) -> list[tuple[str, int, Chunk]]:
        """(tensor name, bytes of an element, chunk) of the chunks in one file, ascending by where they begin."""
        table = self._table(file)
        assert self._by_file is not None, "made with the table"
        boxes = {
            int(self._placed.owner[chunk]): self._listed_box(chunk) for chunk in self._by_file.listed(file).tolist()
        }
        cells = dict(self._by_file.cells(file))
        found = []
        for row, begin in zip(table.rows.tolist(), table.begins.tolist(), strict=True):
            grid = int(self.columns["grid"][row])
            if grid < 0:
                offsets, sizes = boxes[row]
            else:
                levels = self._placed.grid_levels[grid]
                place = grids.cell_place(grids.parts_of(levels), cells[grid])
                offsets, sizes = grids.cell_box(self._shape(row), levels, place)
            item_bytes = int(self._placed.item_bytes[row])
            found.append((self._names[row], item_bytes, Chunk(offsets, sizes, file=file, begin=begin)))
        return found

    def _listed_box(self, chunk: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        begin, end = self._placed.box_begins[chunk : chunk + 2].tolist()
        return tuple(self.columns["offsets"][begin:end].tolist()), tuple(self.columns["sizes"][begin:end].tolist())

    def file_extent(self, file: int) -> int:
        """Where the last chunk of a file ends: the size it must have (0: no chunk in it)."""
        table = self._table(file)
        return int(table.ends.max(initial=0))

    def file_extents(self) -> list[int]:
        """`file_extent` of every file, without a table for each."""
        return self._totals()[0]

    def _totals(self) -> tuple[list[int], int]:
        """The extent of each file, and the number of chunks in grids; worked out once."""
        if self._known_totals is None:
            self._known_totals = self._sum_up()
        return self._known_totals

    def _sum_up(self) -> tuple[list[int], int]:
        in_grids, num_chunks = self._sum_up_whole()
        for grid, rows in self._rows_by_grid():
            levels = self._placed.grid_levels[grid]
            if not levels:
                continue
            heads, tails = self._heads_and_tails(rows, len(levels))
            totals, count = grids.grid_totals(heads, tails, self._placed.item_bytes[rows], levels)
            begin, end = self._placed.cell_begins[grid : grid + 2].tolist()
            np.add.at(in_grids, self.columns["cells"][begin:end], totals)
            num_chunks += int(count[0])
        listed = np.flatnonzero(self.columns["file"] >= 0)
        files = self.columns["file"][listed]
        stops = np.zeros(len(self.files), dtype=np.int64)
        np.maximum.at(stops, files, self.columns["begin"][listed].astype(np.int64) + self._placed.nbytes[listed])
        sums = in_grids.copy()
        np.add.at(sums, files, self._placed.nbytes[listed])
        if len(self.columns["data_begin"]):
            by_order = self.columns["data_begin"].astype(np.int64) + sums
            stops = np.where(in_grids > 0, by_order, stops)
        return [int(stop) for stop in stops], num_chunks

    def _sum_up_whole(self) -> tuple[index_checks.Ints, int]:
        """Of tensors in one piece (records of ranks, each a grid of its own): bytes in each file, how many are not empty."""
        is_whole = np.array([not levels for levels in self._placed.grid_levels], dtype=np.bool_)
        numbers = self.columns["grid"]
        rows = np.flatnonzero(numbers >= 0)
        rows = rows[is_whole[numbers[rows]]]
        _, elements = self._heads_and_tails(rows, 0)
        totals = np.zeros(len(self.files), dtype=np.int64)
        files = self.columns["cells"][self._placed.cell_begins[numbers[rows]]]
        np.add.at(totals, files, elements * self._placed.item_bytes[rows])
        return totals, int(np.count_nonzero(elements))


@dataclass(frozen=True, slots=True, eq=False)
class _ByFile:
    """The columns turned around: what lies in a file."""

    chunk_files: npt.NDArray[Any]
    chunk_order: index_checks.Ints
    cell_files: npt.NDArray[Any]
    cell_order: index_checks.Ints
    cell_begins: index_checks.Ints
    members: dict[int, index_checks.Ints] = field(default_factory=dict)

    @classmethod
    def of(cls, columns: Columns, placed: Placed, members: dict[int, index_checks.Ints]) -> _ByFile:
        chunk_order = np.argsort(columns["file"], kind="stable")
        cell_order = np.argsort(columns["cells"], kind="stable")
        return cls(
            chunk_files=columns["file"][chunk_order],
            chunk_order=chunk_order,
            cell_files=columns["cells"][cell_order],
            cell_order=cell_order,
            cell_begins=placed.cell_begins,
            members=members,
        )

    def listed(self, file: int) -> index_checks.Ints:
        """Numbers of the listed chunks in the file."""
        first, stop = np.searchsorted(self.chunk_files, file, "left"), np.searchsorted(self.chunk_files, file, "right")
        return self.chunk_order[first:stop]

    def cells(self, file: int) -> Iterator[tuple[int, int]]:
        """(grid, number of the cell in it) of the cells whose chunks lie in the file, for grids that are used."""
        first, stop = np.searchsorted(self.cell_files, file, "left"), np.searchsorted(self.cell_files, file, "right")
        for cell in self.cell_order[first:stop].tolist():
            grid = int(np.searchsorted(self.cell_begins, cell, "right")) - 1
            if grid in self.members:
                yield grid, cell - int(self.cell_begins[grid])


def _overlap(
    offsets_a: Sequence[int], sizes_a: Sequence[int], offsets_b: Sequence[int], sizes_b: Sequence[int]
) -> bool:
    return all(max(a, b) < min(a + s, b + t) for a, s, b, t in zip(offsets_a, sizes_a, offsets_b, sizes_b, strict=True))
