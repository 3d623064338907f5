"""A run on one process with everything in it that a resume can get wrong, and how it is saved, spoiled and judged."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import dckpt
from dckpt.format.manifest import Manifest, encode_manifest, parse_manifest
from tests.support.untouched import digests_of

WIDTH, VOCABULARY, SAMPLES = 16, 12, 1000
FACTS = {
    "dataset": "files-a",
    "split": "split-a",
    "tokenizer": "words-a",
    "vocab_size": VOCABULARY,
    "seed": 7,
    "config": {"depth": 2, "log": {"every": 10}},
    "code": "commit-a",
}


class Net(nn.Module):
    """Tied, frozen, twin and normalised layers, dropout, buffers that are saved and a table that is computed."""

    def __init__(self, *, dropout: float = 0.1, vocabulary: int = VOCABULARY, width: int = WIDTH) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.up = nn.Linear(width, 2 * width)
        self.norm = nn.BatchNorm1d(2 * width)
        self.drop = nn.Dropout(dropout)
        self.down = nn.Linear(2 * width, width)
        self.twin_a = nn.Linear(width, width)
        self.twin_b = nn.Linear(width, width)
        self.frozen = nn.Linear(width, width)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("rest", torch.zeros(3))
        self.register_buffer("rotary", torch.linspace(0, 1, width), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) * self.rotary
        x = x + self.down(self.drop(torch.tanh(self.norm(self.up(x)))))
        x = x + self.twin_a(torch.tanh(self.twin_b(self.frozen(x))))
        return self.head(x)


def sequence(optimizer: torch.optim.Optimizer, warmup: int = 4, total: int = 100) -> lr_scheduler.LRScheduler:
    """Warm-up, then a cosine."""
    first = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=warmup)
    then = lr_scheduler.CosineAnnealingLR(optimizer, total)
    return lr_scheduler.SequentialLR(optimizer, [first, then], milestones=[warmup])


class Run:
    """`options` change one thing each; see the arguments."""

    def __init__(
        self,
        *,
        seed: int = 1,
        batch: dckpt.Batch | None = None,
        max_steps: int = 1000,
        model: Mapping[str, Any] | None = None,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        groups: Callable[[Net], list[dict[str, Any]]] | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        lr: float = 1e-2,
        schedule: Callable[..., Any] | None = sequence,
        scaler: Mapping[str, Any] | None = None,
        change: Callable[[Net], object] = lambda _: None,
        sampler: Mapping[str, Any] | None = None,
        facts: Mapping[str, Any] | None = None,
        has_ema: bool = True,
        generators: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
        parallel: Callable[[Net], nn.Module] | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
        self.model = Net(**(model or {}))
        change(self.model)
        self.wrapped = self.model if parallel is None else parallel(self.model)
        self.optimizer = optimizer((groups or split_groups)(self.model), lr=lr, betas=betas)
        self.scheduler = None if schedule is None else schedule(self.optimizer)
        self.scaler = torch.amp.GradScaler("cpu", **{"init_scale": 2.0**10, "growth_interval": 5, **(scaler or {})})
        self.ema: Any = self._average(is_module=parallel is None) if has_ema else None
        batch = batch or dckpt.Batch(micro=2, accumulation=2, data_parallel=ranks)
        self.sampler = dckpt.ElasticDistributedSampler(
            **{"dataset": SAMPLES, "seed": 3, "batch": batch, "rank": rank, **(sampler or {})}
        )
        self.progress = dckpt.TrainProgress(max_steps=max_steps, batch=batch)
        self.generators = dict(generators or {})
        self.facts = {**FACTS, **(facts or {})}
        self.extra = dict(extra or {})
        self.state = self.state_of()
        if ranks > 1:  # torch differs by rank, Python's and NumPy's streams are the same everywhere
            torch.manual_seed(1000 * seed + rank)

    def _average(self, *, is_module: bool) -> Any:
        if is_module:
            return AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    def state_of(self, **options: Any) -> dckpt.TrainState:
        """The run's state; `options` replace parts of it."""
        parts = {
            "model": self.wrapped,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
            "data": self.sampler,
            "progress": self.progress,
            "ema": self.ema,
            "generators": self.generators,
            "facts": self.facts,
            "extra": self.extra,
        }
        return dckpt.TrainState(**{**parts, **options})

    def train(self, steps: int) -> None:
        for _ in range(steps):
            for _ in range(self.progress.batch.accumulation):
                loss = self.backward()
                self.progress.accumulate()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
                self.scheduler.step(loss.detach())
            elif self.scheduler is not None:
                self.scheduler.step()
            if isinstance(self.ema, AveragedModel):
                self.ema.update_parameters(self.model)
            elif self.ema is not None:
                with torch.no_grad():
                    for name, parameter in self.model.named_parameters():
                        self.ema[name].lerp_(parameter, 0.1)
            self.model.seen += 1
            self.progress.advance(loss=loss.detach())

    def backward(self) -> torch.Tensor:
        """One micro-batch."""
        # Every token in every batch: no row without moments.
        tokens = torch.arange(VOCABULARY)[torch.randperm(VOCABULARY)]
        loss = (self.wrapped(tokens) - 1).square().mean()
        self.scaler.scale(loss).backward()
        return loss

    def moments(self, name: str) -> dict[str, torch.Tensor]:
        """The optimizer's state of one parameter."""
        return self.optimizer.state[dict(self.model.named_parameters())[name]]

    def all_moments(self, kind: str) -> list[torch.Tensor]:
        """That moment of all parameters."""
        return [held[kind] for held in self.optimizer.state.values()]


