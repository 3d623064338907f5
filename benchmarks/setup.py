"""What a job is given: plain values that travel to the ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Setup:
    """directory: the scenario's own, on the medium that is measured. storage: URL for dckpt where it is not that one.

    megabytes: the state over all ranks. rounds: measured ones. quick: everything as small as it gets.
    """

    directory: Path
    storage: str | None
    megabytes: int
    rounds: int
    quick: bool

    def within(self, name: str) -> Setup:
        """The same below the directory; the directory is not made."""
        storage = None if self.storage is None else f"{self.storage.rstrip('/')}/{name}"
        return replace(self, directory=self.directory / name, storage=storage)

    def root(self, name: str) -> str:
        """Where dckpt keeps the run of this name."""
        return str(self.directory / name) if self.storage is None else f"{self.storage.rstrip('/')}/{name}"
