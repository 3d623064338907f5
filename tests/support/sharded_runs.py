"""Genuine checkpoints with any regular sharding, without torch: laid out and written as the ranks of a mesh would."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dckpt.blocks.source import ImageSource
from dckpt.blocks.write import WriterPool, write_shard_file
from dckpt.catalog.catalog import Catalog
from dckpt.catalog.generations import list_generations
from dckpt.catalog.transaction import Transaction
from dckpt.format.index import LayoutIndex
from dckpt.format.layout import checkpoint_name
from dckpt.format.manifest import FileEntry, Manifest
from dckpt.format.values import dump_json
from dckpt.planning.files import plan_files
from dckpt.planning.indexing import index_of, report_files
from dckpt.planning.layout import decide_layout
from dckpt.planning.mesh import AxisCuts, NamedMesh
from dckpt.planning.records import RNG, record_capacity
from dckpt.planning.reshard import cut_row
from dckpt.planning.structure import Meshes, MeshTable, RankClass, Structure, TensorRow
from dckpt.storage.base import Storage
from tests.support.runs import RUN_ID, write_generation

KINDS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "U8": "u1", "BOOL": "?"}


@dataclass(frozen=True)
class Saved:
    """One tensor: its values, and how the mesh cuts it. `by_rank`: each rank's own values, kept by rank."""

    array: np.ndarray
    dtype: str = "F32"
    cuts: AxisCuts = ()
    is_frozen: bool = False
    by_rank: Sequence[np.ndarray] | None = None


@dataclass
class State:
    """What a run of ranks on `mesh` saves. values_by_rank: components whose value differs by rank."""

    mesh: NamedMesh
    tensors: dict[str, Saved]
    values: dict[str, Any] = field(default_factory=dict)
    values_by_rank: dict[str, Sequence[Any]] = field(default_factory=dict)
    streams: Sequence[Mapping[str, Any]] | None = None
    rng: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    parts: tuple[str, ...] = ("model", "optim", "rng")

    @property
    def world_size(self) -> int:
        return self.mesh.world_size

    def records(self, rank: int) -> dict[str, bytes]:
        """The records that a rank keeps of its own."""
        found = {name: dump_json(values[rank]) for name, values in self.values_by_rank.items()}
        return found if self.streams is None else {RNG: dump_json(self.streams[rank]), **found}


def unnamed(world_size: int) -> NamedMesh:
    """Ranks without a mesh."""
    return NamedMesh({"rank": world_size}, is_named=False)


def named(**sizes: int) -> NamedMesh:
    """A mesh by its axes."""
    return NamedMesh(sizes, is_named=True)


def write_state(
    storage: Storage, state: State, *, step: int = 10, generation: int = 1, alone: str | None = None
) -> Manifest:
    """Commits `state` as its ranks would; `alone`: the name of a stand-alone checkpoint."""
    storage.ensure_root()
    if alone is None and generation not in list_generations(storage):
        write_generation(storage, generation, world_size=state.world_size)
    checkpoint = alone or checkpoint_name(step, generation)
    attempt = uuid.uuid4().hex
    number = 0 if alone else generation
    transaction = Transaction(storage, checkpoint=checkpoint, attempt=attempt, generation=number)
    transaction.begin()
    index, entries = _write_ranks(storage, transaction.attempt_dir, attempt, state)
    storage.sync_dir(transaction.attempt_dir)
    entries.append(transaction.write_index(index))
    mesh = state.mesh
    places = tuple(tuple(mesh.coordinates(rank).values()) for rank in range(mesh.world_size))
    manifest = Manifest(
        run_id=None if alone else RUN_ID,
        step=step,
        micro_step=0,
        generation=number,
        attempt=attempt,
        created_unix_s=1_700_000_000.0,
        world_size=state.world_size,
        mesh=mesh.mesh,
        coordinates=places if mesh.is_named else None,
        parts=state.parts,
        values=state.values,
        rank_tensors=tuple(sorted(name for name, saved in state.tensors.items() if saved.by_rank is not None)),
        rank_values=tuple(sorted({name for rank in range(state.world_size) for name in state.records(rank)})),
        rng=state.rng,
        facts={"batch": {"micro": 1, "accumulation": 1, "data_parallel": state.world_size}},
        metrics={"loss": 0.5},
        writer={"dckpt": "0.0.0", "torch": "0.0"},
        files=tuple(entries),
    )
    transaction.stage_manifest(manifest)
    transaction.publish()
    return manifest


