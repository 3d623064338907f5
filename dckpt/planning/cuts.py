"""Which mesh axes cut which tensor of a saved checkpoint, read off its layout; and how another mesh cuts it. Pure functions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from dckpt.format.grids import Grid
from dckpt.format.index import Chunk, LayoutIndex
from dckpt.format.layout import parse_shard_file_name
from dckpt.format.manifest import Manifest
from dckpt.planning.mesh import AxisCuts, Level, NamedMesh, is_replicating, saved_mesh
from dckpt.planning.streams import RANK_AXIS

FUSED_AXES_MAX = 3
"""Axes that may be flattened into one by the program that saved (data and context parallelism under one FSDP)."""


class SavedCuts:
    """How the tensors of a checkpoint are cut, in the names of its mesh's axes; without a mesh over `rank`.

    is_told: the mesh to come is named, so it says which axis cuts, also where ranks without a mesh were replicas of others.
    """

    def __init__(self, manifest: Manifest, index: LayoutIndex, *, is_told: bool) -> None:
        self._index = index
        self._is_told = is_told
        self.mesh = saved_mesh(manifest)
        self._ranks = _ranks_of_files(manifest, index)
        self._places = np.array(
            manifest.coordinates or [tuple(self.mesh.coordinates(r).values()) for r in range(manifest.world_size)]
        )
        self._known: dict[int, AxisCuts | str] = {}

    def of(self, name: str) -> AxisCuts | str:
        """The cuts of a tensor; or, as a clause, why they cannot be said in axes of the mesh."""
        grid = self._index.grid(name)
        if grid is None:
            return self._of_listed(self._index.chunks(name), self._index.meta(name).shape)
        # Tensors that are cut alike share one grid object.
        found = self._known.get(id(grid))
        if found is None:
            found = self._known[id(grid)] = self._of_grid(grid)
        return found

    def _of_grid(self, grid: Grid) -> AxisCuts | str:
        if not grid.levels:
            return ()
        counts = [count for levels in grid.levels for count in levels]
        if not self.mesh.is_named:
            return self._of_unnamed(grid, counts)
        ranks = np.array([self._ranks[file] for file in grid.files])
        parts = np.indices(counts).reshape(len(counts), -1)
        levels_found = [self._axes_that_number(ranks, numbers, n) for n, numbers in zip(counts, parts, strict=True)]
        names = [level for level in levels_found if level is not None]
        if len(names) < len(counts) or not self._are_one_replica(ranks, names):
            return f"is cut into {_shown(grid)} parts, which are not along axes of the mesh {self.mesh}"
        found = iter(names)
        return tuple(tuple(next(found) for _ in levels) for levels in grid.levels)

    def _of_unnamed(self, grid: Grid, counts: Sequence[int]) -> AxisCuts | str:
        world_size = self.mesh.world_size
        if len(counts) == 1 and (counts[0] == world_size or self._is_told):
            return tuple(((RANK_AXIS,),) if levels else () for levels in grid.levels)
        remedy = "; name the new mesh, such as --mesh replicate=2,shard=4" if len(counts) == 1 else ""
        return f"is cut into {_shown(grid)} parts by {world_size} ranks, of which the checkpoint names no mesh{remedy}"

    def _axes_that_number(self, ranks: np.ndarray, numbers: np.ndarray, count: int) -> Level | None:
        """The axes whose coordinates, taken together, are the number of the part that each rank wrote."""
        names, sizes = list(self.mesh.sizes), list(self.mesh.sizes.values())
        live = [axis for axis, size in enumerate(sizes) if size > 1]
        for length in range(1, FUSED_AXES_MAX + 1):
            for axes in itertools.combinations(live, length):
                if math.prod(sizes[axis] for axis in axes) != count:
                    continue
                found = np.zeros(len(ranks), dtype=np.int64)
                for axis in axes:
                    found = found * sizes[axis] + self._places[ranks, axis]
                if np.array_equal(found, numbers):
                    return tuple(names[axis] for axis in axes)
        return None

    def _are_one_replica(self, ranks: np.ndarray, names: Sequence[Level]) -> bool:
        """Along the axes that do not cut, all writers stand at one place."""
        used = {axis for level in names for axis in level}
        others = [number for number, axis in enumerate(self.mesh.sizes) if axis not in used]
        places = self._places[ranks][:, others]
        return bool((places == places[:1]).all())

    def _of_listed(self, chunks: Sequence[Chunk], shape: Sequence[int]) -> AxisCuts | str:
        """Chunks of unequal length, along one dimension, one a rank: the program that saved cut it by a rule of its own."""
        full = [chunk for chunk in chunks if chunk.file >= 0]
        cut = [dim for dim in range(len(shape)) if len({chunk.offsets[dim] for chunk in full}) > 1]
        if not cut:
            return ()
        live = self.mesh.live
        ranks = [self._ranks[chunk.file] for chunk in full]
        if len(cut) == 1 and len(live) == 1 and ranks == sorted(set(ranks)):
            return (*([()] * cut[0]), ((live[0],),))
        return f"is cut into {len(full)} pieces in a way that no mesh axis describes"


def _shown(grid: Grid) -> str:
    return " x ".join(str(count) for count in grid.parts)


def _ranks_of_files(manifest: Manifest, index: LayoutIndex) -> list[int]:
    """The rank that wrote each file of the index."""
    writers = {entry.path.rpartition("/")[2]: entry.rank or 0 for entry in manifest.shard_entries}
    return [writers.get(file, 0) for file in index.files]


def separate_tensors(index: LayoutIndex) -> frozenset[str]:
    """Tensors that lie in files of their own after the ranks' first ones: they were not expected to change."""
    parts = [(parse_shard_file_name(file) or (0, 0)) for file in index.files]
    known: dict[int, bool] = {}
    return frozenset(name for name in index.names() if _is_separate(index, name, parts, known))