def split_groups(model: Net) -> list[dict[str, Any]]:
    """Weights decay, everything else does not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]


def open_run(root: Path) -> dckpt.Checkpointer:
    return dckpt.Checkpointer(root, deadline_s=30, signals=())


def save_run(root: Path, steps: int = 12, before: Callable[[Run], object] = lambda _: None, **options: Any) -> Run:
    """A run that trained and saved; `before`: what happens to it just before it is saved."""
    run = Run(**options)
    with open_run(root) as checkpointer:
        checkpointer.resume(run.state)
        run.train(steps)
        before(run)
        checkpointer.save(run.state, blocking=True)
    return run


def reseal(root: Path, change: Callable[[Manifest], Manifest]) -> None:
    """The newest checkpoint says something else, and is whole by its own digest."""
    path = max(root.glob("step-*")) / "manifest.json"
    path.write_bytes(encode_manifest(change(parse_manifest(path.read_bytes(), key="manifest.json"))))


def changed_facts(**sections: Any) -> Callable[[Manifest], Manifest]:
    """A change of a manifest: these sections are merged into its facts."""

    def change(manifest: Manifest) -> Manifest:
        facts = dict(manifest.facts)
        for name, section in sections.items():
            facts[name] = {**facts[name], **section} if isinstance(section, dict) else section
        return replace(manifest, facts=facts)

    return change


def judge(root: Path, spoil: Callable[[Run], object] | None = None, **options: Any) -> dckpt.ResumeReport:
    """The report on a run that is built with `options`, loaded, and spoiled; proves that the validation changed nothing."""
    run = Run(seed=2, **options)
    with open_run(root) as checkpointer:
        loaded = checkpointer.load(run.state)
        if spoil is not None:
            with torch.no_grad():
                spoil(run)
        return validate(checkpointer, run.state, loaded)


def validate(checkpointer: dckpt.Checkpointer, state: dckpt.TrainState, loaded: Any) -> dckpt.ResumeReport:
    """As `Checkpointer.validate`, and proves that it changed nothing."""
    before = digests_of(state)
    report = checkpointer.validate(state, loaded)
    after = digests_of(state)
    assert after == before, [name for name in before if before[name] != after[name]]
    return report


@dataclass(frozen=True)
class Case:
    """One thing that is wrong.

    expected: check -> severity, all of which must be found; "load" -> "refused" if it must not get that far. says: what the
    message of the first of them names. spoil: done to the loaded run. build: options of the run that resumes. saved: which
    of the saved runs. act: in place of all that, a whole story in a directory that ends with the report.
    """

    name: str
    expected: dict[str, str]
    says: str
    spoil: Callable[[Run], object] | None = None
    build: dict[str, Any] = field(default_factory=dict)
    saved: str = "plain"
    act: Callable[[Path], dckpt.ResumeReport] | None = None


@dataclass(frozen=True)
class Outcome:
    """found: check -> worst severity. said: check -> its messages."""

    found: dict[str, str]
    said: dict[str, str]

    def misses(self, case: Any) -> str:
        """Why the case counts as missed; empty if it was caught."""
        for check, severity in case.expected.items():
            if self.found.get(check) != severity:
                return f"expected {check}: {severity}, found {self.found}"
        said = self.said[next(iter(case.expected))]
        return "" if case.says.lower() in said.lower() else f"{case.says!r} is not named in: {said}"


def outcome(act: Callable[[], dckpt.ResumeReport]) -> Outcome:
    """What came of a resume; a refusal of the load is one too."""
    try:
        report = act()
    except dckpt.ResumeRejectedError as error:
        return _outcome([(f["check"], f["severity"], f["message"]) for f in error.report["findings"]])
    except (dckpt.IncompatibleStateError, dckpt.ConfigError) as error:
        return Outcome({"load": "refused"}, {"load": str(error)})
    return _outcome([(f.check, f.severity, f.message) for f in report.findings])


def _outcome(findings: list[tuple[str, str, str]]) -> Outcome:
    worst: dict[str, str] = {}
    said: dict[str, str] = {}
    for check, severity, message in findings:  # the worst come first in a report
        worst.setdefault(check, severity)
        said[check] = f"{said.get(check, '')}{message}\n"
    return Outcome(worst, said)
