"""The manifest: what a checkpoint contains and where (FORMAT.md, section 8)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, cast

from dckpt.errors import ConfigError, CorruptCheckpointError
from dckpt.format.fields import Fields, ensure_version
from dckpt.format.layout import (
    FILE_BYTES_MAX,
    FINGERPRINT_BYTES,
    GENERATION_MAX,
    MANIFEST_NAME,
    MICRO_STEP_MAX,
    SHARD_SUFFIX,
    STEP_MAX,
    SUMS_SUFFIX,
    WORLD_SIZE_MAX,
    CheckpointId,
    ensure_safe_path,
    fingerprints_in_sums,
    is_hex32,
    parse_checkpoint_name,
    parse_index_file_name,
    sums_file_bytes,
    sums_file_name,
)
from dckpt.format.origin import Origin, parse_origin
from dckpt.format.refusal import corrupt, shown
from dckpt.format.sealed_json import JsonValue, open_sealed_json, seal_json

FORMAT_MAJOR = 1
FORMAT_MINOR = 0
MANIFEST_BYTES_MAX = 64 * 2**20
FILES_MAX = 2 * 2**20 + 1
NAMES_MAX = 2**20
MESH_AXES_MAX = 16

FileKind = Literal["shard", "sums", "index"]

REUSED_MAX = 999_999

_ENTRY_KEYS = ("path", "size", "digest", "kind", "rank", "checkpoint", "reused")
_KEYS = (
    "dckpt", "version", "run_id", "step", "micro_step", "generation", "attempt", "created_unix_s",
    "world_size", "mesh", "coordinates", "parts", "values", "planner_data", "rank_tensors", "rank_values",
    "aliases", "rng", "facts", "metrics", "writer", "lineage", "files",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a checkpoint.

    checkpoint: another checkpoint of the run in which the file lies. reused: how many checkpoints in a row took the file
    over unchanged since it was written, 0 if this one wrote it; of shards only.
    """

    path: str
    size: int
    digest: str
    kind: FileKind
    rank: int | None
    checkpoint: str | None = None
    reused: int = 0

    @property
    def name(self) -> str:
        """The last component of its path: what the layout index calls a shard."""
        return self.path.rpartition("/")[2]

    def key_in(self, checkpoint: str) -> str:
        """Where the file of `checkpoint` lies in the run: in its own directory or in the one that the entry names."""
        return f"{self.checkpoint or checkpoint}/{self.path}"


@dataclass(frozen=True, slots=True)
class Mesh:
    """The device mesh: names of its axes and their sizes."""

    axes: tuple[str, ...]
    shape: tuple[int, ...]


# Without slots: the lookups below are computed once per manifest and kept in the instance's dict.
@dataclass(frozen=True)
class Manifest:
    """The commit record of one checkpoint. Values stay tagged JSON; `generation` 0 means no run."""

    run_id: str | None
    step: int | None
    micro_step: int
    generation: int
    attempt: str
    created_unix_s: float
    world_size: int
    mesh: Mesh | None = None
    coordinates: tuple[tuple[int, ...], ...] | None = None
    parts: tuple[str, ...] = ()
    values: Mapping[str, JsonValue] = field(default_factory=dict)
    planner_data: JsonValue = None
    rank_tensors: tuple[str, ...] = ()
    rank_values: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    rng: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    writer: Mapping[str, str] = field(default_factory=dict)
    lineage: Origin | None = None
    files: tuple[FileEntry, ...] = ()

    @property
    def id(self) -> CheckpointId | None:
        """Which checkpoint of a run this is; None for a stand-alone one."""
        if self.step is None or self.generation == 0:
            return None
        return CheckpointId(step=self.step, micro_step=self.micro_step, generation=self.generation)

    @cached_property
    def index_entry(self) -> FileEntry:
        """The layout index."""
        return next(entry for entry in self.files if entry.kind == "index")

    @cached_property
    def shard_entries(self) -> tuple[FileEntry, ...]:
        """The shard files, in the order of the manifest."""
        return tuple(entry for entry in self.files if entry.kind == "shard")

    @cached_property
    def _sums_by_place(self) -> dict[tuple[str | None, str], FileEntry]:
        return {(entry.checkpoint, entry.path): entry for entry in self.files if entry.kind == "sums"}

    def sums_entry(self, shard: FileEntry) -> FileEntry:
        """The sums file of a shard file of this checkpoint."""
        return self._sums_by_place[shard.checkpoint, sums_file_name(shard.path)]

    @cached_property
    def references(self) -> tuple[str, ...]:
        """The other checkpoints in which files of this one lie, ascending."""
        return tuple(sorted({entry.checkpoint for entry in self.files if entry.checkpoint is not None}))

    @cached_property
    def total_bytes(self) -> int:
        """Bytes of all its files, the manifest itself left out."""
        return sum(entry.size for entry in self.files)


