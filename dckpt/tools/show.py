"""`dckpt show`: everything about one checkpoint that its manifest and index say. Reads no tensor data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dckpt.catalog.catalog import Catalog
from dckpt.errors import CorruptCheckpointError, FormatVersionError
from dckpt.format.index import LayoutIndex
from dckpt.format.manifest import Manifest
from dckpt.format.origin import Origin
from dckpt.tools.components import Component, list_components
from dckpt.tools.inspect import GenerationRow, lineage_of, place_in_line
from dckpt.tools.target import Target

SUMMARY_CHARS_MAX = 100


@dataclass(frozen=True, slots=True)
class ValueRow:
    """One plain value, cut to one line."""

    name: str
    summary: str


@dataclass(frozen=True, slots=True)
class RngRow:
    """One random stream. No axes: it is equal on every rank."""

    stream: str
    axes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FileRow:
    """One file of the checkpoint, as the manifest states it."""

    path: str
    kind: str
    rank: int | None
    size_bytes: int
    digest: str
    checkpoint: str | None
    """The other checkpoint in which the file lies."""
    reused: int
    """How many checkpoints in a row took it over unchanged."""


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One tensor: `shape` is global, `files` are those its chunks lie in."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_chunks: int
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CheckpointDetails:
    """One checkpoint in full."""

    url: str
    name: str
    run_id: str | None
    step: int | None
    micro_step: int
    generation: int
    attempt: str
    created_unix_s: float
    states: tuple[str, ...]
    lineage: tuple[GenerationRow, ...]
    made_from: Origin | None
    """The checkpoint that this one was resharded or exported from."""
    world_size: int
    mesh: Mapping[str, int]
    writer: Mapping[str, str]
    components: tuple[Component, ...]
    values: tuple[ValueRow, ...]
    rank_values: tuple[str, ...]
    rank_tensors: tuple[str, ...]
    aliases: Mapping[str, str]
    rng: tuple[RngRow, ...]
    metrics: Mapping[str, float]
    facts: Mapping[str, Any]
    files: tuple[FileRow, ...]
    total_bytes: int
    num_tensors: int
    num_chunks: int
    tensors: tuple[TensorRow, ...] | None
    """None unless they were asked for."""


def show_checkpoint(target: Target, *, with_tensors: bool = False) -> CheckpointDetails:
    """The checkpoint that the target names; of a run its latest."""
    storage, catalog = target.storage, Catalog(target.storage)
    name = target.checkpoint if target.checkpoint is not None else catalog.resolve("latest").name
    manifest, _ = catalog.read_manifest(name)
    index = catalog.read_index(name, manifest)
    metas = [index.meta(tensor) for tensor in index.names()]
    mesh = manifest.mesh
    return CheckpointDetails(
        url=storage.url,
        name=name,
        run_id=manifest.run_id,
        step=manifest.step,
        micro_step=manifest.micro_step,
        generation=manifest.generation,
        attempt=manifest.attempt,
        created_unix_s=manifest.created_unix_s,
        states=_states(catalog, manifest) if target.is_run else (),
        lineage=lineage_of(storage, manifest.generation) if target.is_run else (),
        made_from=manifest.lineage,
        world_size=manifest.world_size,
        mesh={} if mesh is None else dict(zip(mesh.axes, mesh.shape, strict=True)),
        writer=manifest.writer,
        components=list_components(manifest, [(meta.name, meta.dtype, tuple(meta.shape)) for meta in metas]),
        values=tuple(ValueRow(key, summarise(value)) for key, value in _flatten(manifest.values)),
        rank_values=manifest.rank_values,
        rank_tensors=manifest.rank_tensors,
        aliases=manifest.aliases,
        rng=tuple(RngRow(stream, axes) for stream, axes in sorted(manifest.rng.items())),
        metrics=manifest.metrics,
        facts=manifest.facts,
        files=tuple(FileRow(f.path, f.kind, f.rank, f.size, f.digest, f.checkpoint, f.reused) for f in manifest.files),
        total_bytes=manifest.total_bytes,
        num_tensors=len(index),
        num_chunks=index.num_chunks,
        tensors=_tensor_rows(index) if with_tensors else None,
    )


def _states(catalog: Catalog, manifest: Manifest) -> tuple[str, ...]:
    checkpoint = manifest.id
    if checkpoint is None:
        return ()
    try:
        line = catalog.line()
    except (CorruptCheckpointError, FormatVersionError) as error:
        return (f"line unknown: {error.message}",)
    return tuple(place_in_line(checkpoint, line[0] if line else None, line, catalog.pins()))


def _tensor_rows(index: LayoutIndex) -> tuple[TensorRow, ...]:
    rows = []
    for name in index.names():
        meta, chunks = index.meta(name), index.chunks(name)
        files = tuple(index.files[file] for file in sorted({chunk.file for chunk in chunks if chunk.file >= 0}))
        rows.append(TensorRow(name, meta.dtype, tuple(meta.shape), len(chunks), files))
    return tuple(rows)


def _flatten(values: Mapping[str, Any], prefix: str = "", depth: int = 2) -> list[tuple[str, Any]]:
    """Two levels of names: deep enough for `scheduler.last_epoch`, shallow enough to read."""
    rows: list[tuple[str, Any]] = []
    for name, value in values.items():
        path = f"{prefix}{name}"
        if depth > 1 and isinstance(value, dict) and value and "$t" not in value:
            rows += _flatten(value, f"{path}.", depth - 1)
        else:
            rows.append((path, value))
    return rows


def summarise(value: Any) -> str:
    """One line for a tagged value: numbers and short text as they are, containers by their size."""
    if isinstance(value, dict):
        return _summarise_tagged(value) if "$t" in value else f"{{{len(value)} entries}}"
    if isinstance(value, list):
        text = str(value)
        plain = all(isinstance(item, (int, float, str)) for item in value)
        return text if plain and len(text) <= SUMMARY_CHARS_MAX else f"[{len(value)} items]"
    text = repr(value)
    return text if len(text) <= SUMMARY_CHARS_MAX else f"{text[: SUMMARY_CHARS_MAX - 3]}..."


def _summarise_tagged(value: dict[str, Any]) -> str:
    tag, content = value["$t"], value.get("v")
    if tag in ("int", "float", "dtype", "tensor"):
        return f"{tag} {content}" if tag == "tensor" else str(content)[:SUMMARY_CHARS_MAX]
    if tag in ("ndarray", "npscalar"):
        return f"{tag} {value.get('dtype')}{value.get('shape', '')}"
    if tag == "bytes" and isinstance(content, str):
        return f"bytes, {len(content) * 3 // 4 - content.count('=')} of them"
    if isinstance(content, list):
        inner = summarise(content) if tag in ("tuple", "size", "set", "frozenset") else f"{len(content)} entries"
        return f"{tag} {inner}"
    return str(tag)
