"""Gradients in the middle of an accumulation: read where torch shows them, refused by name where it hides them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dckpt.errors import ConfigError
from dckpt.format.accumulation import GRADIENTS
from dckpt.state.model import parameter_names
from dckpt.state.naming import ensure_storable, loaded_class, walk
from dckpt.state.planner import Planner, empty_beside
from dckpt.state.records import NamedTensor


def parameters_by_name(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Every parameter under its canonical name over all models; a tied one under its first."""
    names = parameter_names(modules)
    found: dict[str, nn.Parameter] = {}
    for module in modules.values():
        for site in walk(module):
            for param in site.module._parameters.values():
                if param is not None:
                    found.setdefault(names[id(param)], param)
    return found


def capture_gradients(modules: Mapping[str, nn.Module], *, micro_step: int) -> tuple[list[NamedTensor], dict[str, Any]]:
    """The gradients of `micro_step` micro-batches, and the value that says which parameters have one.

    A DTensor was reduced when it was made, so its value is the same for all and can be cut anew. A plain gradient may be one
    rank's own (DDP under `no_sync`): it is compared over the ranks, and kept by rank where it differs. Raises
    `ConfigError` where gradients lie out of reach, or there are none.
    """
    obstacle = gradient_obstacle(modules)
    if obstacle is not None:
        raise ConfigError(
            f"Save at micro-step {micro_step}: {obstacle}. Save after optimizer.step() and progress.advance(); or let the "
            'micro-batches go: save(state, gradients="drop").'
        )
    tensors: list[NamedTensor] = []
    names: list[str] = []
    for name, param in parameters_by_name(modules).items():
        grad = param.grad
        if grad is None:
            continue
        stored = f"{GRADIENTS}.{name}"
        ensure_storable(grad, name=stored)
        tensors.append(NamedTensor(stored, grad, "sharded" if isinstance(grad, DTensor) else "checked"))
        names.append(name)
    if not names:
        raise ConfigError(
            f"Save at micro-step {micro_step}: expected gradients of the micro-batches so far, found none on any parameter. "
            "Call progress.accumulate() after each backward(), and progress.advance() after each optimizer.step()."
        )
    return tensors, {"micro_step": micro_step, "names": names}


def gradient_obstacle(modules: Mapping[str, nn.Module]) -> str | None:
    """Why the gradients so far cannot be saved, None if they can.

    FSDP2 keeps what it does not reduce out of `.grad`, unsharded, in objects of its own:
    torch/distributed/fsdp/_fully_shard/_fsdp_param.py, `unsharded_accumulated_grad` and the gradient of `_unsharded_param`;
    under HSDP what was not reduced over all axes yet, in `_fsdp_param_group.py`, `_partial_reduce_output`.
    """
    names = parameter_names(modules)
    for prefix, module in modules.items():
        for site in walk(module):
            for group in _fsdp_groups(site.module):
                if getattr(group, "_partial_reduce_output", None) is not None:
                    where = f"{prefix}{site.prefix}".rstrip(".") or type(site.module).__name__
                    return _hidden(f"module {where}", "set_requires_all_reduce(False)")
                for param in group.fsdp_params:
                    if _is_hiding(param):
                        where = names.get(id(param.sharded_param), f"a parameter of {prefix}{site.prefix}")
                        return _hidden(where, "set_requires_gradient_sync(False)")
    return None


def _fsdp_groups(module: nn.Module) -> list[Any]:
    fsdp = loaded_class("torch.distributed.fsdp", "FSDPModule")
    if fsdp is None or not isinstance(module, fsdp):
        return []
    state: Any = module._get_fsdp_state()  # type: ignore[operator]
    # One group a module in older versions of torch, several in newer ones.
    groups = getattr(state, "_fsdp_param_groups", None)
    return [group for group in (groups or [getattr(state, "_fsdp_param_group", None)]) if group is not None]


def _is_hiding(param: Any) -> bool:
    unsharded = getattr(param, "_unsharded_param", None)
    kept = getattr(param, "unsharded_accumulated_grad", None)
    return kept is not None or (unsharded is not None and unsharded.grad is not None)


def _hidden(where: str, by: str) -> str:
    return f"{where}: gradients were not reduced yet ({by}), and FSDP2 keeps them to itself until they are"


def clear_gradients(modules: Mapping[str, nn.Module]) -> None:
    """No parameter has a gradient: what a state was that was saved between two steps."""
    for param in parameters_by_name(modules).values():
        param.grad = None


def plan_gradients(modules: Mapping[str, nn.Module], record: Any, planner: Planner, *, converts: bool) -> None:
    """Plan that the parameters have exactly the saved gradients, and the others none. `converts`: to the live dtype."""
    params = parameters_by_name(modules)
    grads: list[tuple[nn.Parameter, torch.Tensor]] = []
    for name in planner.strings(record, "names", component=GRADIENTS):
        stored = f"{GRADIENTS}.{name}"
        param = params.get(name)
        if param is None:
            planner.consume([stored])
            planner.unexpected(stored, "in the checkpoint, and no parameter of this name is live")
        elif not param.requires_grad:
            planner.consume([stored])
            planner.unexpected(stored, "in the checkpoint, and the parameter is not trained now")
        elif planner.fits(stored, param, label=stored, is_any_dtype=True):
            grads.append((param, planner.fresh(stored, label=stored, make=partial(empty_beside, param))))
    for left in planner.unconsumed(GRADIENTS):
        planner.unexpected(left, "in the checkpoint, and its values do not name it")

    def attach() -> None:
        clear_gradients(modules)
        for param, grad in grads:
            param.grad = grad.to(param.dtype) if converts else grad

    planner.plan.actions.append(attach)
