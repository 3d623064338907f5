"""Jobs of ranks that save to an object store and are killed there."""

from __future__ import annotations

import dckpt
from dckpt.errors import DckptError
from tests.support.jobs import arm
from tests.support.models import Kind, Run


def save_and_lose_rank_zero(rank: int, world_size: int, root: str, kind: Kind, point: str) -> str:
    """Commits step 1; while step 2 is saved, rank 0 is killed at `point`. What the others are told."""
    run = Run(kind, rank, world_size)
    with dckpt.Checkpointer(root, deadline_s=6, signals=()) as checkpointer:
        checkpointer.resume(run.state)
        run.train(1)
        assert checkpointer.save(run.state, blocking=True).outcome == "committed"
        run.train(1)
        arm(point, "kill", rank, 0)
        try:
            pending = checkpointer.save(run.state, blocking=True)
        except DckptError as error:
            return type(error).__name__
        return type(pending.error).__name__
