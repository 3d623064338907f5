"""User objects of any kind as values and tensors: modules, things with `state_dict`, containers, tensors, plain values.

Each object becomes a record {"kind": ..., "state": ...}; several under keys become {"kind": "several", "state": {key:
record}}. The kind is part of the record, so that a mapping of loaders is never taken for one loader's state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from dckpt.errors import ConfigError
from dckpt.state import model
from dckpt.state.naming import ensure_key, is_same_memory
from dckpt.state.planner import Planner
from dckpt.state.records import NamedTensor
from dckpt.state.tree import flatten, live_tensors, tensor_names, unflatten


@dataclass(slots=True)
class Collected:
    """Tensors and ties found so far."""

    tensors: list[NamedTensor] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)


@runtime_checkable
class Stateful(Protocol):
    """Anything that gives its state as nested plain values and tensors, and takes it back."""

    def state_dict(self) -> dict[str, Any]:
        """The state; not kept, not changed."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Take the state back."""


def kind_of(obj: object) -> str:
    """Which of the kinds below an object is."""
    if isinstance(obj, nn.Module):
        return "module"
    if isinstance(obj, Stateful):
        return "stateful"
    if isinstance(obj, torch.Tensor):
        return "tensor"
    if isinstance(obj, Mapping):
        holders = [isinstance(value, (nn.Module, Stateful)) for value in obj.values()]
        return "several" if holders and all(holders) else "dict"
    if isinstance(obj, list):
        return "list"
    return "value"


def capture_holder(obj: Any, collected: Collected, *, name: str, what: str) -> dict[str, Any]:
    """The object's record; its tensors go into `collected` under `name`."""
    kind = kind_of(obj)
    if kind == "several":
        records = {
            ensure_key(key, what=what): capture_holder(item, collected, name=f"{name}.{key}", what=f"{what}[{key!r}]")
            for key, item in obj.items()
        }
        return {"kind": kind, "state": records}
    if kind == "module":
        state = model.read_module(model.ensure_supported(obj, what=what), prefix=f"{name}.")
        tensors, extra = model.capture_module(state, what=what)
        collected.tensors += tensors
        collected.aliases.update(state.aliases)
        return {"kind": kind, "state": extra}
    if kind == "stateful":
        value, path = obj.state_dict(), f"{what}.state_dict()"
    else:
        value, path = dict(obj) if kind == "dict" else obj, what
    flat = flatten(value, name=name, path=path)
    collected.tensors += model.named(flat)
    record: dict[str, Any] = {"kind": kind, "state": flat.tree}
    if isinstance(enabled := _enabled(obj), bool):
        # A disabled GradScaler gives {}, which must not be taken for a lost state.
        record["enabled"] = enabled
    return record


def _enabled(obj: object) -> bool | None:
    is_enabled = getattr(obj, "is_enabled", None)
    return is_enabled() if callable(is_enabled) and kind_of(obj) == "stateful" else None


def plan_holder(
    obj: Any,
    record: Any,
    planner: Planner,
    *,
    name: str,
    what: str,
    is_fixed: bool = False,
    replace: Callable[[Any], None] | None = None,
) -> None:
    """Plan the way back into `obj`. `replace` takes the value of an object that cannot be changed in place.

    `is_fixed`: a mapping of tensors is restored tensor by tensor like a model, not replaced as a whole.
    """
    component = name
    kind, saved_kind = kind_of(obj), planner.field(record, "kind", str, component=component)
    if kind == "dict" and saved_kind == "several" and not obj:
        kind = saved_kind
    if kind != saved_kind:
        planner.consume(planner.unconsumed(name))
        planner.differ(f"{name}: a {saved_kind} in the checkpoint, a {kind} live")
        return
    if kind == "several":
        _plan_several(obj, record, planner, name=name, what=what)
        return
    if kind == "module":
        extra = planner.field(record, "state", dict, component=component)
        state = model.read_module(model.ensure_supported(obj, what=what), prefix=f"{name}.")
        model.plan_module(state, planner, extra, component=name, what=what)
        model.plan_unexpected(planner, state.names(), component=name, what=what)
        return
    tree = record.get("state")
    if kind == "stateful":
        _plan_stateful(obj, record, tree, planner, name=name, what=what)
    elif kind == "dict" and is_fixed:
        _plan_tensors(obj, tree, planner, name=name, what=what)
    else:
        _plan_container(obj, kind, tree, planner, name=name, what=what, replace=replace)
    for left in planner.unconsumed(name):
        planner.unexpected(left, f"in the checkpoint, not in the {what}")


