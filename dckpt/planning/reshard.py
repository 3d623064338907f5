"""What the files of a checkpoint will be on another mesh: the layout that a save there would have. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dckpt.errors import IncompatibleStateError
from dckpt.format.grids import cell_box, cell_place, has_empty_cells, parts_of
from dckpt.format.index import LayoutIndex
from dckpt.format.manifest import Manifest
from dckpt.planning.carry import CARRIED_VALUES, carried_tensors, refused_records
from dckpt.planning.cuts import SavedCuts, cuts_for, cutting_axis, parameters_of, separate_tensors, unknown_axes
from dckpt.planning.files import FilePlans, plan_files
from dckpt.planning.indexing import RankReport, lay_index, report_files
from dckpt.planning.layout import Decision, Values, decide_layout
from dckpt.planning.mesh import AxisCuts, NamedMesh, saved_mesh
from dckpt.planning.records import RNG, record_capacity, record_name
from dckpt.planning.structure import Box, Cut, Meshes, MeshTable, RankClass, Structure, TensorRow, grid_levels

DIFFERENCES_SHOWN = 20


@dataclass(frozen=True)
class Reshard:
    """The decision, and what each rank of the new mesh gets.

    sources: name of each tensor of the structure -> the name under which the saved checkpoint stores it. carried: tensors that
    differed by rank, of which rank 0's is taken. num_cut: tensors that several ranks hold in parts.
    """

    mesh: NamedMesh
    ranks: RankClass
    decision: Decision
    sources: Mapping[str, str]
    carried: tuple[str, ...]
    values: tuple[Values, ...]
    num_cut: int
    _places: dict[tuple[Cut, int], int] = field(default_factory=dict, compare=False)

    @property
    def structure(self) -> Structure:
        """The tensors, the same on every rank."""
        return self.ranks.structure

    def capacities(self, rank: int) -> dict[str, int]:
        """Bytes laid out for each record of a rank."""
        kept = self.decision.layout.rank_values
        return {name: record_capacity(size) for name, (_, size) in self.values[rank].items() if name in kept}

    def boxes(self, rank: int) -> list[list[Box]]:
        """Of each tensor, the boxes that `rank` holds."""
        return [self._boxes(row, rank) for row in self.structure.rows]

    def _boxes(self, row: TensorRow, rank: int) -> list[Box]:
        if row.cut is None:
            return self.ranks.boxes_of(row, rank)
        # Thousands of tensors share a cut: where the rank stands in it is looked up once.
        levels = self.ranks.levels(row.cut)
        number = self._places.get((row.cut, rank))
        if number is None:
            holders = self.ranks.holders(row.cut)
            number = self._places[row.cut, rank] = int((holders == rank).any(axis=1).argmax())
        box = cell_box(row.shape, levels, cell_place(parts_of(levels), number))
        return [] if 0 in box[1] else [box]

    def files(self, rank: int) -> FilePlans:
        """The shard files of one rank, as a save there would plan them."""
        return plan_files(rank, self.structure, self.boxes(rank), self.decision.layout, self.capacities(rank))

    def report(self, rank: int) -> RankReport:
        """What the index needs to know of `files`."""
        return report_files(self.files(rank), self.decision.layout.listed)

    def index(self, reports: Sequence[RankReport]) -> LayoutIndex:
        """The layout index over all ranks' files."""
        return lay_index(self.decision, reports, [self.capacities(rank) for rank in range(self.mesh.world_size)])


def ensure_expressible(manifest: Manifest, index: LayoutIndex, target: NamedMesh) -> None:
    """Returns if the checkpoint can be laid out for `target`; else an `IncompatibleStateError` that lists every obstacle."""
    saved = saved_mesh(manifest)
    parts = manifest.parts
    obstacles = unknown_axes(saved, target)
    refused = refused_records(manifest.rank_tensors, manifest.rank_values, parts, world_size=manifest.world_size)
    obstacles += [
        f"{text}; save it equal on every rank, or leave it out of the TrainState" for text in refused.values()
    ]
    obstacles += [
        f"{name}: differed between the ranks that saved it, and rank 0 has none"
        for name in carried_tensors(manifest.rank_tensors, parts)
        if record_name(0, name) not in index
    ]
    cuts = SavedCuts(manifest, index, is_told=target.is_named)
    for name in plain_names(index):
        found = cuts.of(name)
        if isinstance(found, str):
            obstacles.append(f"{name}: {found}")
    if obstacles:
        more = len(obstacles) - DIFFERENCES_SHOWN
        shown = "; ".join(obstacles[:DIFFERENCES_SHOWN]) + (f"; and {more} more" if more > 0 else "")
        unnamed = target.is_named and manifest.mesh is None
        remedy = (
            "Use --world-size, or pass TrainState(mesh=...) when saving, so that axes have names. " if unnamed else ""
        )
        raise IncompatibleStateError(
            f"The checkpoint cannot be laid out for {target} in {len(obstacles)} place{'s' * (len(obstacles) > 1)}: "
            f"{shown}. Nothing was written. {remedy}"
            "It can still be loaded there with resharding where Checkpointer.resume takes it.",
            differences=obstacles,
        )