def _is_separate(index: LayoutIndex, name: str, parts: Sequence[tuple[int, int]], known: dict[int, bool]) -> bool:
    grid = index.grid(name)
    if grid is not None:
        # One chunk a rank: it lies in a further file only if that one is separate.
        if id(grid) not in known:
            known[id(grid)] = any(parts[file][1] > 0 for file in grid.files)
        return known[id(grid)]
    # Several chunks of one rank lie in further files too; the first of them does not.
    lowest: dict[int, int] = {}
    for chunk in index.chunks(name):
        if chunk.file >= 0:
            rank, part = parts[chunk.file]
            lowest[rank] = min(part, lowest.get(rank, part))
    return bool(lowest) and min(lowest.values()) > 0


def unknown_axes(saved: NamedMesh, target: NamedMesh) -> list[str]:
    """Axes of `target` with several ranks of which the checkpoint cannot say what they cut, in words that say what to do."""
    if saved.world_size == 1 or not saved.is_named:
        cutting = [axis for axis in target.live if not is_replicating(axis)]
        if len(cutting) <= 1:
            return []
        return [
            f"axes {', '.join(cutting)}: the checkpoint names no mesh, so which of them cuts what is not known; give one axis "
            "that cuts, and for the others names with 'replicate' in them, or none"
        ]
    return [
        f"axis {axis}: the checkpoint was saved on the mesh {saved}, where it cuts nothing, so what it cuts is not known; give "
        f"it one rank, or load with resharding. (An axis with 'replicate' in its name cuts nothing.)"
        for axis in target.live
        if saved.sizes.get(axis, 1) == 1 and not is_replicating(axis)
    ]


def cuts_for(cuts: AxisCuts, saved: NamedMesh, target: NamedMesh) -> AxisCuts:
    """The same cuts in the axes of `target`: those of an unnamed mesh become those of the one axis that cuts there."""
    if saved.is_named:
        return cuts
    axis = cutting_axis(target)
    return tuple(tuple((axis,) for _ in levels) for levels in cuts)


def cutting_axis(target: NamedMesh) -> str:
    """The one axis of `target` that cuts; any of them if all have one rank."""
    cutting = [axis for axis in target.live if not is_replicating(axis)]
    return cutting[0] if cutting else next(iter(target.sizes))


def parameters_of(manifest: Manifest, index: LayoutIndex, frozen: frozenset[str]) -> Iterator[str]:
    """Parameters and the optimizer's and the average's tensors of their shape: what FSDP cuts along dimension 0.

    A checkpoint that one rank saved holds them whole. Without an optimizer nobody says which of the model's tensors are
    parameters: all that have a dimension count.
    """
    groups = list(_optimizer_groups(manifest.values.get("optim")))
    params = {fqn: f"model.{fqn}" for _, names in groups for fqn in names if f"model.{fqn}" in index}
    if not groups:
        params = {name.removeprefix("model."): name for name in index.names() if name.startswith("model.")}
    shapes = {fqn: index.meta(name).shape for fqn, name in params.items() if index.meta(name).shape}
    prefixes = dict.fromkeys(prefix for prefix, _ in groups)
    for name in index.names():
        if not index.meta(name).shape:
            continue
        if name in frozen and name.startswith("model."):
            yield name
            continue
        part, _, rest = name.partition(".")
        fqns = [rest] if part in ("model", "ema") else _owners(name, prefixes)
        if any(shapes.get(fqn) == index.meta(name).shape for fqn in fqns):
            yield name


def _owners(name: str, prefixes: Mapping[str, None]) -> list[str]:
    """The parameters whose state the tensor `name` may be: "optim.a.weight.exp_avg" belongs to "a.weight"."""
    found = []
    for prefix in prefixes:
        rest = name.removeprefix(f"{prefix}.")
        while rest != name and "." in rest:
            rest = rest.rpartition(".")[0]
            found.append(rest)
    return found


def _optimizer_groups(value: object) -> Iterator[tuple[str, list[str]]]:
    """(prefix of its tensors, names of its parameters) of every group, by FORMAT.md, section 10.2."""
    records = value.get("optimizers") if isinstance(value, dict) else None
    for key, record in records.items() if isinstance(records, dict) else ():
        groups = record.get("groups") if isinstance(record, dict) else None
        for group in groups if isinstance(groups, list) else ():
            names = group.get("names") if isinstance(group, dict) else None
            if isinstance(names, list):
                yield f"optim.{key}" if key else "optim", [name for name in names if isinstance(name, str)]
