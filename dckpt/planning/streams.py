"""What becomes of each random stream when a checkpoint is continued: the rule of FORMAT.md, section 10.3. Pure functions."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dckpt.errors import ConfigError
from dckpt.format.sealed_json import JsonValue
from dckpt.format.streams import EPOCH_PREFIX, rekey_stream, run_seed_of

RngAction = Literal["exact", "copy", "rekey", "fresh", "drop", "void"]

TOLD: dict[RngAction, str] = {
    "exact": "exact",
    "copy": "copied",
    "rekey": "re-derived",
    "fresh": "not saved, left as seeded",
    "drop": "saved, not present in this process",
    "void": "of ranks that are others now, left out",
}
"""What a person is told of each."""

RANK_AXIS = "rank"
"""The one axis when there is no mesh."""

SHARED_FACT = "rng_shared"
"""The fact of a manifest that one rank wrote: the streams that were equal on all ranks when more of them saved last."""


def shared_streams(
    world_size: int, axes: Mapping[str, Sequence[str]], facts: Mapping[str, JsonValue]
) -> tuple[str, ...]:
    """The streams that all ranks share, by a manifest's `rng` or, where one rank wrote it, by what it carries along."""
    if world_size > 1:
        return tuple(sorted(stream for stream, varying in axes.items() if not varying))
    known = facts.get(SHARED_FACT)
    return tuple(item for item in known if isinstance(item, str)) if isinstance(known, list) else ()


def classify_streams(
    digests_per_rank: Sequence[Mapping[str, str]], coordinates: Sequence[Mapping[str, int]] | None = None
) -> dict[str, tuple[str, ...]]:
    """Stream -> the mesh axes along which it varies; () is equal everywhere. Without a mesh the one axis is `rank`.

    A stream varies along an axis when two ranks that differ in this axis alone have different states; a rank without
    the stream differs from one that has it.
    """
    if coordinates and len(coordinates) != len(digests_per_rank):
        raise ConfigError(
            f"classify_streams: {len(digests_per_rank)} ranks gave digests, {len(coordinates)} gave coordinates. "
            "Every rank must be in the mesh"
        )
    places = coordinates or [{RANK_AXIS: rank} for rank in range(len(digests_per_rank))]
    axes = list(places[0]) if places else []
    streams = dict.fromkeys(stream for digests in digests_per_rank for stream in digests)
    return {stream: _varying_axes(stream, digests_per_rank, places, axes) for stream in streams}


def _varying_axes(
    stream: str,
    digests_per_rank: Sequence[Mapping[str, str]],
    places: Sequence[Mapping[str, int]],
    axes: Sequence[str],
) -> tuple[str, ...]:
    varying: list[str] = []
    for axis in axes:
        lines: dict[tuple[int, ...], set[str]] = {}
        for digests, place in zip(digests_per_rank, places, strict=True):
            line = tuple(place[other] for other in axes if other != axis)
            lines.setdefault(line, set()).add(digests.get(stream, ""))
        if any(len(found) > 1 for found in lines.values()):
            varying.append(axis)
    return tuple(varying)


def plan_rng(
    saved: Mapping[str, Sequence[str]], *, same_mesh: bool, available: Collection[str]
) -> dict[str, RngAction]:
    """Stream -> what a resuming rank does with it.

    exact: its own bytes. copy: any rank's bytes, they are equal. rekey: `rekey_stream` on every rank. drop: this process
    has no such device or generator. fresh: live and never saved, left as the program seeded it. void: where a rank's own
    iterators of an epoch began, on a mesh with other ranks; a derived state would give them an order that nobody began.
    """
    plan: dict[str, RngAction] = {}
    for stream, axes in saved.items():
        if stream not in available:
            plan[stream] = "drop"
        elif same_mesh:
            plan[stream] = "exact"
        elif axes and stream.startswith(EPOCH_PREFIX):
            plan[stream] = "void"
        else:
            plan[stream] = "rekey" if axes else "copy"
    for stream in available:
        # `cuda:<i>` is saved only where it says something that `cuda` does not, an epoch's start only within the epoch.
        if stream not in saved and not stream.startswith(("cuda:", EPOCH_PREFIX)):
            plan[stream] = "fresh"
    return plan


@dataclass(frozen=True, slots=True)
class SavedStreams:
    """What a checkpoint says of its streams to one rank that continues it.

    axes: stream -> mesh axes over which it varied. records: the states of the saving rank that stood at this rank's place;
    on another mesh those of rank 0. known_shared: streams that were equal on all ranks when more than one rank saved last, of a
    run that one rank saved. The rest is the manifest's.
    """

    axes: Mapping[str, tuple[str, ...]]
    records: Mapping[str, JsonValue]
    world_size: int
    generation: int
    step: int
    is_same_mesh: bool
    known_shared: Collection[str] = ()


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """States to set, and how each stream came about."""

    states: dict[str, JsonValue]
    actions: dict[str, RngAction]


def plan_streams(
    saved: SavedStreams, coordinates: Mapping[str, int], available: Collection[str] | None = None
) -> StreamPlan:
    """The streams of the rank at `coordinates` of its mesh. `available`: those that it can set, None for all.

    A run that was saved by one rank cannot tell streams that ranks share from streams that they do not, unless more ranks saved
    it before: on more ranks all others are re-derived, because equal dropout masks on all ranks would be the worse mistake.
    """
    axes = dict(saved.axes)
    if saved.world_size == 1 and not saved.is_same_mesh:
        axes = {stream: () if stream in saved.known_shared else tuple(coordinates) for stream in axes}
    wanted = tuple(axes) if available is None else available
    actions = plan_rng(axes, same_mesh=saved.is_same_mesh, available=wanted)
    states: dict[str, JsonValue] = {}
    for stream, action in actions.items():
        if action in ("exact", "copy"):
            if stream in saved.records:
                states[stream] = saved.records[stream]
            else:
                actions[stream] = "fresh"
        elif action == "rekey":
            states[stream] = rekey_stream(
                stream,
                run_seed=run_seed_of(saved.records),
                generation=saved.generation,
                step=saved.step,
                coordinates=_place(axes[stream], coordinates),
                like=saved.records.get(stream),
            )
    return StreamPlan(states, actions)


def _place(axes: tuple[str, ...], coordinates: Mapping[str, int]) -> Mapping[str, int]:
    """The rank's coordinates along the axes of the stream; all of them where the new mesh has other axes."""
    if all(axis in coordinates for axis in axes):
        return {axis: coordinates[axis] for axis in axes}
    return coordinates
