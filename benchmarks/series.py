"""What one comparison yields: the shape of a record's parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.figures import Line, Round, judge, medians

Role = Literal["dckpt", "peer", "limit"]


@dataclass(frozen=True, slots=True)
class Entrant:
    """Who takes part. fsync: what is durable when its time ends. note: what else a reader must know."""

    name: str
    role: Role
    fsync: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Series:
    """Contenders that took turns under the same conditions.

    conditions: bytes, ranks, medium, cache state and whatever else the figures depend on. skipped: contender -> why it
    could not take part.
    """

    name: str
    title: str
    conditions: dict[str, Any]
    entrants: tuple[Entrant, ...]
    rounds: tuple[Round, ...]
    lines: tuple[Line, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Everything, raw figures included, with medians and judged lines."""
        return {
            "name": self.name,
            "title": self.title,
            "conditions": self.conditions,
            "contenders": {
                entrant.name: {"role": entrant.role, "fsync": entrant.fsync, "note": entrant.note}
                for entrant in self.entrants
            },
            "skipped": self.skipped,
            "rounds": list(self.rounds),
            "medians": medians(self.rounds),
            "lines": [judge(line, self.rounds) for line in self.lines],
        }
