"""Saves that finish copying behind forward and backward: which tensors may wait, and who is held up until they are copied."""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_pre_hooks, register_optimizer_step_pre_hook

from dckpt.engine.deferred import DeferredCopies
from dckpt.state.naming import storage_address

log = logging.getLogger(__name__)


class StepGate:
    """Holds up optimizers until the copies of the last save are done.

    The hook is torch's for all optimizers, kept in front of every other: a hook of the trainer that runs first could
    change parameters which are still being copied.
    """

    def __init__(self) -> None:
        self._copies: DeferredCopies | None = None
        self._owners: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._handle = register_optimizer_step_pre_hook(self._hook())
        self._told: set[str] = set()

    def _hook(self) -> Callable[..., None]:
        reference = weakref.ref(self)

        # Never traced into a compiled step: there it would run once, at compile time.
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def before_step(optimizer: Optimizer, *_: Any) -> None:
            gate = reference()
            if gate is not None:
                gate.before_step(optimizer)

        return cast("Callable[..., None]", before_step)

    def close(self) -> None:
        """Takes the hook away."""
        self._handle.remove()

    def hold(self, copies: DeferredCopies, owners: Sequence[Optimizer]) -> None:
        """The next step of any of `owners` waits for `copies`."""
        hooks = cast("OrderedDict[int, Any]", _global_optimizer_pre_hooks)
        hooks.move_to_end(self._handle.id, last=False)
        with self._lock:
            self._owners = weakref.WeakSet(owners)
            self._copies = copies

    def before_step(self, optimizer: Optimizer) -> None:
        """Called by torch before `optimizer.step` does anything."""
        with self._lock:
            copies = self._copies
            if copies is None or optimizer not in self._owners:
                return
            self._copies = None
        copies.before_change()

    def tell_once(self, reason: str) -> None:
        """Logs why a save does not overlap, the first time."""
        if reason not in self._told:
            self._told.add(reason)
            log.warning("overlap=True has no effect: %s. Saves copy the whole state before they return.", reason)


def overlap_obstacle(optimizers: Sequence[Optimizer]) -> str | None:
    """Why tensors of these optimizers may change without their step hooks being asked first; None if they cannot."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    for optimizer in optimizers:
        name = type(optimizer).__name__
        if not getattr(type(optimizer).step, "hooked", False):
            return f"{name} does not call torch's step hooks"
        if _is_compiled(optimizer.step):
            return f"the step of {name} is compiled"
        for group in optimizer.param_groups:
            if group.get("capturable"):
                return f"{name} has capturable=True: a captured step is replayed without its hooks"
            if any(_steps_in_backward(param) for param in group["params"]):
                return f"a parameter of {name} has a hook that may step the optimizer in backward"
    return None


def _is_compiled(function: Any) -> bool:
    return getattr(function, "_torchdynamo_orig_callable", None) is not None


def _steps_in_backward(param: torch.Tensor) -> bool:
    return bool(getattr(param, "_post_accumulate_grad_hooks", None)) or hasattr(param, "_in_backward_optimizers")


def owned_memory(optimizers: Sequence[Optimizer]) -> frozenset[int]:
    """Addresses of the storage of every parameter and state tensor that only these optimizers change."""
    found = set()
    for optimizer in optimizers:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        states = [value for state in optimizer.state.values() for value in state.values()]
        for tensor in [*params, *states]:
            if isinstance(tensor, torch.Tensor) and not tensor.is_inference():
                found.add(storage_address(tensor))
    return frozenset(found)