def manifest_digest(data: bytes) -> str:
    """The SHA-256 of a complete manifest file: what a generation record states of its parent."""
    return hashlib.sha256(data).hexdigest()


def encode_manifest(manifest: Manifest) -> bytes:
    """The content of `manifest.json`. What `parse_manifest` would refuse is never written."""
    data = seal_json(_to_json(manifest))
    try:
        parsed = parse_manifest(data, key=MANIFEST_NAME)
    except CorruptCheckpointError as error:
        raise ConfigError(
            f"The manifest cannot be written, readers would refuse it: {error.message} "
            "If it is too large, store less in values and facts."
        ) from error
    assert seal_json(_to_json(parsed)) == data, "a manifest must read back as it was written"
    return data


def _to_json(manifest: Manifest) -> dict[str, Any]:
    mesh = manifest.mesh
    return {
        "dckpt": "manifest",
        "version": [FORMAT_MAJOR, FORMAT_MINOR],
        "run_id": manifest.run_id,
        "step": manifest.step,
        "micro_step": manifest.micro_step,
        "generation": manifest.generation,
        "attempt": manifest.attempt,
        "created_unix_s": float(manifest.created_unix_s),
        "world_size": manifest.world_size,
        "mesh": None if mesh is None else {"axes": list(mesh.axes), "shape": list(mesh.shape)},
        "coordinates": None if manifest.coordinates is None else [list(one) for one in manifest.coordinates],
        "parts": list(manifest.parts),
        "values": dict(manifest.values),
        "planner_data": manifest.planner_data,
        "rank_tensors": list(manifest.rank_tensors),
        "rank_values": list(manifest.rank_values),
        "aliases": dict(manifest.aliases),
        "rng": {stream: list(axes) for stream, axes in manifest.rng.items()},
        "facts": dict(manifest.facts),
        "metrics": {name: _metric_to_json(float(value)) for name, value in manifest.metrics.items()},
        "writer": dict(manifest.writer),
        "lineage": None if manifest.lineage is None else manifest.lineage.to_json(),
        "files": [_entry_to_json(entry) for entry in manifest.files],
    }


def _metric_to_json(value: float) -> JsonValue:
    # A diverged loss is a fact worth keeping, and JSON has no literal for it.
    return value if math.isfinite(value) else {"$t": "float", "v": str(value)}


def _entry_to_json(entry: FileEntry) -> dict[str, Any]:
    found: dict[str, Any] = {
        "path": entry.path,
        "size": entry.size,
        "digest": entry.digest,
        "kind": entry.kind,
        "rank": entry.rank,
    }
    if entry.checkpoint is not None:
        found["checkpoint"] = entry.checkpoint
    if entry.reused:
        found["reused"] = entry.reused
    return found


def parse_manifest(data: bytes, *, key: str) -> Manifest:
    """The manifest in the file `key`, every field checked; see FORMAT.md, section 8."""
    found = open_sealed_json(data, key=key, limit=MANIFEST_BYTES_MAX)
    _, minor = ensure_version(found, key=key, kind="manifest", major=FORMAT_MAJOR)
    is_newer = minor > FORMAT_MINOR
    fields = Fields(found, key=key)
    fields.ensure_known(_KEYS, is_newer=is_newer)
    mesh = _parse_mesh(fields, key)
    world_size = fields.integer("world_size", 1, WORLD_SIZE_MAX)
    attempt = fields.hex32("attempt")
    manifest = Manifest(
        run_id=fields.component("run_id") if fields.has("run_id") else None,
        step=fields.integer("step", 0, STEP_MAX) if fields.has("step") else None,
        micro_step=fields.integer("micro_step", 0, MICRO_STEP_MAX),
        generation=fields.integer("generation", 0, GENERATION_MAX),
        attempt=attempt,
        created_unix_s=fields.seconds("created_unix_s"),
        world_size=world_size,
        mesh=mesh,
        coordinates=_parse_coordinates(fields, mesh, world_size),
        parts=fields.names("parts", limit=NAMES_MAX),
        values=fields.mapping("values"),
        planner_data=fields.value("planner_data"),
        rank_tensors=fields.names("rank_tensors", limit=NAMES_MAX),
        rank_values=fields.names("rank_values", limit=NAMES_MAX),
        aliases=fields.texts("aliases"),
        rng=_parse_rng(fields, key),
        facts=fields.mapping("facts"),
        metrics=_parse_metrics(fields),
        writer=fields.texts("writer"),
        lineage=parse_origin(fields.value("lineage"), key=key) if fields.has("lineage") else None,
        files=_parse_files(fields, key, attempt, world_size, is_newer=is_newer),
    )
    is_of_run = manifest.generation > 0
    if (manifest.run_id is not None) != is_of_run:
        raise corrupt(key, "run_id", "null exactly if generation is 0", shown(manifest.run_id))
    if is_of_run and manifest.step is None:
        raise corrupt(key, "step", "an integer in a checkpoint of a run", "null")
    _ensure_references(manifest, key)
    return manifest


