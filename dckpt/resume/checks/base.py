"""What a check is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from dckpt.findings import Finding, Severity

Facts: TypeAlias = Mapping[str, Any]
Phase = Literal["before", "after", "probe", "watch"]
"""before: needs the manifest and the settings of the run only, no tensors. after: needs what was loaded. probe: one forward
pass. watch: the first steps of training."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything that checks may look at; plain JSON, so that a check never reaches a live object.

    saved: the manifest's facts. current: the facts of the run that wants to continue, in the same form; before a run exists
    (`dckpt doctor`) only what was said of it. checkpoint: what the manifest says besides (`describe_manifest`). load: what the
    load did, None before one. built: the facts of the run before the load overwrote them. ranks: what each rank found, in
    order; empty before a load.
    """

    saved: Facts
    current: Facts
    checkpoint: Facts
    load: Facts | None = None
    built: Facts | None = None
    ranks: Sequence[Facts] = ()
    allowed: frozenset[str] = field(default=frozenset())


@dataclass(frozen=True, slots=True)
class Check:
    """One question about a resume. `run` yields a finding for each problem, and nothing if there is none."""

    id: str
    title: str
    phase: Phase
    run: Callable[[Evidence], Iterable[Finding]]


def finding(check: str, severity: Severity, message: str, *, expected: object, found: object, remedy: str) -> Finding:
    """The record of a problem. `message` is one or two sentences without the remedy, which is added."""
    return Finding(
        check=check,
        severity=severity,
        expected=shown(expected),
        found=shown(found),
        remedy=remedy,
        message=f"{message.rstrip('.')}. {remedy[:1].upper()}{remedy[1:].rstrip('.')}.",
    )


def not_checked(check: str, why: str, remedy: str) -> Finding:
    """A fact is missing. It is no pass, and no fault either."""
    return Finding(
        check=check,
        severity="not checked",
        expected="the fact",
        found="none",
        remedy=remedy,
        message=f"{why}: {remedy}",
    )


def get(facts: Facts | None, path: str) -> Any:
    """facts["a"]["b"] for "a.b"; None where something on the way is missing."""
    found: Any = facts
    for key in path.split("."):
        if not isinstance(found, Mapping) or key not in found:
            return None
        found = found[key]
    return found


def shown(value: object) -> str:
    """As it stands in a message: short, and a float with all the digits that matter."""
    if isinstance(value, str):
        text = value
    elif isinstance(value, float):
        text = f"{value:.9g}"
    elif isinstance(value, (list, tuple)):
        return some([shown(item) for item in value])
    else:
        text = str(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def some(names: Sequence[str], limit: int = 5) -> str:
    """The first names, and how many more there are."""
    listed = ", ".join(names[:limit])
    return listed if len(names) <= limit else f"{listed} and {len(names) - limit} more"


def relative(found: float, expected: float) -> float:
    """|found - expected| / |expected|; infinite if only one of them is zero or if one is no number."""
    if found == expected:
        return 0.0
    if found != found or expected != expected or expected == 0:
        return float("inf")
    return abs(found - expected) / abs(expected)


def each_rank(evidence: Evidence, path: str) -> list[tuple[int, Any]]:
    """(rank, its value) of every rank that has the fact."""
    found = ((rank, get(facts, path)) for rank, facts in enumerate(evidence.ranks))
    return [(rank, value) for rank, value in found if value is not None]


def union(evidence: Evidence, path: str) -> list[str]:
    """Names that any rank reports under `path`, each once, in order."""
    return list(dict.fromkeys(name for _, names in each_rank(evidence, path) for name in names))


def ranks_text(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 1, 2` or `ranks 0, 1, 2, 3, 4 and 7 more`."""
    return f"rank{'s' if len(ranks) > 1 else ''} {some([str(rank) for rank in ranks])}"
