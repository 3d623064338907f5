"""Jobs around repaired checkpoints: save, and what a resume from the repaired one brings back."""

from __future__ import annotations

import dckpt
from tests.support.models import WIDTH, Kind, Run, digests


def train_and_save_twice(
    rank: int, world_size: int, root: str, kind: Kind, steps: int, width: int = WIDTH
) -> dict[str, str]:
    """Saves after `steps` steps and after twice as many; returns the digests of the later state."""
    run = Run(kind, rank, world_size, width=width)
    with dckpt.Checkpointer(root, deadline_s=30, signals=()) as checkpointer:
        assert checkpointer.resume(run.state) is None
        for _ in range(2):
            run.train(steps)
            pending = checkpointer.save(run.state, blocking=True)
            assert pending.outcome == "committed", pending.error
        return digests(run.state)


def resume_train_save(
    rank: int, world_size: int, root: str, kind: Kind, steps: int, width: int = WIDTH
) -> tuple[dict[str, str], list[float], list[str]]:
    """Digests of what was resumed, the losses of the steps after it, and what the report found."""
    run = Run(kind, rank, world_size, seed=5, width=width)
    with dckpt.Checkpointer(root, deadline_s=30, signals=()) as checkpointer:
        report = checkpointer.resume(run.state)
        assert report is not None
        found = digests(run.state)
        losses = run.train(steps)
        pending = checkpointer.save(run.state, blocking=True)
        assert pending.outcome == "committed", pending.error
        return found, losses, [f"{item.severity}: {item.message}" for item in report.findings]
