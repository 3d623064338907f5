"""Follows one training run: what later manifests say of its resume, the watch over its first steps, TensorBoard."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from dckpt.engine.watch import FirstSteps, rate_of_first_group
from dckpt.ranks.topology import Topology
from dckpt.resume.report import LoadResult, ResumeReport
from dckpt.state.train_state import TrainState
from dckpt.telemetry.tensorboard import EventLog, ensure_installed

log = logging.getLogger(__name__)


class Follower:
    """Reads the run and never changes it. `facts` go into each manifest.

    directory: where TensorBoard events go, on the coordinator; None writes none. A failure to write them is told once and ends
    them: training matters more.
    """

    def __init__(self, directory: str | None, topology: Topology) -> None:
        self.facts: dict[str, Any] = {}
        self._topology = topology
        self._has_told_mode = False
        self._watch: FirstSteps | None = None
        if directory is not None:
            ensure_installed()
        self._events: EventLog | None = None
        if directory is not None and topology.is_coordinator:
            try:
                self._events = EventLog(directory)
            except Exception as error:  # noqa: BLE001 - a broken installation raises what it likes
                # This rank alone knows of it, and the others are about to meet it.
                log.warning("no TensorBoard events: %s", error)

    def loaded(self, loaded: LoadResult) -> None:
        """The state is that of another checkpoint now: what its manifest says of the run holds on."""
        rows = loaded.manifest.facts.get("frozen_rows")
        self.facts = {"frozen_rows": rows} if rows else {}
        self._watch = None

    def resumed(self, state: TrainState, loaded: LoadResult, report: ResumeReport, facts: dict[str, Any]) -> None:
        """Training goes on from `loaded`."""
        self.facts = facts
        # On other data neither losses nor batches compare with those before.
        is_watched = state.progress is not None and not loaded.begins_leg
        self._watch = FirstSteps(state, loaded) if is_watched else None
        self._write(
            lambda events: events.write_resume(
                loaded.step or 0, report.text(), critical=len(report.critical), warnings=len(report.warnings)
            )
        )

    def stepped(self, state: TrainState) -> None:
        """One more optimizer step was taken."""
        if self._watch is not None and not self._watch.is_over:
            self._watch.look(state, is_told=self._topology.is_coordinator)
        rate = rate_of_first_group(state)
        if rate is not None:
            self._write(lambda events: events.note_rate(state.progress.step, rate))

    def saving(self, state: TrainState) -> None:
        """A checkpoint is about to be taken, which fetches the losses from the device anyway."""
        if not self._has_told_mode and self._topology.is_coordinator:
            evaluating = [prefix.removesuffix(".") for prefix, model in state.models().items() if not model.training]
            if evaluating:
                self._has_told_mode = True
                log.warning(
                    "saving with the model%s in eval mode: is it trained so, or did a validation end early? Evaluate inside "
                    "dckpt.evaluating(model).",
                    f" {evaluating[0]}" if evaluating[0] else "",
                )
        if state.progress is not None:
            self._write(lambda events: events.write_losses(state.progress.loss_history))

    def close(self) -> None:
        """Nothing follows; losses since the last save are written by the run that trains these steps again."""
        self._write(lambda events: events.close())
        self._events = None

    def _write(self, write: Callable[[EventLog], None]) -> None:
        if self._events is None:
            return
        try:
            write(self._events)
        except Exception as error:  # noqa: BLE001 - the library writes on a thread of its own and raises what that met
            self._events = None
            log.warning("TensorBoard events end here: %s: %s", type(error).__name__, error)
