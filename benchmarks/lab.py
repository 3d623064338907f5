"""What a scenario is run with: the size, the places, and the ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.launch import Job, NotHereError, Worlds
from benchmarks.setup import Setup


@dataclass(frozen=True, slots=True)
class Lab:
    """setup: of the run, to be narrowed by scenario. memory: a directory on tmpfs, or None where there is none."""

    worlds: Worlds
    setup: Setup
    memory: Path | None
    told: Callable[[str], None]

    @property
    def ranks(self) -> int:
        """How many ranks a job gets that fixes no number."""
        return self.worlds.usual_ranks()

    def run(self, ranks: int, job: Job, *args: Any) -> Any:
        """Runs the job on so many ranks; rank 0's result."""
        return self.worlds.run(ranks, job, *args)

    def in_memory(self, name: str) -> Setup:
        """The run's set-up with its directory on tmpfs."""
        if self.memory is None:
            raise NotHereError("no tmpfs that all ranks share")
        return Setup(
            directory=self.memory / name,
            storage=None,
            megabytes=self.setup.megabytes,
            rounds=self.setup.rounds,
            quick=self.setup.quick,
        )


@dataclass(frozen=True, slots=True)
class Scenario:
    """run: returns the records of its series, or raises `NotHereError`."""

    name: str
    title: str
    run: Callable[[Lab], list[dict[str, Any]]]
