"""Beginning a leg: further training of the same run, usually on other data, with counters of its own."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from dckpt.engine.arguments import ensure_choice
from dckpt.engine.pending import PendingSave
from dckpt.errors import CheckpointNotFoundError, ConfigError
from dckpt.format.layout import CheckpointId, parse_checkpoint_name
from dckpt.state.progress import TrainProgress, saved_legs
from dckpt.state.train_state import TrainState

log = logging.getLogger(__name__)

DATA = "data"
_CALL = "checkpointer.start_leg"


@dataclass(frozen=True, slots=True)
class NewLeg:
    """The leg that is to be trained. A name makes the call repeatable: a run that is in this leg already just goes on."""

    name: str | None
    scheduler: Literal["keep", "fresh"]

    def __post_init__(self) -> None:
        ensure_choice("scheduler", self.scheduler, ("keep", "fresh"), of="start_leg")
        if self.name == "":
            raise ConfigError(f"start_leg(name={self.name!r}): expected some text, or nothing")

    def follows(self, names: list[str | None], micro_step: int) -> bool:
        """Whether it begins after legs of these names; False if it is the last of them."""
        if self.name is not None and self.name == names[-1]:
            return False
        if self.name is not None and self.name in names:
            raise ConfigError(
                f"start_leg(name={self.name!r}): this leg is over, the run is in leg {len(names)}, {names[-1]!r}. Give the new "
                "one a name of its own"
            )
        if micro_step:
            raise ConfigError(
                f"start_leg: expected a boundary of gradient accumulation, found micro-step {micro_step}. Resume and finish "
                "that step first, or roll back to a step before it"
            )
        return True

    def follows_saved(self, record: Any) -> bool:
        """The same for the saved record of a progress."""
        found = saved_legs(record)
        if found is None:
            raise ConfigError(
                "start_leg: expected a checkpoint with a dckpt.TrainProgress, found none in it. Use load(state)"
            )
        return self.follows(*found)


def ensure_able(state: TrainState, leg: NewLeg) -> TrainProgress:
    """The state's progress. `ConfigError` if this state cannot begin a leg; nothing is changed."""
    progress = state.progress
    if not isinstance(progress, TrainProgress):
        raise ConfigError(
            f"{_CALL}: expected TrainState(progress=dckpt.TrainProgress(...)), found {type(progress).__name__}"
        )
    if leg.scheduler == "fresh" and state.scheduler is None:
        raise ConfigError(f"{_CALL}(scheduler='fresh'): expected a TrainState with a scheduler, found none")
    return progress


def ensure_restartable(state: TrainState) -> None:
    """`ConfigError` if the data was moved already and cannot be set back to its beginning."""
    for item in _data_of(state):
        if not callable(getattr(item, "restart", None)):
            raise ConfigError(
                f"{_CALL}: expected data that can be set back to its beginning, found {type(item).__name__} without restart() "
                "at the position of the leg before. Call start_leg in place of resume: it loads everything but that position"
            )


def saved_as(pending: PendingSave) -> CheckpointId:
    """The checkpoint that a finished save made. Raises the save's own error if it made none."""
    if pending.outcome != "committed":
        raise pending.error or AssertionError("a save that did not commit has an error")
    found = parse_checkpoint_name(pending.checkpoint or "")
    assert found is not None, "a committed save of a run has a checkpoint's name"
    return found


def nothing_to_continue(root: str) -> CheckpointNotFoundError:
    """The error for a first leg."""
    return CheckpointNotFoundError(
        f"start_leg: expected a run with checkpoints in {root}, found none. A run's first leg begins with resume(state)."
    )


def begin_leg(
    state: TrainState, progress: TrainProgress, leg: NewLeg, end: CheckpointId, *, is_told: bool = False
) -> None:
    """Counters to zero, samplers to epoch 0, sample 0; the schedule goes on or begins anew. Weights, moments, RNG stay.

    end: the checkpoint at the end of the leg before. is_told: this rank logs what began.
    """
    progress.begin_leg(leg.name)
    for item in _data_of(state):
        restart = getattr(item, "restart", None)
        if callable(restart):
            restart()
    if leg.scheduler == "fresh":
        state.built_schedule.restore()
    if is_told:
        log.info("leg %d begins at step %d, after %s", progress.leg, progress.step, end.name)
    rates = [_number(group["lr"]) for optimizer in state.optimizers for group in optimizer.param_groups]
    if is_told and rates and not any(rates):
        log.warning(
            "leg %d begins with learning rates of zero: nothing will be learned. The schedule is at its end: pass "
            "scheduler='fresh', or build a longer one",
            progress.leg,
        )


def _data_of(state: TrainState) -> list[Any]:
    if state.data is None:
        return []
    return list(state.data.values()) if isinstance(state.data, Mapping) else [state.data]


def _number(rate: Any) -> float:
    return float(rate.item()) if isinstance(rate, torch.Tensor) else float(rate)
