"""`dckpt ls` and `dckpt show`: what a run and a checkpoint hold, as records. Reads no tensor data."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from dckpt.catalog.catalog import Catalog
from dckpt.catalog.generations import list_generations, read_generation
from dckpt.catalog.line import trace_line
from dckpt.catalog.prune import find_leftovers
from dckpt.errors import CorruptCheckpointError, FormatVersionError, StorageError
from dckpt.format.generation import Generation
from dckpt.format.layout import CheckpointId
from dckpt.storage.base import Storage
from dckpt.tools.manifest_head import ManifestHead, ReadError, copies_of, read_heads
from dckpt.tools.sharing import shared_bytes, total_bytes

_ReadError = (CorruptCheckpointError, FormatVersionError, StorageError)


@dataclass(frozen=True, slots=True)
class CheckpointRow:
    """One checkpoint in a listing. What its manifest says is None when that cannot be read: see `damage`."""

    name: str
    step: int
    micro_step: int
    generation: int
    created_unix_s: float | None
    size_bytes: int | None
    shared_bytes: int
    """Bytes of its size that an earlier checkpoint of the run has too: unchanged files that are stored once."""
    world_size: int | None
    states: tuple[str, ...]
    """Of: latest, on the line, superseded, end of leg N, pinned, damaged manifest."""
    metrics: Mapping[str, float]
    damage: str | None


@dataclass(frozen=True, slots=True)
class GenerationRow:
    """One generation record; `damage` says why the rest is empty."""

    number: int
    reason: str | None
    parent: str | None
    world_size: int | None
    created_unix_s: float | None
    damage: str | None = None


@dataclass(frozen=True, slots=True)
class LeftoverRow:
    """Something that never committed, or is half deleted."""

    name: str
    kind: str
    size_bytes: int
    age_s: float


@dataclass(frozen=True, slots=True)
class RunListing:
    """A run at a glance, newest checkpoint first."""

    url: str
    checkpoints: tuple[CheckpointRow, ...]
    line_generations: tuple[GenerationRow, ...]
    """The generations on the way from the newest back to the start of the line."""
    leftovers: tuple[LeftoverRow, ...]
    total_bytes: int
    """Of all checkpoints together, what they share counted once."""
    notes: tuple[str, ...]
    """Where the line could not be followed. If it has no beginning, no checkpoint has a place in it."""


def list_run(storage: Storage, *, now_unix_s: float) -> RunListing:
    """Every checkpoint of the run with its place in the history, from the manifests' verified heads alone."""
    catalog = Catalog(storage)
    recorded = list_generations(storage)
    checkpoints = catalog.checkpoints()
    pins = catalog.pins()
    newest = max([*recorded, *(item.generation for item in checkpoints)], default=0)
    records: dict[int, Generation] = {}
    notes: tuple[str, ...] = ()
    latest: CheckpointId | None = None
    on_line: Collection[CheckpointId] | None = None
    leg_ends: dict[CheckpointId, int] = {}
    try:
        line = trace_line(checkpoints, newest, lambda number: _remember(records, read_generation(storage, number)))
        notes, on_line = line.notes, frozenset(line.on_line)
        latest = line.on_line[0] if line.on_line else None
        leg_ends = {end: number for number, end in enumerate(reversed(line.leg_ends), start=1)}
    except _ReadError as error:
        notes = (str(error),)
    heads = read_heads(storage, checkpoints)
    copies = copies_of(heads)
    shared = shared_bytes(copies)
    rows = tuple(
        _row(checkpoint, heads[checkpoint.name], shared, place_in_line(checkpoint, latest, on_line, pins, leg_ends))
        for checkpoint in reversed(checkpoints)
    )
    return RunListing(
        url=storage.url,
        checkpoints=rows,
        line_generations=tuple(_generation_row(record) for record in records.values()),
        leftovers=list_leftovers(storage, older_than_s=0, now_unix_s=now_unix_s),
        total_bytes=total_bytes(copies),
        notes=notes,
    )


def _remember(records: dict[int, Generation], record: Generation) -> Generation:
    """The line is followed once; what was read on the way is what the listing says about it."""
    records[record.number] = record
    return record


def list_leftovers(storage: Storage, *, older_than_s: float, now_unix_s: float) -> tuple[LeftoverRow, ...]:
    """What never committed in this run and is at least so old."""
    found = find_leftovers(storage, older_than_s=older_than_s, now_unix_s=now_unix_s)
    return tuple(LeftoverRow(item.name, item.kind, item.bytes, item.age_s) for item in found)


def place_in_line(
    checkpoint: CheckpointId,
    latest: CheckpointId | None,
    line: Collection[CheckpointId] | None,
    pins: Collection[str],
    leg_ends: Mapping[CheckpointId, int] | None = None,
) -> list[str]:
    """A checkpoint's states, its manifest not looked at; `line` is None when it cannot be followed.

    leg_ends: checkpoint -> number of the leg that it ended.
    """
    states = []
    if line is not None:
        on_line = "latest" if checkpoint == latest else "on the line"
        states.append(on_line if checkpoint in line else "superseded")
    if leg_ends and checkpoint in leg_ends:
        states.append(f"end of leg {leg_ends[checkpoint]}")
    if checkpoint.name in pins:
        states.append("pinned")
    return states


def _row(
    checkpoint: CheckpointId, found: ManifestHead | ReadError, shared: Mapping[str, int], states: list[str]
) -> CheckpointRow:
    head = found if isinstance(found, ManifestHead) else None
    damage = None if head is not None else str(found)
    if damage is not None:
        states.append("damaged manifest")
    return CheckpointRow(
        name=checkpoint.name,
        step=checkpoint.step,
        micro_step=checkpoint.micro_step,
        generation=checkpoint.generation,
        created_unix_s=None if head is None else head.created_unix_s,
        size_bytes=None if head is None else head.size_bytes,
        shared_bytes=shared.get(checkpoint.name, 0),
        world_size=None if head is None else head.world_size,
        states=tuple(states),
        metrics={} if head is None else head.metrics,
        damage=damage,
    )


def _generation_row(record: Generation) -> GenerationRow:
    parent = None if record.parent is None else record.parent.checkpoint
    return GenerationRow(record.number, record.reason, parent, record.world_size, record.created_unix_s)


def lineage_of(storage: Storage, generation: int) -> tuple[GenerationRow, ...]:
    """The generations that one of `generation` descends from, its own first; ends at a damaged record."""
    rows: list[GenerationRow] = []
    number: int | None = generation if generation > 0 else None
    while number is not None:
        try:
            record = read_generation(storage, number)
        except _ReadError as error:
            rows.append(GenerationRow(number, None, None, None, None, damage=str(error)))
            break
        rows.append(_generation_row(record))
        # `parse_generation` refuses a parent that is not older, so this ends.
        number = None if record.parent is None else record.parent.generation
    return tuple(rows)
