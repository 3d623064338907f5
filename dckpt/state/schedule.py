"""The learning-rate schedule as the program built it, kept to begin it again after a load has overwritten it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from dckpt.errors import ConfigError

# What torch's schedulers write into an optimizer's groups. The last two only by cyclic ones, which leave their bounds there.
_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum")
_CYCLED = ("momentum", "betas")


class BuiltSchedule:
    """Copies of the schedulers' states, and of what they wrote into the optimizers' groups. Taking it changes nothing."""

    def __init__(self, scheduler: Any, optimizers: Sequence[Optimizer]) -> None:
        self._schedulers = [(item, _copied_state(item)) for item in _each(scheduler)]
        self._groups = [
            (optimizer, [_options_of(group) for group in optimizer.param_groups]) for optimizer in optimizers
        ]

    def restore(self) -> None:
        """The schedule stands where it did when it was built. `ConfigError` if a state could not be copied then."""
        for item, saved in self._schedulers:
            if saved is None:
                raise ConfigError(
                    f"scheduler='fresh': the state of {type(item).__name__} could not be copied when the TrainState was made. "
                    "Use scheduler='keep' and set the schedule yourself"
                )
        for optimizer, groups in self._groups:
            for group, saved in zip(optimizer.param_groups, groups, strict=False):
                for name, value in saved.items():
                    _set(group, name, value)
        for item, saved in self._schedulers:
            # A scheduler may keep what it is given, and a leg may begin more than once.
            item.load_state_dict(copy.deepcopy(saved))


def _each(scheduler: Any) -> list[Any]:
    if scheduler is None:
        return []
    return list(scheduler.values()) if isinstance(scheduler, Mapping) else [scheduler]


def _copied_state(scheduler: Any) -> Any:
    try:
        return copy.deepcopy(scheduler.state_dict())
    except Exception:  # noqa: BLE001 - any object may be in there; only a fresh schedule needs the copy, and says so then
        return None


def _options_of(group: dict[str, Any]) -> dict[str, Any]:
    names = (*_RATES, *_CYCLED) if "max_momentum" in group else _RATES
    return {name: copy.deepcopy(group[name]) for name in names if name in group}


def _set(group: dict[str, Any], name: str, value: Any) -> None:
    live = group.get(name)
    if isinstance(live, torch.Tensor):
        # A captured step reads the rate from this memory.
        live.fill_(value)
    else:
        group[name] = copy.deepcopy(value)
