"""What was loaded, and what is known about continuing from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dckpt.findings import Finding, page_of
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
    streams: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    """Random stream of this rank -> digest of the state that the load left it in; those alone that it set."""
    built: Any = field(default=None, repr=False, compare=False)
    """The run as the program built it, before the load (`dckpt.resume.built.BuiltRun`)."""

    def __str__(self) -> str:
        return f"{self.checkpoint}: step {self.step}, parts: {', '.join(self.parts) or 'none'}"


@dataclass(frozen=True, slots=True)
class ResumeReport:
    """All findings about one resume; equal on every rank."""

    loaded: LoadResult
    world_size: int
    findings: tuple[Finding, ...] = field(default=())
    passed: int = 0
    seconds: float = 0.0
    """How long the validation took on rank 0."""

    @property
    def step(self) -> int | None:
        """The optimizer step that training continues from."""
        return self.loaded.step

    @property
    def critical(self) -> tuple[Finding, ...]:
        """The findings that say: do not continue like this."""
        return tuple(finding for finding in self.findings if finding.severity == "critical")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings that a person should read."""
        return tuple(finding for finding in self.findings if finding.severity == "warning")

    @property
    def not_checked(self) -> tuple[Finding, ...]:
        """What could not be compared, because a fact is missing; neither good nor bad."""
        return tuple(finding for finding in self.findings if finding.severity == "not checked")

    @property
    def exit_code(self) -> int:
        """0: nothing to say. 1: warnings. 2: critical findings."""
        return 2 if self.critical else 1 if self.warnings else 0

    def summary(self) -> str:
        """One line on what was loaded."""
        return (
            f"Resumed from {self.loaded.checkpoint}: step {self.loaded.step}, saved by "
            f"{_count(self.loaded.manifest.world_size, 'rank')}, loaded by {self.world_size}; "
            f"parts: {', '.join(self.loaded.parts) or 'none'}."
        )

    def __str__(self) -> str:
        return self.text()

    def text(self) -> str:
        """The report for people: what was loaded, the count of checks, each finding, and what could not be checked."""
        lines = [self.summary(), f"  {self.counts()}"]
        lines += [
            f"  {finding.severity.upper()} [{finding.check}] {finding.message}"
            for finding in self.findings
            if finding.severity != "not checked"
        ]
        if self.not_checked:
            names = dict.fromkeys(finding.check for finding in self.not_checked)
            lines.append(f"  not checked, for lack of a fact: {', '.join(names)}")
        if self.findings:
            first = self.findings[0].check
            lines.append(f"  `{page_of(first)}`, and so for each check: what it means, what it needs, what to do.")
        return "\n".join(lines)

    def counts(self) -> str:
        """One line: how many checks passed, and how many findings of each kind."""
        infos = len(self.findings) - len(self.critical) - len(self.warnings) - len(self.not_checked)
        return (
            f"{_count(self.passed, 'check')} passed, {len(self.critical)} critical, {_count(len(self.warnings), 'warning')}, "
            f"{_count(infos, 'note')}, {len(self.not_checked)} not checked ({self.seconds:.2f} s)"
        )

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
            "passed": self.passed,
            "seconds": round(self.seconds, 3),
            "findings": [{**finding.to_json(), "page": page_of(finding.check)} for finding in self.findings],
        }


def _count(number: int, singular: str) -> str:
    return f"{number} {singular}{'' if number == 1 else 's'}"
