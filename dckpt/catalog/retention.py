"""Which checkpoints stay: a pure function from records to a plan. Deleting is `dckpt.catalog.prune`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
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
    """A checkpoint stays if any rule keeps it; without rules all do. The newest, pinned ones and the end of each earlier leg
    always stay, and one in which unchanged files of another lie (only where the storage has no hard links) for as long as
    that one does.

    last: the newest so many.
    every: one in each `every` steps, the newest in (k*every, (k+1)*every].
    best: `Best("val_loss")`, the best by a metric.
    daily: the newest of each of the newest so many days (UTC) that have a checkpoint.

    A damaged checkpoint is walked back over only if an older one is left. `daily=2`, `best` or `every` alone may keep a single
    one for a while: add `last=2` or more.

    Applies to the current line only: superseded checkpoints are never expired by it.
    """

    last: int | None = None
    """The newest so many."""
    every: int | None = None
    """One in each `every` steps: the newest in (k*every, (k+1)*every], so 1000 keeps 1000, 2000, ..."""
    best: Best | None = None
    daily: int | None = None
    """The newest of each of the newest so many days (UTC, when it was saved) that have a checkpoint; days without one do not
    count, so a break in the training costs nothing."""

    def __post_init__(self) -> None:
        for name, value in (("last", self.last), ("every", self.every), ("daily", self.daily)):
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
    """0 where it is not known: such a one is of no day."""
    is_leg_end: bool = False
    """A new leg began after it: the way back to the leg before."""


@dataclass(frozen=True, slots=True)
class RetentionPlan:
    """Every candidate exactly once, both newest first. `keep` names each reason; `lost` says of each that is expired why no
    rule keeps it.
    """

    keep: list[tuple[CheckpointId, tuple[str, ...]]]
    expire: list[CheckpointId]
    lost: Mapping[CheckpointId, str]


@dataclass(frozen=True, slots=True)
class _Rule:
    """One rule over one line: its name, the positions that it keeps, and why it does not keep another one."""

    name: str
    kept: Sequence[int]
    why_not: Callable[[int], str]


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
        if candidate.is_leg_end:
            reasons[position].append("end of a leg")
    rules = _rules(line, policy)
    for rule in rules:
        for position in rule.kept:
            reasons[position].append(rule.name)
    expired = [position for position, found in reasons.items() if not found]
    return RetentionPlan(
        keep=[(line[position].id, tuple(found)) for position, found in reasons.items() if found],
        expire=[line[position].id for position in expired],
        lost={line[position].id: "; ".join(rule.why_not(position) for rule in rules) for position in expired},
    )


def _rules(line: Sequence[Candidate], policy: Retention) -> list[_Rule]:
    rules = []
    if policy.last is not None:
        rules.append(_last(line, policy.last))
    if policy.every is not None:
        rules.append(_every(line, policy.every))
    if policy.best is not None:
        rules.append(_best(line, policy.best))
    if policy.daily is not None:
        rules.append(_daily(line, policy.daily))
    return rules


def _last(line: Sequence[Candidate], last: int) -> _Rule:
    return _Rule(f"last {last}", range(min(last, len(line))), lambda _: f"not among the last {last}")


def _every(line: Sequence[Candidate], every: int) -> _Rule:
    # A save within the accumulation of step s + 1 carries step s: it belongs to the bucket of s + 1, else it would
    # take the place of the round step s.
    buckets = [-(-(item.id.step + (item.id.micro_step > 0)) // every) for item in line]
    first: dict[int, int] = {}
    for position, bucket in enumerate(buckets):
        first.setdefault(bucket, position)

    def why_not(position: int) -> str:
        bucket = buckets[position]
        kept = line[first[bucket]].id.step
        return f"step {kept} stands for steps {(bucket - 1) * every + 1} to {bucket * every}"

    return _Rule(f"every {every}", list(first.values()), why_not)


def _best(line: Sequence[Candidate], best: Best) -> _Rule:
    sign = 1.0 if best.mode == "min" else -1.0
    values = [candidate.metrics.get(best.metric, math.nan) for candidate in line]
    ranked = sorted((sign * value, position) for position, value in enumerate(values) if math.isfinite(value))

    def why_not(position: int) -> str:
        value = values[position]
        if not math.isfinite(value):
            return f"no finite {best.metric}"
        return f"{best.metric} {value:.6g} is not among the best {best.keep}"

    return _Rule(f"best {best.metric}", [position for _, position in ranked[: best.keep]], why_not)


def _daily(line: Sequence[Candidate], daily: int) -> _Rule:
    days = [_day(candidate.created_unix_s) for candidate in line]
    first: dict[str, int] = {}
    for position, day in enumerate(days):
        if day is not None:
            first.setdefault(day, position)
    newest = sorted(first, reverse=True)[:daily]

    def why_not(position: int) -> str:
        day = days[position]
        if day is None:
            return "saved on a day that is not known"
        if day not in newest:
            return f"of {day}, not among the newest {daily} days"
        return f"step {line[first[day]].id.step} stands for {day}"

    return _Rule(f"daily {daily}", [first[day] for day in newest], why_not)


def _day(unix_s: float) -> str | None:
    """The day in UTC as text, which sorts as days do; None if it is not known, or no day that a calendar has."""
    if unix_s <= 0:
        return None
    try:
        return datetime.fromtimestamp(unix_s, timezone.utc).strftime("%Y-%m-%d")
    except (OverflowError, ValueError, OSError):
        # A manifest may hold any number; one without a day must not stop the retention of all the others.
        return None


def _ensure_count(what: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise ConfigError(f"{what}={value!r}): expected a whole number of at least 1. None switches the rule off.")
