"""Puts the random streams back: bytes on the same mesh, a documented derivation on another one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dckpt.engine.saved_state import SavedState
from dckpt.state.rng import RngAction, available_streams, ensure_restorable, plan_rng, rekey_stream, run_seed_of
from dckpt.state.train_state import TrainState

TOLD: dict[RngAction, str] = {
    "exact": "exact",
    "copy": "copied",
    "rekey": "re-derived",
    "fresh": "not saved, left as seeded",
    "drop": "saved, not present in this process",
}


@dataclass(frozen=True, slots=True)
class RngPlan:
    """What `restore_rng` will set, already checked against this process's generators, and how each came about."""

    streams: dict[str, Any]
    told: dict[str, str]


def plan_rng_streams(state: TrainState, saved: SavedState, coordinates: dict[str, int]) -> RngPlan:
    """The streams of this process by the rule in FORMAT.md, section 10.3. Touches nothing.

    A run that was saved by one rank cannot tell streams that ranks share from streams that they do not: on more ranks
    all of them are re-derived, because equal dropout masks on all ranks would be the worse mistake.
    """
    available = available_streams(state.generators)
    axes = {stream: tuple(varies) for stream, varies in saved.manifest.rng.items()}
    if saved.world_size == 1 and not saved.is_same_mesh:
        axes = {stream: tuple(coordinates) for stream in axes}
    plan = plan_rng(axes, same_mesh=saved.is_same_mesh, available=available)
    streams: dict[str, Any] = {}
    for stream, action in plan.items():
        if action in ("exact", "copy"):
            if stream in saved.rng:
                streams[stream] = saved.rng[stream]
            else:
                plan[stream] = "fresh"
        elif action == "rekey":
            streams[stream] = _rekey(stream, saved, _place(axes[stream], coordinates))
    ensure_restorable(streams, state.generators)
    return RngPlan(streams, {stream: TOLD[action] for stream, action in sorted(plan.items())})


def _place(axes: tuple[str, ...], coordinates: dict[str, int]) -> dict[str, int]:
    """This rank's coordinates along the axes of the stream; all of them where the new mesh has other axes."""
    if all(axis in coordinates for axis in axes):
        return {axis: coordinates[axis] for axis in axes}
    return coordinates


def _rekey(stream: str, saved: SavedState, place: dict[str, int]) -> Any:
    return rekey_stream(
        stream,
        run_seed=run_seed_of(saved.rng),
        generation=saved.generation,
        step=saved.step or 0,
        coordinates=place,
        like=saved.rng.get(stream),
    )
