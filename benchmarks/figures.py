"""From raw rounds to medians, ratios and judged lines: pure functions over plain records.

A round is {contender: {measure: value}}. A measure's name ends with its unit: `_s`, `_bytes`, `_percent`. Ratios are formed
within each round and only then reduced, so that a machine whose speed drifts over the run does not bend them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Round = dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class Value:
    """One measured value of each round."""

    contender: str
    measure: str


@dataclass(frozen=True, slots=True)
class Line:
    """A target: `numerator / denominator` of each round, reduced, must be at least or at most `target`.

    A denominator that is a number is the same for all rounds, such as a count of bytes. `reduce` is "median", or "worst"
    where one bad round counts, such as for memory.
    """

    text: str
    sense: Literal["at least", "at most"]
    target: float
    numerator: Value
    denominator: Value | float
    reduce: Literal["median", "worst"] = "median"


def medians(rounds: Sequence[Round]) -> Round:
    """The median of each measure of each contender over the rounds that have it."""
    found: dict[str, dict[str, list[float]]] = {}
    for one in rounds:
        for contender, measures in one.items():
            for measure, value in measures.items():
                found.setdefault(contender, {}).setdefault(measure, []).append(value)
    return {
        contender: {measure: statistics.median(values) for measure, values in measures.items()}
        for contender, measures in found.items()
    }


def ratios(rounds: Sequence[Round], numerator: Value, denominator: Value | float) -> list[float] | None:
    """`numerator / denominator` of each round; None if a contender was not measured. A zero denominator is an error."""
    found = []
    for one in rounds:
        above = _value(one, numerator)
        below = _value(one, denominator) if isinstance(denominator, Value) else denominator
        if above is None or below is None:
            return None
        found.append(above / below)
    return found or None


def _value(one: Round, value: Value) -> float | None:
    return one.get(value.contender, {}).get(value.measure)


def judge(line: Line, rounds: Sequence[Round]) -> dict[str, Any]:
    """The line with its ratio of each round, what they reduce to, and whether it holds; `passed` is None if not measured."""
    found = ratios(rounds, line.numerator, line.denominator)
    reduced = None if found is None else _reduce(line, found)
    passed = None
    if reduced is not None:
        passed = math.isfinite(reduced) and (
            reduced >= line.target if line.sense == "at least" else reduced <= line.target
        )
    return {
        "text": line.text,
        "sense": line.sense,
        "target": line.target,
        "reduce": line.reduce,
        "ratios": found,
        "value": reduced,
        "passed": passed,
    }


def _reduce(line: Line, found: list[float]) -> float:
    if line.reduce == "median":
        return statistics.median(found)
    return min(found) if line.sense == "at least" else max(found)


def turns(count: int, number: int) -> list[int]:
    """The order in which `count` contenders take their turn in round `number`: each round another one begins."""
    return [(number + place) % count for place in range(count)]
