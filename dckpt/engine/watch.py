"""The first steps after a resume, compared with the losses and the learning rate before it."""

from __future__ import annotations

import logging
from typing import Any

from dckpt.findings import Finding
from dckpt.resume.checks.probe import WATCHED_STEPS, check_first_steps
from dckpt.resume.report import LoadResult
from dckpt.state.train_state import TrainState

log = logging.getLogger(__name__)

LOOKS = (5, 10, WATCHED_STEPS)
"""Steps after the resume at which losses are fetched from the device: each waits for it."""


class FirstSteps:
    """Looks at a few of the first steps and tells what does not fit; each finding once. Changes nothing."""

    def __init__(self, state: TrainState, loaded: LoadResult) -> None:
        progress = state.progress
        self._begin = progress.step
        self._before = [loss for step, loss in progress.loss_history if step > progress.legs[-1].step]
        # A schedule that was restored moves the rate as planned; the report has compared it.
        self._rate = None if loaded.manifest.facts.get("scheduler") else _rate_of(loaded.manifest.facts)
        self._samples = _samples_of_a_step(state)
        self._rates: list[float] = []
        self._told: set[str] = set()
        self.findings: list[Finding] = []

    @property
    def is_over(self) -> bool:
        """All watched steps are done."""
        return len(self._rates) >= WATCHED_STEPS

    def look(self, state: TrainState, *, is_told: bool) -> None:
        """Call after each step. `is_told`: whether this rank logs what it finds."""
        self._rates.append(rate_of_first_group(state) or 0.0)
        if len(self._rates) not in LOOKS:
            return
        progress = state.progress
        after = [loss for step, loss in progress.loss_history if step > self._begin]
        samples = _samples_of_a_step(state)
        found = check_first_steps(
            self._before, after, rates=self._rates, saved_rate=self._rate, samples=samples, saved_samples=self._samples
        )
        for finding in found:
            if finding.expected not in self._told:
                self._told.add(finding.expected)
                self.findings.append(finding)
                if is_told:
                    log.warning("[%s] %s", finding.check, finding.message)


def _samples_of_a_step(state: TrainState) -> int | None:
    """Where no batch is stated: with one, the report has compared it, and a short last step of an epoch is no change."""
    progress = state.progress
    return progress.batch_history[-1][1] if progress.batch is None and progress.batch_history else None


def rate_of_first_group(state: TrainState) -> float | None:
    """The learning rate of the first group; None without an optimizer, or if it lies in a tensor, perhaps on a device."""
    rate = state.optimizers[0].param_groups[0].get("lr") if state.optimizers else None
    return float(rate) if isinstance(rate, (int, float)) else None


def _rate_of(facts: Any) -> float | None:
    for optimizer in (facts.get("optim") or {}).values():
        for group in optimizer.get("groups", []):
            rate = group.get("options", {}).get("lr")
            return float(rate) if isinstance(rate, (int, float)) else None
    return None
