"""Meshes by the names of their axes: of the ranks that saved a checkpoint, and of those that it is resharded for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dckpt.errors import ConfigError
from dckpt.format.grids import cell_place
from dckpt.format.layout import WORLD_SIZE_MAX
from dckpt.format.manifest import Manifest, Mesh
from dckpt.planning.streams import RANK_AXIS
from dckpt.planning.structure import MeshTable

Level = tuple[str, ...]
"""One cut of one dimension: the mesh axes that number its parts together, the major one first."""

AxisCuts = tuple[tuple[Level, ...], ...]
"""The cuts of each of the first dimensions, the first cut first; () is a whole tensor."""


@dataclass(frozen=True)
class NamedMesh:
    """World size and axes. Without a mesh the one axis is `rank`. Ranks are numbered row-major, as `init_device_mesh` does."""

    sizes: Mapping[str, int]
    is_named: bool

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return math.prod(self.sizes.values())

    @property
    def mesh(self) -> Mesh | None:
        """As a manifest states it; None without a mesh."""
        return Mesh(tuple(self.sizes), tuple(self.sizes.values())) if self.is_named else None

    @cached_property
    def live(self) -> tuple[str, ...]:
        """The axes with more than one rank."""
        return tuple(axis for axis, size in self.sizes.items() if size > 1)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where a rank stands."""
        return dict(zip(self.sizes, cell_place(tuple(self.sizes.values()), rank), strict=True))

    def table(self, levels: tuple[Level, ...]) -> MeshTable:
        """The mesh as one in which each of `levels` is one axis; the others follow."""
        names = list(self.sizes)
        used = [axis for level in levels for axis in level if axis in self.sizes]
        order = [names.index(axis) for axis in [*used, *(axis for axis in names if axis not in used)]]
        shape = tuple(math.prod(self.sizes.get(axis, 1) for axis in level) for level in levels)
        rest = tuple(self.sizes[axis] for axis in names if axis not in used)
        places = np.arange(self.world_size).reshape(tuple(self.sizes.values()))
        return MeshTable((*shape, *rest), tuple(places.transpose(order).reshape(-1).tolist()))

    def __str__(self) -> str:
        axes = ",".join(f"{axis}={size}" for axis, size in self.sizes.items())
        return axes if self.is_named else f"{self.world_size} ranks without a mesh"


def is_replicating(axis: str) -> bool:
    """Whether an axis that the checkpoint does not know is one that cuts nothing, by its name (HSDP: `replicate`)."""
    return "replica" in axis.lower()


def saved_mesh(manifest: Manifest) -> NamedMesh:
    """The mesh of the ranks that saved the checkpoint."""
    if manifest.mesh is None:
        return NamedMesh({RANK_AXIS: manifest.world_size}, is_named=False)
    return NamedMesh(dict(zip(manifest.mesh.axes, manifest.mesh.shape, strict=True)), is_named=True)


def choose_mesh(saved: NamedMesh, world_size: int | None, axes: Mapping[str, int] | None) -> NamedMesh:
    """The mesh to reshard for: `axes` as given, or the saved mesh with its one axis made as long as `world_size` asks.

    `ConfigError` if the two contradict each other, or leave open which axis grows.
    """
    if axes is not None:
        found = NamedMesh(dict(axes), is_named=True)
        if world_size is not None and world_size != found.world_size:
            raise ConfigError(
                f"--mesh {found}: expected {world_size} ranks as --world-size says, found {found.world_size}."
            )
    elif world_size is None:
        raise ConfigError("Reshard: expected --world-size N or --mesh axis=size,..., found neither.")
    elif not saved.is_named:
        found = NamedMesh({RANK_AXIS: world_size}, is_named=False)
    elif world_size == saved.world_size:
        found = saved
    else:
        candidates = saved.live or tuple(saved.sizes)
        if len(candidates) > 1:
            example = ",".join(f"{axis}=..." for axis in candidates)
            raise ConfigError(
                f"--world-size {world_size}: the checkpoint was saved on the mesh {saved}; expected to be told which axis takes "
                f"another number of ranks. Use --mesh {example}."
            )
        found = NamedMesh({**saved.sizes, candidates[0]: world_size}, is_named=True)
    if not 1 <= found.world_size <= WORLD_SIZE_MAX:
        raise ConfigError(f"Reshard: expected 1 to {WORLD_SIZE_MAX} ranks, found {found.world_size}.")
    return found
