"""Jobs of a fine-tuning run: a large frozen base, a small adapter that is trained."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import dckpt
from dckpt import failpoint
from dckpt.storage.local import LocalStorage
from dckpt.storage.posix import Posix
from tests.support.damage_jobs import reads_through
from tests.support.models import digests

WIDTH = 256
WIDE = 4096
"""So wide that headers, index and manifest are small beside what is trained."""


class Adapted(nn.Module):
    """A linear layer of which only a correction of low rank is trained."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, width, bias=False)
        self.base.requires_grad_(False)
        rank = max(1, width // 200)  # about 1% of the parameters
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.base(x) + self.up(self.down(x))


class FineTuning:
    """Two such layers under FSDP2 (alone: plain), AdamW over what is trained."""

    def __init__(self, world_size: int, *, seed: int = 1, width: int = WIDTH) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(Adapted(width), Adapted(width))
        if world_size > 1:
            for layer in self.model:
                fully_shard(layer)
            fully_shard(self.model)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=0.01, foreach=False)
        self.progress = dckpt.TrainProgress(
            max_steps=1000, batch=dckpt.Batch(micro=24 // world_size, data_parallel=world_size)
        )
        self.state = dckpt.TrainState(model=self.model, optimizer=self.optimizer, progress=self.progress)
        self.width = width

    def train(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.model(torch.ones(1, self.width)).square().mean().backward()
            self.optimizer.step()
            self.progress.advance(loss=1.0)

    def change_base(self) -> None:
        """What nobody should do to a frozen weight, and somebody does."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                if not parameter.requires_grad:
                    parameter.mul_(0.5)

    @property
    def changing_bytes(self) -> int:
        """Bytes of this rank's part of what a step changes: trained parameters and their moments."""
        return 3 * sum(_local(parameter).nbytes for parameter in self.trained)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@dataclass
class CountingPosix(Posix):
    """Counts the bytes that are written; refuses links with `refuses`, if that is not 0."""

    refuses: int = 0
    written: int = 0
    links: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        count = super().pwrite(fd, data, offset)
        with self._lock:
            self.written += count
        return count

    def link(self, source: str, target: str) -> None:
        if self.refuses and ".new-" not in source:  # Small files are created by a link of their own.
            raise OSError(self.refuses, os.strerror(self.refuses))
        super().link(source, target)
        self.links += ".new-" not in source


@dataclass
class Saved:
    """What one save did on one rank."""

    name: str
    written: int
    links: int
    digests: dict[str, str]


class Tuning:
    """A run with its checkpointer and its counted system calls."""

    def __init__(self, world_size: int, root: str, *, refuses: int = 0, width: int = WIDTH, **options: Any) -> None:
        self.posix = CountingPosix(refuses)
        self.run = FineTuning(world_size, seed=3, width=width)
        with reads_through(self.posix):
            self.checkpointer = dckpt.Checkpointer(root, deadline_s=30, signals=(), **options)
        self.checkpointer.resume(self.run.state)

    def save(self, *, train: int = 1, blocking: bool = True) -> Saved:
        """Trains on and saves; everything of it is over when this returns, retention too."""
        self.run.train(train)
        self.posix.written = self.posix.links = 0
        pending = self.checkpointer.save(self.run.state, blocking=blocking)
        assert pending.wait() == "committed", pending.error
        assert pending.checkpoint is not None
        return Saved(pending.checkpoint, self.posix.written, self.posix.links, digests(self.run.state))


@contextlib.contextmanager
def tuning(world_size: int, root: str, **options: Any) -> Iterator[Tuning]:
    made = Tuning(world_size, root, **options)
    with made.checkpointer:
        yield made


def save_times(rank: int, world_size: int, root: str, count: int, options: dict[str, Any]) -> tuple[list[Saved], int]:
    """Resumes or starts, and saves `count` times, staged and blocking by turns; and the bytes that each step changes."""
    with tuning(world_size, root, **options) as made:
        saved = [made.save(blocking=bool(number % 2)) for number in range(count)]
        return saved, made.run.changing_bytes


def change_between(rank: int, world_size: int, root: str, refuses: int) -> list[Saved]:
    """The frozen weights change between the second and the third of four saves."""
    with tuning(world_size, root, refuses=refuses) as made:
        saved = [made.save(), made.save()]
        made.run.change_base()
        return [*saved, made.save(), made.save()]


def prune_between(rank: int, world_size: int, root: str, refuses: int, point: str) -> list[Saved]:
    """The parent goes away at `point` of the second of three saves: it is deleted without asking anybody."""
    with tuning(world_size, root, refuses=refuses) as made:
        saved = [made.save()]
        failpoint.arm({point: lambda: LocalStorage(root).discard(saved[0].name)} if rank == 0 else {})
        try:
            saved.append(made.save())
        finally:
            failpoint.disarm()
        return [*saved, made.save()]


def fail_between(rank: int, world_size: int, root: str, refuses: int) -> tuple[list[Saved], str, list[Saved]]:
    """Two saves, one that fails before its commit, and two more."""
    with tuning(world_size, root, refuses=refuses) as made:
        before = [made.save(), made.save()]
        failpoint.arm({"before_listing": _fail} if rank == 0 else {})
        try:
            made.run.train(1)
            pending = made.checkpointer.save(made.run.state, blocking=True)
        finally:
            failpoint.disarm()
        assert pending.outcome == "failed"
        return before, str(pending.error), [made.save(), made.save()]


def _fail() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def digests_of(rank: int, world_size: int, root: str, which: int | str, width: int = WIDTH) -> dict[str, str]:
    """The digests of one checkpoint, loaded into another state."""
    run = FineTuning(world_size, seed=9, width=width)
    with dckpt.Checkpointer(root, deadline_s=30, signals=()) as checkpointer:
        checkpointer.load(run.state, which)
        return digests(run.state)
