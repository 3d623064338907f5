"""Facts about optimizers, learning-rate schedules and the gradient scaler. No optimizer steps, no tensor moves."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dckpt.format.checksum import digest_bytes
from dckpt.resume.facts.schedules import horizon, next_rates, schedule_counter
from dckpt.state.optimizer import OptimizerState
from dckpt.state.rng import preserved_rng
from dckpt.state.train_state import TrainState

PLAIN = (bool, int, float, str)


def plain_number(value: Any) -> Any:
    """A number, text or flag as JSON takes it; tensors of one element on the CPU as their value, anything else as None.

    A tensor on a device is left alone: reading it would wait for the device.
    """
    if isinstance(value, torch.Tensor):
        return float(value) if value.numel() == 1 and value.device.type == "cpu" else None
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, PLAIN) or value is None:
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(item, PLAIN) for item in value):
        return [plain_number(item) for item in value]
    return None


def optimizer_facts(states: Mapping[str, OptimizerState]) -> dict[str, Any]:
    """Optimizer key -> its class and, per group, options and members. `states`: `TrainState.optimizer_states()`."""
    return {
        key: {
            "class": type(found.optimizer).__name__,
            "groups": [
                {
                    "options": {
                        name: plain_number(value)
                        for name, value in group.items()
                        if name not in ("params", "param_names") and plain_number(value) is not None
                    },
                    "count": len(members),
                    "members": digest_bytes("\n".join(sorted(name for name, _ in members)).encode()),
                }
                for members, group in zip(found.groups, found.optimizer.param_groups, strict=True)
            ],
        }
        for key, found in states.items()
    }


def step_counters(optimizer: Optimizer, *, may_wait: bool) -> list[dict[str, int]]:
    """Per group, step counter -> how many parameters have it. Counters on a device are read only if that may be waited for."""
    groups: list[dict[str, int]] = []
    for group in optimizer.param_groups:
        counted: Counter[str] = Counter()
        waiting: list[torch.Tensor] = []
        for parameter in group["params"]:
            step = optimizer.state.get(parameter, {}).get("step") if parameter in optimizer.state else None
            if isinstance(step, DTensor):
                step = step.to_local()
            if isinstance(step, torch.Tensor) and step.numel() == 1:
                if may_wait or step.device.type == "cpu":
                    waiting.append(step.detach())
            elif isinstance(step, (int, float)):
                counted[str(int(step))] += 1
        for device in {step.device for step in waiting}:
            values = torch.stack([s.reshape(()).double() for s in waiting if s.device == device]).tolist()
            counted.update(str(int(value)) if math.isfinite(value) else str(value) for value in values)
        groups.append(dict(counted))
    return groups


def scheduler_facts(state: TrainState) -> dict[str, Any]:
    """Scheduler key -> class, counter, learning rates now and after the next step, and the constants of the schedule."""
    found = {}
    for key, scheduler in by_key(state.scheduler).items():
        last_lr = getattr(scheduler, "_last_lr", None)
        found[key] = {
            "class": type(scheduler).__name__,
            "last_epoch": schedule_counter(scheduler),
            "last_lr": None if last_lr is None else [plain_number(rate) for rate in last_lr],
            "next_lr": next_rates(scheduler),
            "horizon": horizon(scheduler),
        }
    return found


def untouched_scheduler_facts(state: TrainState) -> dict[str, Any]:
    """The same, with every random stream where it was: a rate function of the user's may draw numbers."""
    if state.scheduler is None:
        return {}
    with preserved_rng(state.generators):
        return scheduler_facts(state)


def scaler_facts(state: TrainState) -> dict[str, Any]:
    """Scaler key -> its own state_dict; {} of a scaler that is switched off."""
    return {
        key: {name: plain_number(value) for name, value in scaler.state_dict().items()}
        for key, scaler in by_key(state.scaler).items()
    }


def by_key(component: Any) -> dict[str, Any]:
    """{} without it, {"": it}, or a mapping as it is."""
    if component is None:
        return {}
    return dict(component) if isinstance(component, Mapping) else {"": component}
