"""Jobs that ranks run in tests; each builds its own state and returns what the test compares."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch

import dckpt
from dckpt import failpoint
from tests.support.models import Kind, Run, digests


def train_and_save(rank: int, world_size: int, root: str, kind: Kind, steps: int, seed: int = 1) -> dict[str, str]:
    """Trains, saves blocking, returns the digests of what was saved."""
    run = Run(kind, rank, world_size, seed=seed)
    if not steps:
        _forbid_steps(run)
    with dckpt.Checkpointer(root, deadline_s=30, signals=()) as checkpointer:
        assert checkpointer.resume(run.state) is None
        run.train(steps)
        pending = checkpointer.save(run.state, blocking=True)
        assert pending.outcome == "committed", pending.error
        return digests(run.state)


def _forbid_steps(run: Run) -> None:
    """From here on a step of the optimizer fails the job: neither a save nor a load may take one."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the optimizer took a step")

    run.optimizer.register_step_pre_hook(refuse)
    run.optimizer.register_step_post_hook(refuse)


def resume_and_digest(
    rank: int, world_size: int, root: str, kind: Kind, seed: int = 2, without_steps: bool = False
) -> tuple[dict[str, str], Any]:
    """Resumes into a state built from another seed; returns digests and the report."""
    run = Run(kind, rank, world_size, seed=seed)
    if without_steps:
        _forbid_steps(run)
    with dckpt.Checkpointer(root, deadline_s=30, signals=()) as checkpointer:
        report = checkpointer.resume(run.state)
        assert report is not None
        return digests(run.state), report.to_json()


def train_straight(rank: int, world_size: int, kind: Kind, steps: int) -> tuple[list[float], dict[str, str]]:
    """The run that nothing interrupts."""
    run = Run(kind, rank, world_size)
    losses = run.train(steps)
    return losses, _own(run)


def train_save_die(rank: int, world_size: int, root: str, kind: Kind, steps: int, lost: int) -> None:
    """Trains, saves in the background, trains on, and is killed: the steps after the save are lost."""
    run = Run(kind, rank, world_size)
    checkpointer = dckpt.Checkpointer(root, deadline_s=30, signals=())
    checkpointer.resume(run.state)
    run.train(steps)
    pending = checkpointer.save(run.state)
    run.train(lost)
    assert pending.wait(30) == "committed"
    os.kill(os.getpid(), signal.SIGKILL)


def resume_and_train(
    rank: int, world_size: int, root: str, kind: Kind, steps: int
) -> tuple[list[float], dict[str, str]]:
    """Resumes and trains on."""
    run = Run(kind, rank, world_size, seed=5)
    with dckpt.Checkpointer(root, deadline_s=30, signals=()) as checkpointer:
        report = checkpointer.resume(run.state)
        assert report is not None
        assert not report.warnings and not report.critical, report.text()
        losses = run.train(steps)
        return losses, _own(run)


def _own(run: Run) -> dict[str, str]:
    """Digests with this rank's own buffers and streams."""
    return digests(run.state)


def arm(name: str, action: str, rank: int, at_rank: int) -> None:
    """Arms one failpoint on one rank: "kill", "eio" or "enospc"."""

    def act() -> None:
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        code = {"eio": 5, "enospc": 28}[action]
        raise OSError(code, os.strerror(code))

    if rank == at_rank:
        failpoint.arm({name: act})


def torch_bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
