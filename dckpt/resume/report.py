"""What was loaded, and what is known about continuing from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dckpt.findings import Finding
from dckpt.format.manifest import Manifest
from dckpt.resume.fingerprints import SavedFingerprints


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What a load did. `rng`: stream -> "exact", "copied", "re-derived" or why it was left alone.

    continued_micro_step: micro-batches of the running step that are in the restored gradients, as this run counts them; where it
    is 0 and `micro_step` is not, they were dropped or never stored, and the step begins again.
    begins_leg: loaded to begin a new leg: the position in the data was left out on purpose.
    bytes_read: what this rank read for it, from the page cache or the medium: shard files, their checksums, the index. The
    manifest is left out. Differs by rank. fingerprints: this rank's share of those of the loaded tensors.
    """

    checkpoint: str
    step: int | None
    micro_step: int
    generation: int
    manifest_sha256: str
    manifest: Manifest
    parts: tuple[str, ...]
    skipped_parts: tuple[str, ...]
    rng: dict[str, str]
    damaged: tuple[str, ...] = ()  # checkpoints passed over because of confirmed corruption, newest first
    carried_from_rank_0: tuple[str, ...] = ()  # tensors that differed by rank and could not be kept so
    continued_micro_step: int = 0
    begins_leg: bool = False
    bytes_read: int = 0
    fingerprints: SavedFingerprints | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.checkpoint}: step {self.step}, parts: {', '.join(self.parts) or 'none'}"


@dataclass(frozen=True, slots=True)
class ResumeReport:
    """All findings about one resume; equal on every rank."""

    loaded: LoadResult
    world_size: int
    findings: tuple[Finding, ...] = field(default=())

    @property
    def step(self) -> int | None:
        """The optimizer step that training continues from."""
        return self.loaded.step

    @property
    def critical(self) -> tuple[Finding, ...]:
        """The findings that say: do not continue like this."""
        return tuple(finding for finding in self.findings if finding.severity == "critical")

    def summary(self) -> str:
        """One line on what was loaded."""
        return (
            f"Resumed from {self.loaded.checkpoint}: step {self.loaded.step}, saved by {self.loaded.manifest.world_size} "
            f"ranks, loaded by {self.world_size}; parts: {', '.join(self.loaded.parts) or 'none'}."
        )

    def __str__(self) -> str:
        return self.text()

    def text(self) -> str:
        """The report for people: a line on what was loaded, then one line a finding."""
        lines = [self.summary()]
        lines += [f"  {finding.severity}: {finding.message}" for finding in self.findings]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON."""
        loaded = self.loaded
        return {
            "checkpoint": loaded.checkpoint,
            "step": loaded.step,
            "micro_step": loaded.micro_step,
            "continued_micro_step": loaded.continued_micro_step,
            "generation": loaded.generation,
            "saved_world_size": loaded.manifest.world_size,
            "world_size": self.world_size,
            "parts": list(loaded.parts),
            "skipped_parts": list(loaded.skipped_parts),
            "rng": dict(loaded.rng),
            "damaged": list(loaded.damaged),
            "carried_from_rank_0": list(loaded.carried_from_rank_0),
            "findings": [finding.to_json() for finding in self.findings],
        }
