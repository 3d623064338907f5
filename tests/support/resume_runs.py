"""A small training run on one process, as the resume validator sees it: saved, built again, spoiled in one place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dckpt


class SmallRun:
    """Dropout, BatchNorm, tied weights, two groups, a schedule; `options` change one thing of it."""

    def __init__(
        self,
        *,
        max_steps: int = 50,
        batch: dckpt.Batch | None = None,
        total: int = 100,
        lr: float = 1e-2,
        weight_decay: float = 0.1,
        dropout: float = 0.1,
        seed: int = 0,
        facts: dict[str, Any] | None = None,
        build: Callable[[SmallRun], None] | None = None,
    ) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(dropout), nn.Linear(16, 16, bias=False), nn.Linear(16, 8)
        )
        self.groups = [
            {"params": [p for p in self.model.parameters() if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in self.model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ]
        if build is not None:
            build(self)
        self.optimizer = torch.optim.AdamW(self.groups, lr=lr, betas=(0.9, 0.95))
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, total)
        self.progress = dckpt.TrainProgress(max_steps=max_steps, batch=batch or dckpt.Batch(4))
        self.state = dckpt.TrainState(
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            progress=self.progress,
            facts=facts or {},
        )

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            loss = (self.model(torch.randn(4, 8)) - 1).square().mean()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.progress.advance(loss=loss.detach())
            losses.append(float(loss.detach()))
        return losses


def open_run(root: Path) -> dckpt.Checkpointer:
    return dckpt.Checkpointer(root, deadline_s=30, signals=())


def save_run(root: Path, steps: int = 12, **options: Any) -> SmallRun:
    """A run that trained and saved once."""
    run = SmallRun(**options)
    with open_run(root) as checkpointer:
        checkpointer.resume(run.state)
        run.train(steps)
        checkpointer.save(run.state, blocking=True)
    return run


def report_on(root: Path, spoil: Callable[[SmallRun], object] | None = None, **options: Any) -> dckpt.ResumeReport:
    """The report on a run that is built with `options`, loaded, and spoiled before it is validated."""
    run = SmallRun(**options)
    with open_run(root) as checkpointer:
        loaded = checkpointer.load(run.state)
        if spoil is not None:
            spoil(run)
        return checkpointer.validate(run.state, loaded)


def found(report: dckpt.ResumeReport) -> dict[str, str]:
    """Check -> severity, of what is worth a look."""
    return {finding.check: finding.severity for finding in (*report.warnings, *report.critical)}