def _plan_several(obj: Mapping[str, Any], record: Any, planner: Planner, *, name: str, what: str) -> None:
    saved = planner.field(record, "state", dict, component=name)
    for key, item in obj.items():
        if key in saved:
            plan_holder(item, saved[key], planner, name=f"{name}.{key}", what=f"{what}[{key!r}]")
        else:
            planner.missing(f"{name}.{key}", f"in the {what}, not in the checkpoint")
    for key in sorted(set(saved) - set(obj)):
        planner.consume(planner.unconsumed(f"{name}.{key}"))
        planner.unexpected(f"{name}.{key}", f"in the checkpoint, not in the {what}")


def _plan_stateful(obj: Any, record: Any, tree: Any, planner: Planner, *, name: str, what: str) -> None:
    saved_enabled, enabled = record.get("enabled"), _enabled(obj)
    if isinstance(enabled, bool) and isinstance(saved_enabled, bool) and enabled != saved_enabled:
        was, now = ("enabled", "disabled") if saved_enabled else ("disabled", "enabled")
        planner.unexpected(name, f"{was} in the checkpoint, {now} live: its state would be lost")
    # Asking for the live state may build iterators or draw random numbers; only tensors make it worth that.
    present = live_tensors(obj.state_dict(), name=name, path=what) if tensor_names(tree) else {}
    # The object decides what to do with the tensors, so it gets new ones.
    value = unflatten(tree, planner.fetcher(present, in_place=False))
    differences = getattr(obj, "differences", None)
    if callable(differences):
        # Asked before anything live changes: a position in another order must not fail a load that is half done.
        for text in differences(value):
            planner.differ(f"{name}: {text}")
    planner.plan.actions.append(lambda: obj.load_state_dict(value))


def _plan_container(
    obj: Any, kind: str, tree: Any, planner: Planner, *, name: str, what: str, replace: Callable[[Any], None] | None
) -> None:
    if kind == "tensor":
        planner.into(name, obj, label=name)
        return
    present = live_tensors(dict(obj) if kind == "dict" else obj, name=name, path=what)
    in_place = set(tensor_names(tree)) & set(present)
    value = unflatten(tree, lambda saved: planner.fetch(saved, live=present.get(saved), in_place=saved in in_place))
    if kind == "dict" and not isinstance(obj, MutableMapping):
        raise ConfigError(f"{what}: the mapping {type(obj).__name__} cannot be changed. Pass a dict")
    if kind == "dict":
        planner.plan.actions.append(lambda: _refill(obj, value))
    elif kind == "list":
        planner.plan.actions.append(lambda: obj.__setitem__(slice(None), value))
    elif replace is not None:
        planner.plan.actions.append(lambda: replace(value))


def _plan_tensors(obj: Mapping[str, Any], tree: Any, planner: Planner, *, name: str, what: str) -> None:
    saved = set(tensor_names(tree))
    for live_name, tensor in live_tensors(dict(obj), name=name, path=what).items():
        if live_name in saved:
            planner.into(live_name, tensor, label=live_name)
        else:
            planner.missing(live_name, f"in the {what}, not in the checkpoint")


def _refill(live: MutableMapping[Any, Any], value: dict[Any, Any]) -> None:
    # A tensor that was read in place stays the object that the caller may hold elsewhere.
    kept = {
        key: live[key]
        for key, item in value.items()
        if isinstance(item, torch.Tensor)
        and isinstance(live.get(key), torch.Tensor)
        and is_same_memory(item, live[key])
    }
    live.clear()
    live.update({**value, **kept})
