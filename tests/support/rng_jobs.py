"""Jobs that draw from every kind of random stream over a history of resumes on changing numbers of ranks."""

from __future__ import annotations

import random
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dckpt

DRAWN = ("python", "torch", "generator:own", "generator:shared", "numpy")
SHARED = ("numpy", "generator:shared")
"""Streams that are equal on all ranks."""


class DrawingRun:
    """Python, torch and one generator differ by rank; NumPy and the other generator are the same everywhere."""

    def __init__(self, rank: int, seed: int = 1) -> None:
        random.seed(1000 * seed + rank)
        torch.manual_seed(1000 * seed + rank)
        np.random.seed(seed)
        self.own = torch.Generator().manual_seed(5000 * seed + rank)
        self.shared = np.random.default_rng(seed)
        model = nn.Linear(2, 2)
        with torch.no_grad():
            model.weight.fill_(1.0), model.bias.zero_()
        self.progress = dckpt.TrainProgress()
        self.state = dckpt.TrainState(
            model=model, progress=self.progress, generators={"own": self.own, "shared": self.shared}
        )

    def draw(self) -> dict[str, list[float]]:
        """Some numbers of each stream, and one step on."""
        self.progress.advance()
        return {
            "python": [random.random() for _ in range(4)],
            "torch": torch.rand(4, dtype=torch.float64).tolist(),
            "generator:own": torch.rand(4, generator=self.own, dtype=torch.float64).tolist(),
            "generator:shared": self.shared.random(4).tolist(),
            "numpy": np.random.rand(4).tolist(),
        }


def draw_save_draw(rank: int, world_size: int, root: str, seed: int, rng: Any = "derive") -> Any:
    """Resumes, draws, saves, and draws what the next resume goes on with; what is lost to it comes last."""
    run = DrawingRun(rank, seed)
    with dckpt.Checkpointer(root, deadline_s=30, signals=()) as checkpointer:
        try:
            report = checkpointer.resume(run.state, policy=dckpt.ResumePolicy(rng=rng))
        except dckpt.DckptError as error:
            return type(error).__name__, str(error)
        drawn = run.draw()
        pending = checkpointer.save(run.state, blocking=True)
        assert pending.outcome == "committed", pending.error
        told = None if report is None else report.to_json()["rng"]
        return drawn, run.draw(), told, pending.checkpoint, run.state.rng_remaps


def losses_in_slots(rank: int, world_size: int, uses_slots: bool, kind: Literal["ddp", "single"]) -> Any:
    """Losses by (step, micro-batch over all ranks); one micro-batch size, 8 micro-batches a step."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 1))
    model = DistributedDataParallel(net) if kind == "ddp" else net
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    micro, count = 2, 8
    accumulation = count // world_size
    progress = dckpt.TrainProgress(batch=dckpt.Batch(micro=micro, accumulation=accumulation, data_parallel=world_size))
    torch.manual_seed(50 + rank)
    data = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    losses: dict[tuple[int, int], float] = {}
    for step in range(3):
        for turn in range(accumulation):
            number = turn * world_size + rank
            begin = (step * count + number) * micro
            chosen = data[begin : begin + micro]
            if uses_slots:
                with dckpt.rng_slot(progress, seed=9):
                    loss = model(chosen).square().mean()
            else:
                loss = model(chosen).square().mean()
            (loss / accumulation).backward()
            progress.accumulate()
            losses[step, number] = loss.item()
        optimizer.step()
        optimizer.zero_grad()
        progress.advance()
    return losses
