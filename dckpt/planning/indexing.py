"""From the decision and what the ranks report of their files to the layout index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from dckpt.errors import PeerFailedError
from dckpt.format.grids import Levels
from dckpt.format.index import Chunk, Grid, LayoutIndex, build_index
from dckpt.format.shard_file import ShardFilePlan
from dckpt.planning.files import FilePlans
from dckpt.planning.layout import Decision
from dckpt.planning.records import record_name, values_record_name

Tensors: TypeAlias = dict[str, tuple[str, tuple[int, ...], Sequence[Chunk] | Grid]]


@dataclass(frozen=True, slots=True)
class FileReport:
    """One shard file as its rank planned it. `occurrence`: which boxes of tensors with several lie in it."""

    name: str
    size: int
    data_begin: int
    is_separate: bool
    occurrence: int


@dataclass(frozen=True, slots=True)
class RankReport:
    """The files of a rank, and its chunks that no grid describes: (name, offsets, sizes, file, begin)."""

    files: tuple[FileReport, ...]
    listed: tuple[tuple[str, tuple[int, ...], tuple[int, ...], int, int], ...]

    def to_json(self) -> list[Any]:
        """As it travels."""
        files = [[f.name, f.size, f.data_begin, int(f.is_separate), f.occurrence] for f in self.files]
        return [files, self.listed]

    @classmethod
    def from_json(cls, found: Sequence[Any]) -> RankReport:
        """What another rank of this job reported."""
        files, listed = found
        return cls(
            tuple(FileReport(name, size, begin, bool(separate), nth) for name, size, begin, separate, nth in files),
            tuple((name, tuple(offsets), tuple(sizes), file, begin) for name, offsets, sizes, file, begin in listed),
        )


def report_files(plans: FilePlans, irregular: frozenset[str]) -> RankReport:
    """What a rank tells of its plans; chunks of the tensors in `irregular` one by one."""
    files, listed = [], []
    counts = {False: 0, True: 0}
    for number, (plan, _) in enumerate(plans):
        files.append(FileReport(plan.file, plan.size, _data_begin(plan), plan.is_separate, counts[plan.is_separate]))
        counts[plan.is_separate] += 1
        listed += [
            (tensor.name, tensor.offsets, tensor.shape, number, begin)
            for tensor, begin in zip(plan.tensors, plan.begins, strict=True)
            if tensor.name in irregular
        ]
    return RankReport(tuple(files), tuple(listed))


def _data_begin(plan: ShardFilePlan) -> int:
    return len(plan.header)


def index_of(decision: Decision, reports: Sequence[RankReport], capacities: Sequence[Mapping[str, int]]) -> LayoutIndex:
    """The index over all ranks' files. `capacities`: bytes of each rank's records, by component.

    Raises `PeerFailedError` if what a rank reports cannot be what the decision made it write.
    """
    index = lay_index(decision, reports, capacities)
    _ensure_planned(index, reports)
    return index


def lay_index(
    decision: Decision, reports: Sequence[RankReport], capacities: Sequence[Mapping[str, int]]
) -> LayoutIndex:
    """As `index_of`, without comparing sizes."""
    names = [file.name for report in reports for file in report.files]
    data_begins = [file.data_begin for report in reports for file in report.files]
    firsts = [0]
    for report in reports:
        firsts.append(firsts[-1] + len(report.files))
    homes = _Homes(reports, firsts)
    tensors: Tensors = {}
    cells: dict[tuple[int, tuple[Levels, ...], bool], Grid] = {}
    for name, place in decision.grids.items():
        row = decision.tensors[name]
        key = (id(place.writers), place.levels, row.is_frozen)
        grid = cells.get(key)
        if grid is None:
            files = tuple(homes.file(rank, is_separate=row.is_frozen) for rank in place.writers)
            grid = cells[key] = Grid(place.levels, files)
        tensors[name] = (row.dtype, row.shape, grid)
    for name, found in decision.records.items():
        for ranks, row in found:
            for rank in ranks:
                grid = Grid((), (homes.file(rank, is_separate=row.is_frozen),))
                tensors[record_name(rank, name)] = (row.dtype, row.shape, grid)
    for component in decision.layout.rank_values:
        for rank, sizes in enumerate(capacities):
            if component in sizes:
                grid = Grid((), (homes.file(rank, is_separate=False),))
                tensors[values_record_name(rank, component)] = ("U8", (sizes[component],), grid)
    chunks: dict[str, list[Chunk]] = {
        name: [] for name in decision.tensors if name not in decision.grids and name not in decision.records
    }
    for rank, report in enumerate(reports):
        for name, offsets, shape, number, begin in report.listed:
            chunks[name].append(Chunk(offsets, shape, firsts[rank] + number, begin))
    for name, found_chunks in chunks.items():
        row = decision.tensors[name]
        tensors[name] = (row.dtype, row.shape, found_chunks)
    return build_index(names, tensors, data_begins=data_begins)


class _Homes:
    """Which file of a rank takes its pieces."""

    def __init__(self, reports: Sequence[RankReport], firsts: Sequence[int]) -> None:
        self._first: dict[tuple[int, bool], int] = {}
        self._any: dict[int, int] = {}
        for rank, report in enumerate(reports):
            for number, file in enumerate(report.files):
                self._any.setdefault(rank, firsts[rank] + number)
                if file.occurrence == 0:
                    self._first[rank, file.is_separate] = firsts[rank] + number

    def file(self, rank: int, *, is_separate: bool) -> int:
        """The file's number. A rank whose pieces are all empty has none of that kind: any of its files stands for it."""
        found = self._first.get((rank, is_separate), self._any.get(rank))
        assert found is not None, f"rank {rank} writes no file, yet pieces are its own"
        return found


def _ensure_planned(index: LayoutIndex, reports: Sequence[RankReport]) -> None:
    """Pair assertion between the coordinator's layout and the files that the ranks planned by themselves."""
    extents = index.file_extents()
    number = 0
    for rank, report in enumerate(reports):
        for file in report.files:
            if extents[number] != file.size:
                raise PeerFailedError(
                    f"Save: rank {rank}: file {file.name}: expected {extents[number]:,} bytes by the layout of all ranks, "
                    f"found {file.size:,} in its own plan. Do all ranks run the same version of dckpt?",
                    rank=rank,
                )
            number += 1
