"""Puts the random streams back: bytes on the same mesh, a documented derivation on another one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dckpt.engine.saved_state import SavedState
from dckpt.planning.streams import TOLD, SavedStreams, plan_streams
from dckpt.state.rng import available_streams, ensure_restorable
from dckpt.state.train_state import TrainState


@dataclass(frozen=True, slots=True)
class RngPlan:
    """What `restore_rng` will set, already checked against this process's generators, and how each came about."""

    streams: dict[str, Any]
    told: dict[str, str]


def plan_rng_streams(state: TrainState, saved: SavedState, coordinates: dict[str, int]) -> RngPlan:
    """The streams of this process by the rule in FORMAT.md, section 10.3. Touches nothing."""
    streams = SavedStreams(
        axes=saved.manifest.rng,
        records=saved.rng,
        world_size=saved.world_size,
        generation=saved.generation,
        step=saved.step or 0,
        is_same_mesh=saved.is_same_mesh,
    )
    plan = plan_streams(streams, coordinates, available_streams(state.generators))
    ensure_restorable(plan.states, state.generators)
    return RngPlan(plan.states, {stream: TOLD[action] for stream, action in sorted(plan.actions.items())})