def plain_names(index: LayoutIndex) -> Iterator[str]:
    """The tensors that are not records of one rank."""
    return (name for name in index.names() if not name.startswith("rank."))


def plan_reshard(
    manifest: Manifest, index: LayoutIndex, target: NamedMesh, records: Sequence[tuple[str, int]] | None
) -> Reshard:
    """The layout for `target`. `records`: (digest, bytes) of each new rank's random streams; None if it has none.

    Tensors keep their cuts, over the axes of the new mesh; what one rank saved is cut as FSDP cuts it; whole tensors stay
    whole, with one writer each, balanced by bytes. Raises `IncompatibleStateError` for what cannot be laid out so.
    """
    ensure_expressible(manifest, index, target)
    frozen = separate_tensors(index)
    carried = carried_tensors(manifest.rank_tensors, manifest.parts)
    sources = {name: name for name in plain_names(index)} | {name: record_name(0, name) for name in carried}
    cuts = _target_cuts(manifest, index, target, frozen)
    meshes: dict[MeshTable, int] = {}
    rows = []
    for name, stored in sources.items():
        meta = index.meta(stored)
        is_frozen = stored in frozen
        row = TensorRow(name, meta.dtype, meta.shape, is_frozen=is_frozen)
        rows.append(cut_row(row, cuts.get(name, ()), target, meshes))
    ranks = RankClass(Structure(tuple(rows)), Meshes(tuple(meshes)), tuple(range(target.world_size)))
    values: list[Values] = [{RNG: record} for record in records] if records is not None else [{}] * target.world_size
    # A rank without records may write no file at all, and then no grid can name a file for its empty parts.
    listed = [row.name for row in rows if _has_empty_part(row, ranks)] if records is None else []
    decision = decide_layout([ranks], values, None, listed=listed)
    num_cut = sum(row.cut is not None for row in rows)
    return Reshard(target, ranks, decision, sources, carried, tuple(values), num_cut)


def _target_cuts(
    manifest: Manifest, index: LayoutIndex, target: NamedMesh, frozen: frozenset[str]
) -> Mapping[str, AxisCuts]:
    if manifest.world_size == 1:
        level = ((cutting_axis(target),),)
        return dict.fromkeys(parameters_of(manifest, index, frozen), (level,))
    cuts = SavedCuts(manifest, index, is_told=target.is_named)
    found: dict[str, AxisCuts] = {}
    for name in plain_names(index):
        saved = cuts.of(name)
        assert not isinstance(saved, str), "looked at before"
        found[name] = cuts_for(saved, cuts.mesh, target)
    return found


def cut_row(row: TensorRow, cuts: AxisCuts, target: NamedMesh, meshes: dict[MeshTable, int]) -> TensorRow:
    """`row` as `cuts` say: the axes become those of a mesh in which each level is one axis."""
    levels = tuple(level for dimension in cuts for level in dimension)
    if not levels:
        return row
    table = target.table(levels)
    numbers = iter(range(len(levels)))
    axes = tuple(tuple(next(numbers) for _ in dimension) for dimension in cuts)
    cut = Cut(meshes.get(table, len(meshes)), axes)
    if not grid_levels(cut, table):
        return row
    meshes.setdefault(table, len(meshes))
    return replace(row, cut=cut)


def _has_empty_part(row: TensorRow, ranks: RankClass) -> bool:
    return has_empty_cells(row.shape, () if row.cut is None else ranks.levels(row.cut))


def carried_values(manifest: Manifest) -> tuple[str, ...]:
    """Components that differed by rank and of which rank 0's value is taken."""
    return tuple(name for name in manifest.rank_values if name in CARRIED_VALUES)
