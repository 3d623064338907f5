"""What this rank has to save: live chunks, the JSON of its values, and its structure, remembered while it does not change."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

from dckpt.dcp.chunks import LocalChunk, local_chunks, tensor_digest
from dckpt.format.checksum import digest_bytes
from dckpt.format.grids import cell_box
from dckpt.format.streams import stream_digest
from dckpt.format.values import dump_json
from dckpt.planning.layout import Values
from dckpt.planning.records import RECORD_BYTES_MAX, RNG
from dckpt.planning.structure import Box, Cut, Meshes, MeshTable, Structure, TensorRow, grid_levels
from dckpt.state.naming import DTYPE_NAMES
from dckpt.state.records import Captured, NamedTensor

Signature: TypeAlias = tuple[Hashable, ...]


@dataclass(frozen=True)
class Described:
    """A structure and its meshes, with the signature of the tensors that they describe."""

    signature: Signature
    structure: Structure
    meshes: Meshes


@dataclass
class LocalState:
    """What this rank has to save, in the order of its structure."""

    captured: Captured
    chunks: list[list[LocalChunk]]
    records: dict[str, bytes]
    described: Described
    values: Values
    rng: dict[str, str]
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def boxes(self) -> list[list[Box]]:
        """Of each tensor, the boxes that this rank holds."""
        return [[(chunk.offsets, chunk.sizes) for chunk in chunks] for chunks in self.chunks]


def describe_state(captured: Captured, before: Described | None, *, world_size: int) -> LocalState:
    """The state as it is saved from here on. `before`: the description at the last save, used again if nothing changed."""
    chunks = [local_chunks(item.name, item.tensor) for item in captured.tensors]
    records = {name: dump_json(value, limit=RECORD_BYTES_MAX) for name, value in captured.values.items()}
    records[RNG] = dump_json(captured.rng, limit=RECORD_BYTES_MAX)
    return LocalState(
        captured=captured,
        chunks=chunks,
        records=records,
        described=_describe(captured.tensors, chunks, before),
        values={name: (digest_bytes(data), len(data)) for name, data in records.items()},
        rng={stream: stream_digest(value) for stream, value in captured.rng.items()},
        digests=_digests(captured.tensors) if world_size > 1 else {},  # one rank has nobody to differ from
    )


def _digests(tensors: Sequence[NamedTensor]) -> dict[str, str]:
    """Of the checked tensors. Shape and dtype go into it: equal bytes of another shape are another value."""
    return {
        item.name: f"{DTYPE_NAMES[item.tensor.dtype]}{list(item.tensor.shape)}{tensor_digest(item.tensor)}"
        for item in tensors
        if item.replication == "checked"
    }


def _describe(
    tensors: Sequence[NamedTensor], chunks: Sequence[Sequence[LocalChunk]], before: Described | None
) -> Described:
    signature = tuple(_signature(item, held) for item, held in zip(tensors, chunks, strict=True))
    if before is not None and before.signature == signature:
        return before
    return Described(signature, *describe_tensors(tensors, chunks))


def describe_tensors(
    tensors: Sequence[NamedTensor], chunks: Sequence[Sequence[LocalChunk]]
) -> tuple[Structure, Meshes]:
    """How the tensors are cut; `chunks[i]`: what this rank holds of tensor i."""
    meshes: dict[MeshTable, int] = {}
    tables: dict[DeviceMesh, MeshTable] = {}
    rows = tuple(_row(item, held, meshes, tables) for item, held in zip(tensors, chunks, strict=True))
    return Structure(rows), Meshes(tuple(meshes))


def _signature(item: NamedTensor, chunks: Sequence[LocalChunk]) -> Hashable:
    """All that a plan depends on: never data, addresses or identities of tensors."""
    tensor = item.tensor
    layout = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None
    boxes = tuple((chunk.offsets, chunk.sizes) for chunk in chunks)
    return (item.name, item.replication, item.is_frozen, tensor.dtype, tensor.shape, layout, boxes)


def _row(
    item: NamedTensor,
    chunks: Sequence[LocalChunk],
    meshes: dict[MeshTable, int],
    tables: dict[DeviceMesh, MeshTable],
) -> TensorRow:
    tensor = item.tensor
    shape = tuple(tensor.shape)
    row = TensorRow(
        name=item.name,
        dtype=DTYPE_NAMES[tensor.dtype],
        shape=shape,
        is_checked=item.replication == "checked",
        is_frozen=item.is_frozen,
    )
    if not isinstance(tensor, DTensor):
        return row
    boxes = tuple((chunk.offsets, chunk.sizes) for chunk in chunks)
    mesh = tensor.device_mesh
    if mesh not in tables:  # as long as the job has ranks: made for each mesh, not for each tensor
        tables[mesh] = MeshTable(tuple(mesh.shape), tuple(mesh.mesh.flatten().tolist()))
    return cut_row(row, tables[mesh], tensor.placements, mesh.get_coordinate(), boxes, meshes)


def cut_row(
    row: TensorRow,
    table: MeshTable,
    placements: Sequence[Placement],
    coordinate: Sequence[int] | None,
    boxes: tuple[Box, ...],
    meshes: dict[MeshTable, int],
) -> TensorRow:
    """`row` with how it is cut over the mesh: regularly, or in the `boxes` that the rank at `coordinate` holds.

    meshes: numbers of the meshes so far; a new one gets the next.
    """
    axes = _cutting_axes(placements, len(row.shape))
    if axes is not None:
        cut = Cut(meshes.get(table, len(meshes)), axes)
        if boxes == _expected_boxes(row.shape, cut, table, coordinate):
            meshes.setdefault(table, len(meshes))
            return replace(row, cut=cut)
    return replace(row, boxes=boxes)


def _cutting_axes(placements: Sequence[Placement], dimensions: int) -> tuple[tuple[int, ...], ...] | None:
    """The mesh axes that cut each tensor dimension, the major one first; None for placements of another kind.

    A strided shard is the minor cut of its dimension, though its axis comes first (FSDP over tensor parallelism):
    torch/distributed/tensor/placement_types.py, `_StridedShard`.
    """
    plain: list[list[int]] = [[] for _ in range(dimensions)]
    strided: list[list[int]] = [[] for _ in range(dimensions)]
    for axis, placement in enumerate(placements):
        if placement.is_replicate():
            continue
        dim = getattr(placement, "dim", None)
        if dim is None or placement.is_partial():
            return None
        is_strided = getattr(placement, "split_factor", None) is not None
        (strided if is_strided else plain)[dim % dimensions].append(axis)
    found = [tuple(major + minor[::-1]) for major, minor in zip(plain, strided, strict=True)]
    while found and not found[-1]:
        found.pop()
    return tuple(found)


def _expected_boxes(
    shape: tuple[int, ...], cut: Cut, table: MeshTable, coordinate: Sequence[int] | None
) -> tuple[Box, ...]:
    if coordinate is None:
        return ()
    place = []
    for axes in cut.axes:
        at = 0
        for axis in axes:
            at = at * table.shape[axis] + coordinate[axis]
        place.append(at)
    levels = grid_levels(cut, table)
    box = cell_box(shape, levels, place[: len(levels)])
    return () if 0 in box[1] else (box,)
