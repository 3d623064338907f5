"""Learning-rate schedules asked without being moved: what they would give next, and what they give at an earlier step.

A schedule is copied with a stand-in for its optimizer that has the same groups over a parameter of one element, so that
neither the live schedule nor the live optimizer changes, and no weights are copied.
"""

from __future__ import annotations

import copy
import math
from functools import partial
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

REPLAY_STEPS_MAX = 200_000
"""At 2 to 3 microseconds a step, a replay takes half a second at most."""

_NOT_HORIZON = frozenset(
    {
        "optimizer", "last_epoch", "base_lrs", "verbose", "lr_lambdas", "anneal_func",
        "best", "num_bad_epochs", "cooldown_counter", "T_cur", "T_i",
    }
)  # fmt: skip
"""Attributes that are no constants of a schedule, or that JSON cannot hold."""


def can_be_asked(scheduler: Any) -> bool:
    """Whether a copy can be stepped: torch's own schedules only. A schedule of the user's may do more than compute."""
    if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau):
        return False
    nested = getattr(scheduler, "_schedulers", [])
    is_torchs = type(scheduler).__module__ == "torch.optim.lr_scheduler"
    return is_torchs and _is_asked_freely(scheduler) and all(can_be_asked(item) for item in nested)


def _is_asked_freely(scheduler: LRScheduler) -> bool:
    """Asking neither waits for a device nor calls an object that may keep what it was asked."""
    called = [*getattr(scheduler, "lr_lambdas", []), getattr(scheduler, "_scale_fn_custom", None)]
    optimizer = getattr(scheduler, "optimizer", None)
    rates = [group.get("lr") for group in getattr(optimizer, "param_groups", [])]
    return all(
        call is None or isinstance(call, (FunctionType, BuiltinFunctionType, partial)) for call in called
    ) and not any(isinstance(rate, torch.Tensor) and rate.device.type != "cpu" for rate in rates)


class ScheduleCopy:
    """A copy of a live schedule that may be stepped freely."""

    def __init__(self, scheduler: LRScheduler) -> None:
        self._optimizer = _stand_in(scheduler.optimizer)
        self._scheduler = _copied(scheduler, self._optimizer)

    @property
    def last_epoch(self) -> int:
        """How often it was stepped."""
        return schedule_counter(self._scheduler) or 0

    @property
    def rates(self) -> list[float]:
        """The learning rate of each group now."""
        return [float(group["lr"]) for group in self._optimizer.param_groups]

    def step(self) -> list[float]:
        """One step on; the rates after it."""
        self._scheduler.step()
        return self.rates

    def advance_to(self, last_epoch: int) -> list[float] | None:
        """The rates when the counter stands at `last_epoch`; None if it is past that, or too far away."""
        if not 0 <= last_epoch - self.last_epoch <= REPLAY_STEPS_MAX:
            return None
        try:
            while self.last_epoch < last_epoch:
                self.step()
        except Exception:  # noqa: BLE001 - a schedule that ends before, or a rate function that fails: nothing to compare with
            return None
        return self.rates


def schedule_counter(scheduler: Any) -> int | None:
    """How often the schedule was stepped; a chain of schedules counts with its first."""
    found = getattr(scheduler, "last_epoch", None)
    if found is None:
        nested = getattr(scheduler, "_schedulers", None)
        return schedule_counter(nested[0]) if nested else None
    return int(found) if isinstance(found, (int, float)) else None


def copy_schedule(scheduler: Any) -> ScheduleCopy | None:
    """A copy, or None for what cannot be asked."""
    return ScheduleCopy(scheduler) if can_be_asked(scheduler) else None


def next_rates(scheduler: Any) -> list[float] | None:
    """The rates after one more step, or None for what cannot be asked."""
    found = copy_schedule(scheduler)
    try:
        return None if found is None else found.step()
    except Exception:  # noqa: BLE001 - some schedules end: there is no rate after the last one
        return None


def horizon(scheduler: Any) -> dict[str, Any]:
    """The constants that shape the schedule: T_max, total_steps, milestones, gamma, base_lrs, of nested schedules too."""
    found: dict[str, Any] = {
        "base_lrs": [float(rate) for rate in getattr(scheduler, "base_lrs", []) if not _is_on_device(rate)]
    }
    for name, value in vars(scheduler).items():
        if name.startswith("_") and name != "_milestones":
            continue
        if name in _NOT_HORIZON:
            continue
        plain = _plain(value)
        if plain is not None:
            found[name] = plain
    nested = getattr(scheduler, "_schedulers", None)
    if isinstance(nested, (list, tuple)):
        # A schedule of another kind that took this one's state has plain values here.
        found["schedules"] = [
            {"class": type(item).__name__, **horizon(item)} for item in nested if hasattr(item, "step")
        ]
    return found


def _is_on_device(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type != "cpu"


def _plain(value: Any) -> Any:
    if isinstance(value, bool) or (isinstance(value, (int, str)) and not isinstance(value, bool)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):  # Counter of milestones
        return {str(key): item for key, item in sorted(value.items()) if isinstance(item, (int, float))}
    if isinstance(value, (list, tuple)) and all(isinstance(item, (int, float)) for item in value):
        return list(value)
    return None


class _NeverStepped:
    """In place of `step`, with the mark by which a schedule knows that it may be stepped after it."""

    _wrapped_by_lr_sched = True


def _stand_in(optimizer: Optimizer) -> Optimizer:
    groups = []
    for group in optimizer.param_groups:
        options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        options = {k: v.clone() if isinstance(v, torch.Tensor) else copy.copy(v) for k, v in options.items()}
        groups.append({**options, "params": [torch.nn.Parameter(torch.zeros(1))]})
    stand_in = SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
    stand_in.param_groups = groups
    # What a schedule looks at to warn when it is stepped before its optimizer; this one is never stepped.
    stand_in.step = _NeverStepped()  # type: ignore[method-assign,assignment]
    stand_in._opt_called = True  # type: ignore[attr-defined]
    return stand_in


def _copied(scheduler: LRScheduler, optimizer: Optimizer) -> LRScheduler:
    twin = copy.copy(scheduler)
    for name, value in vars(scheduler).items():
        if isinstance(value, (list, dict)) and name not in ("lr_lambdas", "_schedulers"):
            setattr(twin, name, copy.copy(value))
    twin.optimizer = optimizer
    nested = getattr(scheduler, "_schedulers", None)
    if nested is not None:
        twin._schedulers = type(nested)(_copied(item, optimizer) for item in nested)  # type: ignore[attr-defined]
    return twin
