"""Where in an accumulation a run continues whose ranks or micro-batches are others than those that saved. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

GRADIENTS = "grad"
"""The part that holds the gradients of a started accumulation."""

DROP_GRADIENTS = 'ResumePolicy(gradients="drop")'
"""How a person says that they may be lost."""


def carried_micro_step(
    micro_step: int, saved: Sequence[int] | None, live: Sequence[int] | None, *, is_short: bool = False
) -> int | str:
    """The micro-step of the new run at which the same samples are in the gradients, or why there is none.

    saved, live: (micro, accumulation, data_parallel), None where nobody said. A loss that is divided by the accumulation and
    averaged over ranks weighs each sample by 1 / (micro x accumulation x data_parallel), and the first k micro-batches of
    all ranks are the first k x micro x data_parallel samples of the step. So gradients keep their meaning as long
    as the product stays the same and those samples are whole micro-batches of the new run. is_short: see `is_in_short_step`.
    """
    if saved is None or live is None or tuple(saved) == tuple(live):
        return micro_step
    if is_short:
        return "they are a part of the epoch's shorter last step, whose micro-batches are others now"
    (micro, accumulation, ranks), (new_micro, new_accumulation, new_ranks) = saved, live
    samples, new_samples = micro * accumulation * ranks, new_micro * new_accumulation * new_ranks
    if samples != new_samples:
        return f"they are a part of a step of {samples} samples, and a step has {new_samples} now"
    done, rest = divmod(micro_step * micro * ranks, new_micro * new_ranks)
    if rest:
        return (
            f"they hold {micro_step * micro * ranks} samples of the step, which are not a whole number of this run's "
            f"micro-batches of {new_micro} on each of {new_ranks} ranks"
        )
    return done


def is_in_short_step(record: Any) -> bool:
    """Whether a saved data position lies before a last step of the epoch that is shorter than the others.

    `record`: the value of `data`. Such a step is cut into its micro-batches by another rule, so it goes on as it began, or
    begins again.
    """
    state = record.get("state") if isinstance(record, dict) else None
    if not isinstance(state, dict):
        return False
    if record.get("kind") == "several":
        return any(is_in_short_step(item) for item in state.values())
    size, cursor, step = state.get("size"), state.get("cursor"), state.get("global_batch")
    if (
        state.get("tail") != "short"
        or not isinstance(size, int)
        or not isinstance(cursor, int)
        or not isinstance(step, int)
    ):
        return False
    return size - cursor < step