def _write_ranks(storage: Storage, attempt_dir: str, attempt: str, state: State) -> tuple[LayoutIndex, list[FileEntry]]:
    """Every rank's shard files, planned as a save plans them."""
    meshes: dict[MeshTable, int] = {}
    rows = [
        cut_row(
            TensorRow(name, saved.dtype, saved.array.shape, is_frozen=saved.is_frozen), saved.cuts, state.mesh, meshes
        )
        for name, saved in state.tensors.items()
    ]
    ranks = RankClass(Structure(tuple(rows)), Meshes(tuple(meshes)), tuple(range(state.world_size)))
    own = [state.records(rank) for rank in range(state.world_size)]
    values = [{name: (f"{name}{rank}", len(data)) for name, data in found.items()} for rank, found in enumerate(own)]
    differing = {
        rank: {name: str(rank) for name, saved in state.tensors.items() if saved.by_rank is not None}
        for rank in range(state.world_size)
    }
    decision = decide_layout([ranks], values, differing)
    kept = decision.layout.rank_values
    capacities = [{n: record_capacity(len(d)) for n, d in found.items() if n in kept} for found in own]
    reports, entries = [], []
    pool = WriterPool(1)
    for rank in range(state.world_size):
        boxes = [ranks.boxes_of(row, rank) for row in rows]
        plans = plan_files(rank, ranks.structure, boxes, decision.layout, capacities[rank])
        reports.append(report_files(plans, decision.layout.listed))
        for plan, items in plans:
            image = bytearray(plan.header)
            for item in items:
                if isinstance(item.source, str):
                    image += own[rank][item.source].ljust(item.shard_tensor.nbytes)
                else:
                    image += _bytes(state, rows[item.source[0]].name, rank, boxes[item.source[0]][item.source[1]])
            source = ImageSource(memoryview(image))
            entries += write_shard_file(storage, attempt_dir, attempt, rank, plan.file, source, lambda _: None, pool)
    pool.stop()
    return index_of(decision, reports, capacities), entries


def _bytes(state: State, name: str, rank: int, box: tuple[tuple[int, ...], tuple[int, ...]]) -> bytes:
    saved = state.tensors[name]
    array = saved.array if saved.by_rank is None else saved.by_rank[rank]
    part = array[tuple(slice(o, o + s) for o, s in zip(*box, strict=True))]
    return np.ascontiguousarray(part.astype(KINDS[saved.dtype], copy=False)).tobytes()


def read_tensors(storage: Storage, checkpoint: str) -> tuple[Manifest, LayoutIndex, dict[str, np.ndarray]]:
    """Every tensor put together from its chunks, straight from the files; each element must come from exactly one."""
    catalog = Catalog(storage)
    manifest, _ = catalog.read_manifest(checkpoint)
    index = catalog.read_index(checkpoint, manifest)
    found = {}
    for name in index.names():
        meta = index.meta(name)
        array = np.zeros(meta.shape, KINDS[meta.dtype])
        count = np.zeros(meta.shape, np.int64)
        for chunk in index.chunks(name):
            if chunk.file < 0:
                continue
            key = f"{checkpoint}/{manifest.attempt}/{index.files[chunk.file]}"
            data = storage.read_bytes(key, limit=2**30)
            end = chunk.begin + meta.chunk_nbytes(chunk)
            place = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
            array[place] = np.frombuffer(data[chunk.begin : end], KINDS[meta.dtype]).reshape(chunk.sizes)
            count[place] += 1
        assert (count == 1).all(), name
        found[name] = array
    return manifest, index, found
