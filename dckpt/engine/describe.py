"""What the manifest will say of a save, fixed at the moment of its plan; only the files are added later."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dckpt.engine.job import SaveRequest
from dckpt.engine.local_state import LocalState
from dckpt.engine.rng_restore import REMAPS_FACT
from dckpt.format.manifest import FileEntry, Manifest, Mesh
from dckpt.planning.layout import Layout
from dckpt.planning.streams import SHARED_FACT, classify_streams
from dckpt.planning.ticket import Ticket
from dckpt.resume.facts.environment import writer_versions
from dckpt.state.train_state import TrainState


def describe_checkpoint(
    request: SaveRequest,
    local: LocalState,
    layout: Layout,
    tickets: Sequence[Ticket],
    state: TrainState,
    *,
    facts: Mapping[str, Any],
    run_id: str,
    generation: int,
    attempt: str,
) -> Callable[[tuple[FileEntry, ...]], Manifest]:
    """The manifest as a function of its files. Holds values, never live tensors: the state changes while files are written."""
    mesh = state.mesh_axes()
    kept_by_rank = layout.rank_values
    values = {name: value for name, value in local.captured.values.items() if name not in kept_by_rank}
    parts, aliases = local.captured.parts, dict(local.captured.aliases)
    rng = classify_streams([ticket.rng for ticket in tickets], [ticket.coordinates for ticket in tickets])
    coordinates = tuple(tuple(ticket.coordinates.values()) for ticket in tickets) if mesh else None
    created, facts, metrics = time.time(), dict(facts), dict(request.metrics)
    if state.rng_remaps:
        facts[REMAPS_FACT] = state.rng_remaps
    if state.rng_shared and len(tickets) == 1:
        facts[SHARED_FACT] = list(state.rng_shared)
    rank_tensors, rank_values = tuple(sorted(layout.rank_tensors)), tuple(sorted(layout.rank_values))

    def build(files: tuple[FileEntry, ...]) -> Manifest:
        return Manifest(
            run_id=run_id,
            step=request.step,
            micro_step=request.micro_step,
            generation=generation,
            attempt=attempt,
            created_unix_s=created,
            world_size=len(tickets),
            mesh=Mesh(axes=tuple(mesh), shape=tuple(mesh.values())) if mesh else None,
            coordinates=coordinates,
            parts=parts,
            values=values,
            planner_data=None,
            rank_tensors=rank_tensors,
            rank_values=rank_values,
            aliases=aliases,
            rng=rng,
            facts=facts,
            metrics=metrics,
            writer=writer_versions(),
            files=files,
        )

    return build
