"""To tell "the same step again" from "the step did not move while the optimizer did"."""

from __future__ import annotations

from dataclasses import dataclass

from dckpt.engine.job import SaveRequest
from dckpt.engine.loader import Loaded
from dckpt.engine.pending import PendingSave
from dckpt.errors import ConfigError
from dckpt.format.accumulation import GRADIENTS
from dckpt.state.train_state import TrainState


@dataclass(frozen=True, slots=True)
class LastSave:
    """The save before the next one, or the checkpoint that was loaded."""

    step: int
    micro_step: int
    optimizer_steps: int | None
    has_gradients: bool
    pending: PendingSave

    def is_same_step(self, request: SaveRequest) -> bool:
        """Whether `request` names the step that this save stands for."""
        return (self.step, self.micro_step) == (request.step, request.micro_step)

    def unmoved_step(self, state: TrainState, request: SaveRequest) -> ConfigError | None:
        """Why a step that was saved before cannot be saved again: it stands for another state now."""
        if self.has_gradients != request.stores_gradients:
            return ConfigError(
                f"Save of step {request.step}, micro-step {request.micro_step}: saved before "
                f"{'with' if self.has_gradients else 'without'} its gradients, and a checkpoint is never changed. Save it the "
                "same way, or after the next micro-batch."
            )
        if self.optimizer_steps == state.optimizer_steps:
            return None
        return ConfigError(
            f"Save of step {request.step}: this step was saved before, and the optimizer has moved since (from "
            f"{self.optimizer_steps} to {state.optimizer_steps} calls of step()). Call progress.advance() after each "
            "optimizer.step(), on every rank."
        )


def last_save(state: TrainState, request: SaveRequest, pending: PendingSave) -> LastSave:
    """The save of `request`, which begins now."""
    return LastSave(request.step, request.micro_step, state.optimizer_steps, request.stores_gradients, pending)


def loaded_as_saved(state: TrainState, loaded: Loaded, *, is_resume: bool) -> LastSave | None:
    """The loaded checkpoint counts as a save of its step if all of it was resumed; a partial load is a new state."""
    identity, progress = loaded.identity, state.progress
    is_whole = is_resume and not loaded.result.skipped_parts
    if not is_whole or (
        progress is not None and (progress.step, progress.micro_step) != (identity.step, identity.micro_step)
    ):
        return None
    committed = PendingSave(identity.step, identity.micro_step)
    committed.checkpoint = loaded.result.checkpoint
    committed.conclude("committed")
    has_gradients = GRADIENTS in loaded.result.parts
    return LastSave(identity.step, identity.micro_step, state.optimizer_steps, has_gradients, committed)
