"""Which checkpoints stay: a pure function from records to a plan. Deleting is `dckpt.catalog.prune`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dckpt.errors import ConfigError
from dckpt.format.layout import CheckpointId


@dataclass(frozen=True, slots=True)
class Best:
    """Keep the `keep` checkpoints with the lowest (`"min"`) or highest (`"max"`) value of `metric`."""

    metric: str
    """A name in the `metrics` given to `save`. A checkpoint without a finite value does not take part."""
    mode: Literal["min", "max"] = "min"
    keep: int = 1

    def __post_init__(self) -> None:
        if not self.metric:
            raise ConfigError(f"Best(metric={self.metric!r}): expected the name of a metric, such as 'val_loss'.")
        if self.mode not in ("min", "max"):
            raise ConfigError(f"Best(mode={self.mode!r}): expected 'min' (lower is better) or 'max'.")
        _ensure_count("Best(keep", self.keep)


@dataclass(frozen=True, slots=True)
class Retention:
    """A checkpoint stays if any rule keeps it; without rules all do. The newest and pinned ones always stay, and one in which
    unchanged files of another lie (only where the storage has no hard links) for as long as that one does.

    Applies to the current line only: superseded checkpoints are never expired by it.
    """

    last: int | None = None
    """The newest so many."""
    every: int | None = None
    """One in each `every` steps: the newest in (k*every, (k+1)*every], so 1000 keeps 1000, 2000, ..."""
    best: Best | None = None

    def __post_init__(self) -> None:
        for name, value in (("last", self.last), ("every", self.every)):
            if value is not None:
                _ensure_count(f"Retention({name}", value)
        if self.best is not None and not isinstance(self.best, Best):
            raise ConfigError(f"Retention(best={self.best!r}): expected dckpt.Best('val_loss'), found something else.")


@dataclass(frozen=True, slots=True)
class Candidate:
    """What the policy knows about one checkpoint of the line."""

    id: CheckpointId
    metrics: Mapping[str, float]
    is_pinned: bool
    created_unix_s: float


@dataclass(frozen=True, slots=True)
class RetentionPlan:
    """Every candidate exactly once, both newest first. `keep` names each reason."""

    keep: list[tuple[CheckpointId, tuple[str, ...]]]
    expire: list[CheckpointId]


def plan_retention(line: Sequence[Candidate], policy: Retention) -> RetentionPlan:
    """Decides for the line, given newest first. The order of the line, not any clock, breaks every tie."""
    reasons: dict[int, list[str]] = {position: [] for position in range(len(line))}
    if policy == Retention():
        for found in reasons.values():
            found.append("no policy")
    if line:
        reasons[0].append("newest")
    for position, candidate in enumerate(line):
        if candidate.is_pinned:
            reasons[position].append("pinned")
    for position in range(min(policy.last or 0, len(line))):
        reasons[position].append(f"last {policy.last}")
    if policy.every is not None:
        for position in _newest_of_buckets(line, policy.every):
            reasons[position].append(f"every {policy.every}")
    if policy.best is not None:
        for position in _best(line, policy.best):
            reasons[position].append(f"best {policy.best.metric}")
    return RetentionPlan(
        keep=[(line[position].id, tuple(found)) for position, found in reasons.items() if found],
        expire=[line[position].id for position, found in reasons.items() if not found],
    )


def _newest_of_buckets(line: Sequence[Candidate], every: int) -> list[int]:
    first: dict[int, int] = {}
    for position, candidate in enumerate(line):
        # A save within the accumulation of step s + 1 carries step s: it belongs to the bucket of s + 1, else
        # it would take the place of the round step s.
        reached = candidate.id.step + (candidate.id.micro_step > 0)
        first.setdefault(-(-reached // every), position)
    return list(first.values())


def _best(line: Sequence[Candidate], best: Best) -> list[int]:
    sign = 1.0 if best.mode == "min" else -1.0
    ranked = [
        (sign * candidate.metrics[best.metric], position)
        for position, candidate in enumerate(line)
        if math.isfinite(candidate.metrics.get(best.metric, math.nan))
    ]
    return [position for _, position in sorted(ranked)[: best.keep]]


def _ensure_count(what: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise ConfigError(f"{what}={value!r}): expected a whole number of at least 1. None switches the rule off.")
