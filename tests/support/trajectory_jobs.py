"""Whole trainings that are killed, resumed and moved to other ranks; every loss and sample is written down as it happens."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Dataset

import dckpt
from tests.support.models import digests

WIDTH = 8
GLOBAL_BATCH = 12
SAVE_EVERY = 7  # micro-batches: boundaries of steps and places within them take turns


class Points(Dataset[tuple[int, torch.Tensor, torch.Tensor]]):
    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(11)
        self.x = torch.randn(size, WIDTH, generator=generator)
        self.y = torch.sin(3 * self.x).sum(1, keepdim=True)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        return index, self.x[index], self.y[index]


class Training:
    """FSDP2, AdamW, warm-up and decay, dropout, an elastic sampler; gradients are reduced at each micro-batch."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        *,
        size: int,
        micro: int,
        dropout: float,
        has_group: bool = True,
        uses_slots: bool = False,
    ) -> None:
        torch.manual_seed(0)
        self.uses_slots = uses_slots
        layers: list[nn.Module] = [nn.Linear(WIDTH, 32), nn.GELU(), nn.Dropout(dropout), nn.Linear(32, 33), nn.GELU()]
        model = nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(33, 1))
        if has_group:
            fully_shard(model[0])
            fully_shard(model)
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.01, foreach=False)
        warm = torch.optim.lr_scheduler.LinearLR(self.optimizer, 0.1, total_iters=10)
        cool = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=190)
        self.scheduler = torch.optim.lr_scheduler.SequentialLR(self.optimizer, [warm, cool], milestones=[10])
        accumulation = GLOBAL_BATCH // (micro * world_size)
        self.batch = dckpt.Batch(micro=micro, accumulation=accumulation, data_parallel=world_size)
        data = Points(size)
        self.sampler = dckpt.ElasticDistributedSampler(data, batch=self.batch, seed=5, rank=rank)
        self.loader = DataLoader(data, batch_sampler=self.sampler.batches(), generator=torch.Generator())
        self.progress = dckpt.TrainProgress(batch=self.batch)
        self.state = dckpt.TrainState(
            model=model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            data=self.sampler,
            progress=self.progress,
        )
        torch.manual_seed(1000 + rank)

    def run(self, until: int, after_micro: Any) -> None:
        """Trains up to an optimizer step; `after_micro(step, micro_step, ids, loss)` after each micro-batch."""
        while self.progress.step < until:
            for ids, x, y in self.loader:
                place = self.progress.step, self.progress.micro_step
                with dckpt.rng_slot(self.progress, seed=3) if self.uses_slots else contextlib.nullcontext():
                    each = (self.model(x) - y).square()
                (each.mean() / self.batch.accumulation).backward()
                if self.progress.accumulate():
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
                    self.progress.advance()
                after_micro(place, ids.tolist(), each.detach().double().sum().item())
                if self.progress.step >= until:
                    return


def train_straight(
    rank: int,
    world_size: int,
    until: int,
    size: int,
    micro: int,
    dropout: float,
    has_group: bool,
    uses_slots: bool = False,
) -> Any:
    """The training that nothing interrupts: what was seen, and the end."""
    training = Training(
        rank, world_size, size=size, micro=micro, dropout=dropout, has_group=has_group, uses_slots=uses_slots
    )
    seen: list[Any] = []
    training.run(until, lambda *row: seen.append(row))
    return seen, digests(training.state)


def train_until_killed(
    rank: int, world_size: int, root: str, log: str, until: int, size: int, micro: int, dropout: float, kill: Any
) -> Any:
    """Resumes, trains and saves every few micro-batches. `kill`: None, or (micro-batches of this start, seed
    of the moment, whether all saves lie within steps)."""
    with open(f"{log}-{rank}.jsonl", "a", buffering=1) as file:
        try:
            return _train(rank, world_size, root, file, until, size, micro, dropout, kill)
        except BaseException:
            if kill is None:
                raise
            # The other rank was killed a moment earlier; this one's turn was coming.
            os.kill(os.getpid(), signal.SIGKILL)


def _train(
    rank: int, world_size: int, root: str, file: Any, until: int, size: int, micro: int, dropout: float, kill: Any
) -> Any:
    training = Training(rank, world_size, size=size, micro=micro, dropout=dropout)
    count = 0
    retention = dckpt.Retention(last=3)
    with dckpt.Checkpointer(root, deadline_s=30, signals=(), retention=retention) as checkpointer:
        checkpointer.resume(training.state)
        begun = training.progress.step, training.progress.micro_step
        print(json.dumps({"begun": begun}), file=file)

        def after_micro(place: Any, ids: Any, loss: float) -> None:
            nonlocal count
            count += 1
            print(json.dumps([place, ids, loss]), file=file)
            if count % SAVE_EVERY == 0 and not (kill is not None and kill[2] and not training.progress.micro_step):
                checkpointer.save(training.state)
            if kill is not None and count == kill[0]:
                delay_s = random.Random(f"{kill[1]}-{rank}").uniform(0, 0.03)
                threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGKILL)).start()

        training.run(until, after_micro)
        if kill is not None:
            threading.Event().wait()  # the timer is on its way
        return digests(training.state)


def train_leg(
    rank: int,
    world_size: int,
    root: str,
    until: int,
    size: int,
    micro: int,
    place: tuple[int, int] | None,
    dropout: float,
) -> Any:
    """Resumes, trains up to a step, saves there or at a `place` within a step before it, and ends. Dropout is in slots."""
    training = Training(rank, world_size, size=size, micro=micro, dropout=dropout, uses_slots=True)
    seen: list[Any] = []
    with dckpt.Checkpointer(root, deadline_s=30, signals=()) as checkpointer:
        report = checkpointer.resume(training.state)
        told = [] if report is None else [str(f) for f in report.findings if f.severity in ("critical", "warning")]
        begun = training.progress.step, training.progress.micro_step
        with contextlib.suppress(StopIteration):
            training.run(until, lambda *row: _note(training, seen, row, place))
        pending = checkpointer.save(training.state, blocking=True)
        assert pending.outcome == "committed", pending.error
        return begun, seen, told


def _note(training: Training, seen: list[Any], row: Any, place: tuple[int, int] | None) -> None:
    seen.append(row)
    if (training.progress.step, training.progress.micro_step) == place:
        raise StopIteration
