"""The run as its program built it: facts taken before a load overwrites them, and copies of its schedules."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from dckpt.resume.facts.collect import FactCollector
from dckpt.resume.facts.schedules import ScheduleCopy, copy_schedule
from dckpt.resume.facts.training import by_key
from dckpt.state.train_state import TrainState


@dataclass(frozen=True)
class BuiltRun:
    """facts: as in a manifest. schedules: scheduler key -> a copy at the point where the program built it."""

    facts: dict[str, Any]
    schedules: dict[str, ScheduleCopy] = field(default_factory=dict)

    def planned_rates(self, counters: dict[str, int | None]) -> dict[str, list[float] | None]:
        """Scheduler key -> learning rates of the built schedule when it stands at the saved counter; None if unknown."""
        return {
            key: None if counters.get(key) is None else copy.advance_to(counters[key] or 0)
            for key, copy in self.schedules.items()
        }


def describe_built(state: TrainState, collector: FactCollector) -> BuiltRun:
    """Taken before a load; changes nothing."""
    live = by_key(state.scheduler)
    # Two schedules of one optimizer make its rate together: what one of them alone would give says nothing.
    owners = Counter(id(getattr(scheduler, "optimizer", None)) for scheduler in live.values())
    schedules = {
        key: copy_schedule(scheduler)
        for key, scheduler in live.items()
        if owners[id(getattr(scheduler, "optimizer", None))] == 1
    }
    return BuiltRun(collector.collect(state), {key: copy for key, copy in schedules.items() if copy is not None})
