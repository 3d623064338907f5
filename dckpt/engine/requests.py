"""What a caller asked for, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dckpt.engine.arguments import ensure_choice, plain_metrics
from dckpt.engine.job import SaveRequest
from dckpt.errors import ConfigError
from dckpt.state.train_state import TrainState


def save_request(
    state: TrainState,
    step: int | None,
    metrics: Mapping[str, float],
    gradients: str,
    *,
    is_blocking: bool,
    facts: Mapping[str, Any],
    failure: Exception | None = None,
) -> SaveRequest:
    """The request of `Checkpointer.save`; `facts` go into the manifest beside those of the state.

    failure: why this rank cannot save; it becomes a failed save on all of them.
    """
    ensure_choice("gradients", gradients, ("store", "drop"), of="Checkpointer.save")
    progress = state.progress
    if step is None:
        if progress is None:
            raise ConfigError(
                "Checkpointer.save: expected step= or a TrainState with progress, found neither. Pass save(state, step=...)."
            )
        step = progress.step
    micro_step = progress.micro_step if progress is not None else 0
    return SaveRequest(
        step=step,
        micro_step=micro_step,
        metrics=plain_metrics(metrics),
        stores_gradients=micro_step > 0 and gradients == "store",
        is_blocking=is_blocking,
        facts=facts,
        failure=failure,
    )