def _ensure_references(manifest: Manifest, key: str) -> None:
    """Files are taken over within one run only, and never from the checkpoint itself."""
    own = None if manifest.id is None else manifest.id.name
    for entry in manifest.files:
        if own is None and (entry.checkpoint is not None or entry.reused):
            raise corrupt(
                key, f"files, {entry.path}", "a file of its own in a stand-alone checkpoint", "one taken over"
            )
        if own is not None and entry.checkpoint == own:
            raise corrupt(key, f"files, {entry.path}", "another checkpoint than its own", own)


def _parse_mesh(fields: Fields, key: str) -> Mesh | None:
    if not fields.has("mesh"):
        return None
    mesh = Fields(fields.value("mesh"), key=key, path="mesh")
    mesh.ensure_known(("axes", "shape"), is_newer=False)
    axes = mesh.names("axes", limit=MESH_AXES_MAX)
    shape = mesh.items("shape", limit=MESH_AXES_MAX)
    if not axes or len(shape) != len(axes):
        raise mesh.refuse("shape", f"{len(axes)} sizes, at least one", f"{len(shape)} sizes")
    for size in shape:
        if type(size) is not int or not 1 <= size <= WORLD_SIZE_MAX:
            raise mesh.refuse("shape", f"sizes from 1 to {WORLD_SIZE_MAX}", shown(size))
    return Mesh(axes=axes, shape=tuple(shape))


def _parse_coordinates(fields: Fields, mesh: Mesh | None, world_size: int) -> tuple[tuple[int, ...], ...] | None:
    if not fields.has("coordinates"):
        return None
    if mesh is None:
        raise fields.refuse("coordinates", "null without a mesh", "an array")
    found = fields.items("coordinates", limit=world_size)
    if len(found) != world_size:
        raise fields.refuse("coordinates", f"{world_size} of them, one per rank", str(len(found)))
    for rank, coordinate in enumerate(found):
        is_inside = isinstance(coordinate, list) and len(coordinate) == len(mesh.shape)
        if not is_inside or not all(
            type(place) is int and 0 <= place < size for place, size in zip(coordinate, mesh.shape, strict=True)
        ):
            raise fields.refuse(f"coordinates[{rank}]", f"a place in a mesh of shape {mesh.shape}", shown(coordinate))
    return tuple(tuple(coordinate) for coordinate in found)


def _parse_rng(fields: Fields, key: str) -> dict[str, tuple[str, ...]]:
    streams = Fields(fields.mapping("rng"), key=key, path="rng")
    return {stream: streams.names(stream, limit=MESH_AXES_MAX) for stream in fields.mapping("rng")}


def _parse_metrics(fields: Fields) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, found in fields.mapping("metrics").items():
        if type(found) in (int, float):
            metrics[name] = float(found)
        elif isinstance(found, dict) and set(found) == {"$t", "v"} and found["$t"] == "float":
            if found["v"] not in ("inf", "-inf", "nan"):
                raise fields.refuse(f"metrics.{name}", "inf, -inf or nan", shown(found["v"]))
            metrics[name] = float(found["v"])
        else:
            raise fields.refuse(f"metrics.{name}", "a number", shown(found))
    return metrics


