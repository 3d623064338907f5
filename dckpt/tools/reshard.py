"""`dckpt reshard`: what it reads and what it will write, decided before a byte is written. Reads no tensor data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dckpt.blocks.gather import GATHER_BYTES_MAX
from dckpt.blocks.verified_files import VerifiedFiles
from dckpt.catalog.catalog import Catalog
from dckpt.errors import CorruptCheckpointError
from dckpt.format.index import LayoutIndex
from dckpt.format.layout import sums_file_bytes
from dckpt.format.manifest import Manifest
from dckpt.format.origin import Origin
from dckpt.format.streams import stream_digest
from dckpt.format.values import JsonValue, dump_json, load_json
from dckpt.planning.mesh import NamedMesh, choose_mesh, saved_mesh
from dckpt.planning.records import RECORD_BYTES_MAX, RNG, values_record_name
from dckpt.planning.reshard import Reshard, carried_values, ensure_expressible, plan_reshard
from dckpt.planning.streams import TOLD, SavedStreams, StreamPlan, classify_streams, plan_streams, shared_streams
from dckpt.storage.base import Storage
from dckpt.tools.destination import Destination
from dckpt.tools.target import open_target


@dataclass(frozen=True, slots=True)
class Source:
    """One committed checkpoint. `is_in_run`: the storage is a run; one that was moved out of its run still has generations."""

    storage: Storage
    name: str
    is_in_run: bool
    manifest: Manifest
    sha256: str
    index: LayoutIndex

    @property
    def url(self) -> str:
        """Where its directory is."""
        return self.storage.locate(self.name)


def open_source(text: str) -> Source:
    """The checkpoint that `RUN[@STEP]` or a checkpoint's directory names; of a run its latest."""
    target = open_target(text)
    catalog = Catalog(target.storage)
    name = target.checkpoint if target.checkpoint is not None else catalog.resolve("latest").name
    manifest, sha256 = catalog.read_manifest(name)
    return Source(target.storage, name, target.is_run, manifest, sha256, catalog.read_index(name, manifest))


class NewStreams:
    """The random streams of each rank of the new mesh, derived when they are asked for: exactly what a resume would set."""

    def __init__(self, manifest: Manifest, records: Mapping[str, JsonValue], mesh: NamedMesh) -> None:
        self._mesh = mesh
        self._saved = SavedStreams(
            axes=manifest.rng,
            records=records,
            world_size=manifest.world_size,
            generation=manifest.generation,
            step=manifest.step or 0,
            is_same_mesh=False,
            known_shared=shared_streams(manifest.world_size, manifest.rng, manifest.facts),
        )

    def plan(self, rank: int) -> StreamPlan:
        """States by stream, and how each came about."""
        return plan_streams(self._saved, self._mesh.coordinates(rank))

    def record(self, rank: int) -> bytes:
        """The rank's record, as a save there would write it."""
        return dump_json(self.plan(rank).states, limit=RECORD_BYTES_MAX)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What will be written, wherever it goes. `values`, `rng`: of the new manifest."""

    source: Source
    mesh: NamedMesh
    layout: Reshard
    streams: NewStreams | None
    values: Mapping[str, Any]
    rng: Mapping[str, tuple[str, ...]]

    def size_of(self, rank: int) -> tuple[int, int]:
        """(shard files, bytes) that one rank of the new mesh gets, with their checksum files."""
        plans = [plan for plan, _ in self.layout.files(rank)]
        return len(plans), sum(plan.size + sums_file_bytes(plan.size, len(plan.tensors)) for plan in plans)


def is_laid_out(source: Source, world_size: int | None, axes: Mapping[str, int] | None) -> bool:
    """Whether the checkpoint was saved on this very mesh: there is nothing to reshard then."""
    saved = saved_mesh(source.manifest)
    wanted = choose_mesh(saved, world_size, axes)
    return (wanted.mesh, wanted.world_size) == (saved.mesh, saved.world_size)


def prepare(source: Source, world_size: int | None, axes: Mapping[str, int] | None) -> Prepared:
    """The layout for another mesh. Reads the index and rank 0's records.

    `ConfigError` if it is not clear which mesh is meant, `IncompatibleStateError` if the checkpoint cannot be laid out for it.
    """
    manifest, index = source.manifest, source.index
    mesh = choose_mesh(saved_mesh(manifest), world_size, axes)
    ensure_expressible(manifest, index, mesh)
    with VerifiedFiles(source.storage, source.name, manifest, index) as files:
        carried = {name: _read_record(files, index, name) for name in carried_values(manifest)}
        has_rng = RNG in manifest.rank_values
        records = _ensure_streams(_read_record(files, index, RNG)) if has_rng else {}
    streams = NewStreams(manifest, records or {}, mesh) if has_rng else None
    sizes, digests = [], []
    for rank in range(mesh.world_size if streams is not None else 0):
        assert streams is not None
        states = streams.plan(rank).states
        digests.append({name: stream_digest(state) for name, state in states.items()})
        sizes.append(len(dump_json(states, limit=RECORD_BYTES_MAX)))
    # Each rank's record counts as another value: it is kept by rank whatever is in it.
    layout = plan_reshard(manifest, index, mesh, [(str(rank), size) for rank, size in enumerate(sizes)] or None)
    return Prepared(
        source=source,
        mesh=mesh,
        layout=layout,
        streams=streams,
        values={**manifest.values, **{name: value for name, value in carried.items() if value is not None}},
        rng=classify_streams(digests, [mesh.coordinates(rank) for rank in range(len(digests))]),
    )


def _read_record(files: VerifiedFiles, index: LayoutIndex, component: str) -> Any:
    """Rank 0's value of a component that differs by rank; None if it has none."""
    name = values_record_name(0, component)
    if name not in index:
        return None
    return load_json(files.read_record(name, limit=RECORD_BYTES_MAX), key=name, limit=RECORD_BYTES_MAX)


