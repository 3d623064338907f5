"""Everything that belongs to a training run on one rank, as digests: to prove that something changed nothing of it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

import dckpt
from dckpt.format.checksum import digest_bytes


def digests_of(state: dckpt.TrainState) -> dict[str, str]:
    """Name -> digest: tensors with buffers that nobody saves, gradients, flags, options, counters, schedules, streams."""
    found: dict[str, str] = {}
    for prefix, model in state.models().items():
        for name, module in model.named_modules():
            found[f"mode {prefix}{name}"] = str((module.training, getattr(module, "p", None)))
        for name, parameter in model.named_parameters(remove_duplicate=False):
            found[f"parameter {prefix}{name}"] = f"{id(parameter)} {parameter.requires_grad} {_digest(parameter)}"
            found[f"gradient {prefix}{name}"] = "none" if parameter.grad is None else _digest(parameter.grad)
        for name, buffer in model.named_buffers(remove_duplicate=False):
            found[f"buffer {prefix}{name}"] = f"{id(buffer)} {_digest(buffer)}"
    for number, optimizer in enumerate(state.optimizers):
        found[f"groups {number}"] = str(_plain(optimizer.param_groups))
        found[f"optimizer {number}"] = str(_plain(list(optimizer.state.items())))
        found[f"hooks {number}"] = str((len(optimizer._optimizer_step_post_hooks), len(vars(optimizer))))
    for name in ("scheduler", "scaler", "data", "progress", "ema", "extra"):
        found[name] = str(_plain(getattr(state, name)))
    found["random"] = str(
        (
            digest_bytes(repr(random.getstate()).encode()),
            digest_bytes(repr(np.random.get_state()).encode()),
            _digest(torch.get_rng_state()),
            [(name, _plain(getattr(found, "get_state", lambda: None)())) for name, found in state.generators.items()],
        )
    )
    return found


def _digest(tensor: torch.Tensor) -> str:
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
    if local.device.type == "meta":
        return "meta"
    data = local.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{local.dtype}{tuple(local.shape)}{digest_bytes(data)}"


def _plain(value: Any, depth: int = 0) -> Any:
    """Attributes and items all the way down, tensors as digests, each object once by its place."""
    if isinstance(value, torch.Tensor):
        return _digest(value)
    if isinstance(value, dict):
        return {str(_plain(key, depth + 1)): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, (int, float, str, bytes, bool, type(None))) or depth > 6:
        return value if not hasattr(value, "__dict__") else type(value).__name__
    if isinstance(value, torch.optim.Optimizer):
        return id(value)  # looked at by itself
    if hasattr(value, "state_dict") and not isinstance(value, torch.nn.Module):
        return [type(value).__name__, _plain(value.state_dict(), depth + 1), _plain(_attributes(value), depth + 1)]
    if isinstance(value, torch.nn.Module):
        return _plain(value.state_dict(), depth + 1)
    return type(value).__name__


def _attributes(value: Any) -> dict[str, Any]:
    return {name: item for name, item in vars(value).items() if not callable(item)}
