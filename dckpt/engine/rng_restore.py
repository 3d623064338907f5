"""Puts the random streams back: bytes on the same mesh, a documented derivation on another one, or what the caller chose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dckpt.engine.saved_state import SavedState
from dckpt.errors import IncompatibleStateError
from dckpt.format.streams import EPOCH_PREFIX
from dckpt.planning.streams import TOLD, RngAction, SavedStreams, plan_streams, shared_streams
from dckpt.resume.report import LoadResult
from dckpt.state.rng import available_streams, ensure_restorable
from dckpt.state.train_state import TrainState

RngPolicy = Literal["derive", "refuse", "exact", "fresh"]
RNG_POLICIES: tuple[RngPolicy, ...] = ("derive", "refuse", "exact", "fresh")
REMAPS_FACT = "rng_remaps"
"""The fact of a manifest that lists how streams came about by resumes that changed them."""
LEFT_FRESH = "left as seeded, by choice"

_REFUSED: Mapping[RngPolicy, tuple[RngAction, ...]] = {
    "derive": (),
    "fresh": (),
    "refuse": ("rekey",),
    "exact": ("copy", "rekey", "fresh", "drop", "void"),
}


@dataclass(frozen=True, slots=True)
class RngPlan:
    """What will be set, already checked against this process's generators, and how each stream came about."""

    streams: dict[str, Any] = field(default_factory=dict)
    told: dict[str, str] = field(default_factory=dict)


def plan_rng_streams(
    state: TrainState, saved: SavedState, coordinates: dict[str, int], policy: RngPolicy = "derive"
) -> RngPlan:
    """The streams of this process by the rule in FORMAT.md, section 10.3. Touches nothing.

    Raises `IncompatibleStateError` naming the streams that the policy does not let go on as they would.
    """
    if policy == "fresh":
        return RngPlan({}, dict.fromkeys(sorted(saved.manifest.rng), LEFT_FRESH))
    streams = SavedStreams(
        axes=saved.manifest.rng,
        records=saved.rng,
        world_size=saved.world_size,
        generation=saved.generation,
        step=saved.step or 0,
        is_same_mesh=saved.is_same_mesh,
        known_shared=shared_streams(saved.world_size, saved.manifest.rng, saved.manifest.facts),
    )
    live = available_streams(state.generators)
    plan = plan_streams(streams, coordinates, [*live, *(f"{EPOCH_PREFIX}{stream}" for stream in live)])
    refused = [
        f"random stream {stream}: {TOLD[action]}"
        for stream, action in sorted(plan.actions.items())
        if action in _REFUSED[policy]
    ]
    if refused:
        raise IncompatibleStateError(
            f"The random streams cannot go on as rng={policy!r} asks: {'; '.join(refused)}. Nothing was loaded. Resume on the "
            'mesh that saved them with the same generators, or let them be derived: ResumePolicy(rng="derive").',
            differences=refused,
        )
    ensure_restorable(plan.states, state.generators)
    return RngPlan(plan.states, {stream: TOLD[action] for stream, action in sorted(plan.actions.items())})


def note_streams(state: TrainState, result: LoadResult, world_size: int) -> None:
    """Has the state remember, for its next manifests, what became of the streams in this load and those before."""
    if result.rng:
        manifest = result.manifest
        shared = shared_streams(manifest.world_size, manifest.rng, manifest.facts)
        state.note_rng(manifest.facts.get(REMAPS_FACT), _remap_of(result, world_size), shared)


def _remap_of(result: LoadResult, world_size: int) -> dict[str, Any] | None:
    """The record of a resume in which streams did not come back exactly; None if all did, or none was loaded."""
    changed: dict[str, list[str]] = {}
    for stream, told in result.rng.items():
        if told != TOLD["exact"]:
            changed.setdefault(told, []).append(stream)
    if not changed:
        return None
    return {
        "resumed_from": result.checkpoint,  # "checkpoint" is the key of a file that lies elsewhere
        "manifest_sha256": result.manifest_sha256,
        "saved_by": result.manifest.world_size,
        "continued_by": world_size,
        "streams": changed,
    }