def _parse_files(fields: Fields, key: str, attempt: str, world_size: int, *, is_newer: bool) -> tuple[FileEntry, ...]:
    entries = tuple(
        _parse_entry(found, key=key, path=f"files[{position}]", world_size=world_size, is_newer=is_newer)
        for position, found in enumerate(fields.items("files", limit=FILES_MAX))
    )
    by_place = {(entry.checkpoint, entry.path): entry for entry in entries}
    if len(by_place) != len(entries):
        raise corrupt(key, "files", "each path once", "a repeated one")
    shards = [entry.name for entry in entries if entry.kind == "shard"]
    if len(set(shards)) != len(shards):
        raise corrupt(key, "files", "each name of a shard once", "a repeated one")
    num_by_kind = {kind: sum(entry.kind == kind for entry in entries) for kind in ("shard", "sums", "index")}
    if num_by_kind["index"] != 1:
        raise corrupt(key, "files", "exactly one index", f"{num_by_kind['index']}")
    if num_by_kind["sums"] != num_by_kind["shard"]:
        raise corrupt(key, "files", f"{num_by_kind['shard']} sums, one per shard", f"{num_by_kind['sums']}")
    for entry in entries:
        _ensure_place(entry, key, attempt)
        if entry.kind == "shard":
            _ensure_sums(entry, by_place.get((entry.checkpoint, sums_file_name(entry.path))), key)
    return entries


def _parse_entry(found: Any, *, key: str, path: str, world_size: int, is_newer: bool) -> FileEntry:
    fields = Fields(found, key=key, path=path)
    fields.ensure_known(_ENTRY_KEYS, is_newer=is_newer)
    name = fields.text("path")
    ensure_safe_path(name, key=key, field=f"{path}.path")
    kind = cast("FileKind", fields.choice("kind", ("shard", "sums", "index")))
    checkpoint, reused = _parse_reuse(fields, kind)
    if kind == "index" and fields.has("rank"):
        raise fields.refuse("rank", "null for the index", shown(fields.value("rank")))
    # A file that another checkpoint wrote may come from a larger world.
    rank_max = WORLD_SIZE_MAX - 1 if checkpoint else world_size - 1
    return FileEntry(
        path=name,
        size=fields.integer("size", 0, FILE_BYTES_MAX),
        digest=fields.hex32("digest"),
        kind=kind,
        rank=None if kind == "index" else fields.integer("rank", 0, rank_max),
        checkpoint=checkpoint,
        reused=reused,
    )


def _parse_reuse(fields: Fields, kind: FileKind) -> tuple[str | None, int]:
    """`checkpoint` and `reused` of an entry; most files have neither."""
    checkpoint = None
    if "checkpoint" in fields:
        checkpoint = fields.text("checkpoint")
        if kind == "index" or parse_checkpoint_name(checkpoint) is None:
            raise fields.refuse("checkpoint", "the name of a checkpoint, of shards and sums only", shown(checkpoint))
    reused = 0
    if "reused" in fields:
        if kind != "shard":
            raise fields.refuse("reused", "a count of shards only", f"one of {kind}")
        reused = fields.integer("reused", 1, REUSED_MAX)
    elif kind == "shard" and checkpoint is not None:
        raise fields.refuse("reused", "a count beside `checkpoint`", "none")
    return checkpoint, reused


def _ensure_place(entry: FileEntry, key: str, attempt: str) -> None:
    where = f"files, {entry.path}"
    if entry.kind == "index":
        if parse_index_file_name(entry.path) != entry.digest:
            raise corrupt(key, where, f"layout-{entry.digest}.index", entry.path)
        return
    directory, _, name = entry.path.partition("/")
    suffix = SHARD_SUFFIX if entry.kind == "shard" else SUMS_SUFFIX
    is_attempt = is_hex32(directory) if entry.checkpoint else directory == attempt
    if not is_attempt or "/" in name or not name.endswith(suffix) or name == suffix:
        raise corrupt(key, where, f"{attempt}/<name>{suffix}", entry.path)


def _ensure_sums(shard: FileEntry, sums: FileEntry | None, key: str) -> None:
    where = f"files, {shard.path}"
    if sums is None or sums.kind != "sums":
        raise corrupt(key, where, "a sums entry beside it", "none")
    if sums.rank != shard.rank:
        raise corrupt(key, where, f"sums of rank {shard.rank}", f"sums of rank {sums.rank}")
    if fingerprints_in_sums(sums.size, shard.size) is None:
        expected = f"sums of {sums_file_bytes(shard.size, 0)} bytes, and {FINGERPRINT_BYTES} a tensor"
        raise corrupt(key, where, expected, f"{sums.size} bytes")