def _ensure_streams(value: Any) -> Mapping[str, JsonValue]:
    if value is not None and not isinstance(value, dict):
        raise CorruptCheckpointError(
            f"Record of rank 0: expected random streams by name, found {type(value).__name__}. Use an older step.",
            key=values_record_name(0, RNG),
            field=RNG,
            expected="an object",
            found=type(value).__name__,
        )
    return value or {}


def origin_of(prepared: Prepared) -> Origin:
    """What the new manifest says of the source."""
    manifest = prepared.source.manifest
    return Origin(
        how="reshard",
        run_id=manifest.run_id,
        checkpoint=prepared.source.name,
        step=manifest.step,
        micro_step=manifest.micro_step,
        generation=manifest.generation,
        manifest_sha256=prepared.source.sha256,
        world_size=manifest.world_size,
        carried=prepared.layout.carried,
    )


@dataclass(frozen=True, slots=True)
class ReshardPlan:
    """What a person wants to know before it happens. Bytes are of shard files and their checksums."""

    source: str
    destination: str
    checkpoint: str
    is_new_run: bool
    step: int | None
    saved_world_size: int
    saved_mesh: Mapping[str, int]
    world_size: int
    mesh: Mapping[str, int]
    num_tensors: int
    num_cut: int
    num_files: int
    num_bytes: int
    rank_bytes_min: int
    rank_bytes_max: int
    free_bytes: int | None
    memory_bytes_max: int
    """Of one process, beside the layout and the program itself, however large the checkpoint is."""
    carried: tuple[str, ...]
    """Tensors and values that differed by rank: rank 0's go to every rank."""
    streams: Mapping[str, str]
    superseded: tuple[str, ...]
    """Checkpoints of the run that the new one takes off the line."""


def describe_plan(prepared: Prepared, destination: Destination, sizes: list[tuple[int, int]]) -> ReshardPlan:
    """The plan as a record; `sizes`: (files, bytes) of each rank."""
    source, mesh, layout = prepared.source, prepared.mesh, prepared.layout
    saved = saved_mesh(source.manifest)
    streams = {} if prepared.streams is None else prepared.streams.plan(0).actions
    return ReshardPlan(
        source=source.url,
        destination=destination.storage.url,
        checkpoint=destination.checkpoint,
        is_new_run=destination.is_new_run,
        step=source.manifest.step,
        saved_world_size=saved.world_size,
        saved_mesh=dict(saved.sizes) if saved.is_named else {},
        world_size=mesh.world_size,
        mesh=dict(mesh.sizes) if mesh.is_named else {},
        num_tensors=len(layout.structure.rows),
        num_cut=layout.num_cut,
        num_files=sum(count for count, _ in sizes),
        num_bytes=sum(nbytes for _, nbytes in sizes),
        rank_bytes_min=min(nbytes for _, nbytes in sizes),
        rank_bytes_max=max(nbytes for _, nbytes in sizes),
        free_bytes=destination.storage.free_bytes(),
        memory_bytes_max=GATHER_BYTES_MAX,
        carried=(*layout.carried, *carried_values(source.manifest)),
        streams={stream: TOLD[action] for stream, action in sorted(streams.items())},
        superseded=destination.superseded,
    )
