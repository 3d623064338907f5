"""Optimizer state by parameter name, walked directly.

torch's helpers take a real step on a fresh optimizer (hooks fire, moments move) and return nothing while gradients are
live; nothing here steps, fires a hook or looks at `.grad`. Parameters and groups are matched by name, never by position.

The record of one optimizer::

    {"class": "AdamW",
     "groups": [{"names": [fqn, ...], "options": {"lr": ..., ...}}],
     "states": [{"params": [fqn, ...], "tree": {...}, "layout": {path: {...}}}],     one entry per distinct structure
     "shared": {key: tree}}                                                          state under keys that are no tensors

Tensor references in "tree" are relative: `exp_avg` stands for `optim.<fqn>.exp_avg`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor import empty as empty_dtensor
from torch.optim import Optimizer

from dckpt.errors import ConfigError
from dckpt.format.values import encode_value
from dckpt.state.model import named
from dckpt.state.naming import detached, ensure_storable, is_same_memory, loaded_class
from dckpt.state.planner import Planner
from dckpt.state.records import NamedTensor, Replication
from dckpt.state.tree import flatten, live_tensors, tensor_names, unflatten

# How the kernels run, not what they compute: the job that loads chooses, and its tensors follow.
_IMPLEMENTATION_OPTIONS = frozenset({"foreach", "fused", "capturable", "differentiable"})
_NOT_STORED = frozenset({"params", "param_names"})


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """One live optimizer and the names of its parameters."""

    optimizer: Optimizer
    prefix: str
    """"optim" or "optim.<key>"."""
    names: Mapping[int, str]
    """id -> parameter name."""
    replicated: frozenset[int]
    """Ids of the parameters that DDP keeps equal."""

    @property
    def entries(self) -> dict[Any, Any]:
        """The optimizer's state by parameter; some optimizers keep more under string keys."""
        return self.optimizer.state

    @property
    def groups(self) -> list[list[tuple[str, torch.Tensor]]]:
        """Name and parameter, per group, in the optimizer's order."""
        return [
            [(self._name(param, g, i), param) for i, param in enumerate(group["params"])]
            for g, group in enumerate(self.optimizer.param_groups)
        ]

    def _name(self, param: torch.Tensor, group: int, position: int) -> str:
        name = self.names.get(id(param))
        if name is None:
            raise ConfigError(
                f"{self.prefix}: parameter {position} of group {group} (shape {tuple(param.shape)}) belongs to no "
                "model of the TrainState. Pass the model that owns it, and build the optimizer after the model is "
                "wrapped (fully_shard replaces parameters)"
            )
        return name


def ensure_supported(optimizer: object, *, what: str) -> Optimizer:
    """Refuse what is no torch Optimizer, and optimizers whose state is spread over the ranks unseen."""
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"{what}: expected a torch.optim.Optimizer or a Mapping of them, found {type(optimizer).__name__}. "
            "Pass anything else that has state_dict and load_state_dict as extra={...}"
        )
    zero = loaded_class("torch.distributed.optim.zero_redundancy_optimizer", "ZeroRedundancyOptimizer")
    if zero is not None and isinstance(optimizer, zero):
        raise ConfigError(
            f"{what}: ZeroRedundancyOptimizer keeps each rank's part of the state to itself and needs collectives to "
            "gather it. Shard with torch.distributed.fsdp.fully_shard and a plain optimizer"
        )
    return optimizer


def capture_optimizer(state: OptimizerState) -> tuple[list[NamedTensor], dict[str, Any]]:
    """The optimizer's tensors, and its record. Nothing in the optimizer changes, not even empty entries appear."""
    tensors: list[NamedTensor] = []
    groups: list[dict[str, Any]] = []
    for g, (members, group) in enumerate(zip(state.groups, state.optimizer.param_groups, strict=True)):
        options = {key: value for key, value in group.items() if key not in _NOT_STORED}
        flat = flatten(options, name=_group_name(state, g), path=f"{state.prefix}.param_groups[{g}]")
        tensors += named(flat)
        groups.append({"names": [name for name, _ in members], "options": flat.tree})
    states, state_tensors = _capture_states(state)
    tensors += state_tensors
    shared: dict[str, Any] = {}
    members_ids = {id(param) for group in state.groups for _, param in group}
    for key, value in state.entries.items():
        if isinstance(key, torch.Tensor):
            if id(key) not in members_ids:
                raise ConfigError(
                    f"{state.prefix}: it holds state for a tensor of shape {tuple(key.shape)} that is in none of its "
                    "groups. Build a new optimizer after replacing parameters"
                )
            continue
        flat = flatten(value, name=f"{state.prefix}.shared_state.{key}", path=f"{state.prefix}.state[{key!r}]")
        tensors += named(flat)
        shared[_shared_key(key, state)] = flat.tree
    record = {"class": type(state.optimizer).__name__, "groups": groups, "states": states, "shared": shared}
    return tensors, record


def _group_name(state: OptimizerState, group: int) -> str:
    return f"{state.prefix}.param_groups.{group}"


def _shared_key(key: object, state: OptimizerState) -> str:
    if type(key) is not str:
        raise ConfigError(f"{state.prefix}: state under the key {key!r}; use a parameter or a string as key")
    return key


def _capture_states(state: OptimizerState) -> tuple[list[dict[str, Any]], list[NamedTensor]]:
    tensors: list[NamedTensor] = []
    templates: dict[Hashable, dict[str, Any]] = {}
    for members in state.groups:
        for fqn, param in members:
            held = state.optimizer.state.get(param)
            if not held:
                continue
            path = f"{state.prefix}.state[{fqn}]"
            # The usual state, tensors by name, has nothing to take apart or to encode: thousands of them at each save.
            flat = None if _is_plain(held) else flatten(held, name="", path=path)
            layouts = {}
            for relative, tensor in (held if flat is None else flat.tensors).items():
                name = f"{state.prefix}.{fqn}.{relative}"
                ensure_storable(tensor, name=name)
                layouts[relative] = _layout(relative, tensor, param)
                tensors.append(NamedTensor(name, detached(tensor), _replication(relative, tensor, param, state)))
            encoded = "" if flat is None else json.dumps(encode_value(flat.tree, path=path))
            key = (encoded, *layouts.items())
            if key not in templates:
                tree = flatten(held, name="", path=path).tree
                layout = {relative: found.to_json() for relative, found in layouts.items()}
                templates[key] = {"params": [], "tree": tree, "layout": layout}
            templates[key]["params"].append(fqn)
    return list(templates.values()), tensors


def _is_plain(held: Any) -> bool:
    """Whether the state of a parameter is a dict of tensors by name and nothing else."""
    return type(held) is dict and all(
        type(key) is str and isinstance(value, torch.Tensor) for key, value in held.items()
    )


def _replication(relative: str, tensor: torch.Tensor, param: torch.Tensor, state: OptimizerState) -> Replication:
    if isinstance(tensor, DTensor):
        return "sharded"
    if id(param) in state.replicated and _is_like(relative, tensor, param):
        return "trusted"
    return "checked"


def _is_like(relative: str, tensor: torch.Tensor, param: torch.Tensor) -> bool:
    # A counter is no moment, even of a parameter that is itself a scalar.
    is_counter = tensor.ndim == 0 and relative.rpartition(".")[2] == "step"
    return not is_counter and tensor.shape == param.shape and isinstance(tensor, DTensor) == isinstance(param, DTensor)


@dataclass(frozen=True, slots=True)
class Layout:
    """What a fresh optimizer needs to make one state tensor again."""

    like: bool
    """Laid out as the parameter is."""
    device: str
    """"param": where the parameter lives. "cpu": there although the parameter is elsewhere. "any": everything was on
    the CPU, so that the two cannot be told apart."""
    placements: tuple[str, ...] | None
    """Of a DTensor; None for a plain tensor."""
    beside: str
    """What the parameter was: "dtensor" or "plain"."""

    def to_json(self) -> dict[str, Any]:
        """As it stands in the record."""
        placements = None if self.placements is None else list(self.placements)
        return {"like": self.like, "device": self.device, "placements": placements, "beside": self.beside}


def _layout(relative: str, tensor: torch.Tensor, param: torch.Tensor) -> Layout:
    like = _is_like(relative, tensor, param)
    on, home = tensor.device.type, param.device.type
    device = "any" if on == home == "cpu" else "cpu" if on == "cpu" else "param"
    placements = tuple(_placement_name(p) for p in tensor.placements) if isinstance(tensor, DTensor) else None
    return Layout(like, device, placements, "dtensor" if isinstance(param, DTensor) else "plain")


def _placement_name(placement: Placement) -> str:
    return f"S({placement.dim})" if isinstance(placement, Shard) else "R"


def _placement(name: str) -> Placement:
    found = re.fullmatch(r"S\(([0-9])\)", name)
    # Replicate is right for every value; it only costs memory.
    return Shard(int(found[1])) if found else Replicate()


def _parse_layout(record: Any, planner: Planner) -> Layout:
    placements = record.get("placements") if isinstance(record, dict) else None
    if placements is not None:
        placements = tuple(planner.strings(record, "placements", component="optim"))
    return Layout(
        planner.field(record, "like", bool, component="optim"),
        planner.field(record, "device", str, component="optim"),
        placements,
        planner.field(record, "beside", str, component="optim"),
    )


class OptimizerPlan:
    """Plans the way into one optimizer. The planner gets reads and differences at once; `attach` runs at apply."""

    def __init__(self, state: OptimizerState, record: dict[str, Any], planner: Planner) -> None:
        self._state = state
        self._planner = planner
        self._optimizer = state.optimizer
        self._label = state.prefix
        self._new_states: list[tuple[torch.Tensor, dict[str, Any]]] = []
        self._new_options: list[tuple[int, dict[str, Any]]] = []
        self._new_shared: dict[str, Any] = {}
        self._taken: dict[int, torch.Tensor] = {}
        self.is_reordered = False
        """Groups stand in another order than saved: what a scheduler keeps by position would go astray."""
        self._plan_class(record)
        self._plan_groups(planner.field(record, "groups", list, component="optim"))
        self._plan_states(planner.field(record, "states", list, component="optim"))
        self._plan_shared(planner.field(record, "shared", dict, component="optim"))

    def attach(self) -> None:
        """Put states and options in place; parameters without saved state lose theirs."""
        attached = {id(param) for param, _ in self._new_states}
        for param, tree in self._new_states:
            held = self._optimizer.state[param]
            held.clear()
            held.update(tree)
        for members in self._state.groups:
            for _, param in members:
                if id(param) not in attached and id(param) not in self._kept:
                    self._optimizer.state.pop(param, None)
        entries = self._state.entries
        for key in [key for key in entries if not isinstance(key, torch.Tensor)]:
            entries.pop(key)
        entries.update(self._new_shared)
        self._set_options()

    def reassert_options(self) -> None:
        """Set learning rates and all other options again, for a scheduler's load may have moved them."""
        self._set_options()

    def _set_options(self) -> None:
        for index, options in self._new_options:
            self._optimizer.param_groups[index].update(options)

    def _plan_class(self, record: dict[str, Any]) -> None:
        saved = self._planner.field(record, "class", str, component="optim")
        live = type(self._optimizer).__name__
        if saved != live:
            self._planner.unexpected(f"{self._label}.class", f"saved by {saved}, the live optimizer is {live}")

    def _plan_groups(self, saved_groups: list[Any]) -> None:
        planner = self._planner
        group_of: dict[str, int] = {}
        empty: list[int] = []
        for index, group in enumerate(saved_groups):
            names = planner.strings(group, "names", component="optim")
            group_of.update((name, index) for name in names)
            if not names:
                empty.append(index)
        self._group_of = group_of
        self._kept: set[int] = set()
        used: dict[int, int] = {}
        live_names: set[str] = set()
        for index, members in enumerate(self._state.groups):
            live_names.update(name for name, _ in members)
            source = self._source_group(index, members, group_of, empty)
            if source is None:
                continue
            if source in used:
                planner.differ(
                    f"{self._label}: saved group {source} is split over the live groups {used[source]} and {index}. "
                    "Build the groups as they were saved"
                )
            used[source] = index
            self.is_reordered |= source != index
            self._plan_options(index, source, planner.field(saved_groups[source], "options", dict, component="optim"))
        for name in sorted(set(group_of) - live_names):
            prefix = f"{self._label}.{name}."
            planner.consume(n for n in planner.saved if n.startswith(prefix))
            planner.unexpected(f"{self._label}.{name}", "no longer in the optimizer (frozen or removed?)")
        for source in sorted(set(range(len(saved_groups))) - set(used)):
            prefix = f"{self._label}.param_groups.{source}."
            planner.consume(n for n in planner.saved if n.startswith(prefix))

    def _source_group(
        self, index: int, members: list[tuple[str, torch.Tensor]], group_of: dict[str, int], empty: list[int]
    ) -> int | None:
        if not members:
            return empty.pop(0) if empty else None
        sources: dict[int, str] = {}
        for name, param in members:
            if name in group_of:
                sources.setdefault(group_of[name], name)
            else:
                self._kept.add(id(param))
                self._planner.missing(f"{self._label}.{name}", "in the optimizer, not in the checkpoint's")
        if len(sources) > 1:
            listed = ", ".join(f"{name} from saved group {group}" for group, name in sorted(sources.items()))
            self._planner.differ(f"{self._label}: live group {index} joins several: {listed}. Split it as saved")
        return min(sources) if sources else None

    def _plan_options(self, index: int, source: int, saved: dict[str, Any]) -> None:
        live_group = self._optimizer.param_groups[index]
        live_options = {key: value for key, value in live_group.items() if key not in _NOT_STORED}
        label = f"{self._label}.param_groups[{index}]"
        # References carry the saved group's number, live tensors are looked up under the same key and path.
        present = live_tensors(live_options, name=f"{self._label}.param_groups.{source}", path=label)
        options: dict[str, Any] = {}
        for key, tree in saved.items():
            if key in _IMPLEMENTATION_OPTIONS:
                self._planner.consume(tensor_names(tree))
                continue
            was_tensor, is_tensor = bool(tensor_names(tree)), isinstance(live_options.get(key), torch.Tensor)
            if key in live_options and was_tensor != is_tensor and not isinstance(live_options[key], (list, tuple)):
                was, now = ("a tensor", "a number") if was_tensor else ("a number", "a tensor")
                self._planner.unexpected(f"{label}.{key}", f"{was} in the checkpoint, {now} in the live optimizer")
            options[key] = unflatten(tree, self._planner.fetcher(present, in_place=True))
            if is_tensor and isinstance(options[key], torch.Tensor):
                options[key] = _same_object(options[key], live_options[key])
        self._new_options.append((index, options))

    def _plan_states(self, templates: list[Any]) -> None:
        live = {name: (param, g) for g, members in enumerate(self._state.groups) for name, param in members}
        for template in templates:
            tree = self._planner.field(template, "tree", dict, component="optim")
            records = self._planner.field(template, "layout", dict, component="optim")
            layout = {path: _parse_layout(record, self._planner) for path, record in records.items()}
            for fqn in self._planner.strings(template, "params", component="optim"):
                if fqn in live:
                    param, group = live[fqn]
                    self._plan_param(fqn, param, self._optimizer.param_groups[group], tree, layout)

    def _plan_param(
        self, fqn: str, param: torch.Tensor, group: dict[str, Any], tree: dict[str, Any], layout: dict[str, Layout]
    ) -> None:
        held = self._optimizer.state.get(param)
        label = f"{self._label}.{fqn}"
        present = live_tensors(held, name="", path=label) if held else {}

        def fetch(relative: str) -> torch.Tensor:
            saved = f"{label}.{relative}"
            found = self._planner.saved.get(saved)
            # A hostile record may name a tensor without a layout: then it is a plain tensor of its own.
            record = layout.get(relative, Layout(like=False, device="any", placements=None, beside="dtensor"))
            if record.like and found is not None and tuple(found[1]) != tuple(param.shape):
                self._planner.consume([saved])
                self._planner.differ(f"{saved}: shape {found[1]} in the checkpoint, {tuple(param.shape)} live")
                return torch.empty(0)
            current = present.get(relative)
            if current is not None and id(held_tensor := _held(held, relative, current)) not in self._taken:
                # One tensor shared by several parameters is filled once; the others get their own.
                self._taken[id(held_tensor)] = held_tensor
                if found is not None and tuple(found[1]) == tuple(current.shape):
                    self._planner.into(saved, current, label=saved)
                    return held_tensor
            return self._planner.fresh(
                saved, label=saved, make=lambda shape, dtype: _allocate(relative, shape, dtype, param, group, record)
            )

        self._new_states.append((param, unflatten(tree, fetch)))

    def _plan_shared(self, shared: dict[str, Any]) -> None:
        for key, tree in shared.items():
            name = f"{self._label}.shared_state.{key}"
            held = self._state.entries.get(key)
            present = live_tensors(held, name=name, path=name) if held is not None else {}
            self._new_shared[key] = unflatten(tree, self._planner.fetcher(present, in_place=True))


def _held(held: Any, relative: str, detached: torch.Tensor) -> torch.Tensor:
    """The state's own tensor object where it lies at the top level, so that its identity survives; else a view of it."""
    found = held.get(relative) if isinstance(held, dict) else None
    return found if isinstance(found, torch.Tensor) else detached


def _same_object(read: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    # The read goes into the live tensor's memory through a detached view; the optimizer keeps its own object, which
    # compiled and captured steps hold on to.
    return live if is_same_memory(read, live) else read


def _allocate(
    relative: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    param: torch.Tensor,
    group: dict[str, Any],
    record: Layout,
) -> torch.Tensor:
    param = param.detach()
    if record.like:
        return torch.empty_like(param, dtype=dtype)
    if isinstance(param, DTensor) and (record.placements is not None or (shape and record.beside == "plain")):
        # What an optimizer derives from a DTensor gradient is a DTensor; saved beside a plain parameter it was plain.
        return _empty_dtensor(shape, dtype, param, record.placements or ())
    local = param.to_local() if isinstance(param, DTensor) else param
    return torch.empty(shape, dtype=dtype, device=_device(relative, shape, group, record, local.device))


def _empty_dtensor(shape: tuple[int, ...], dtype: torch.dtype, param: DTensor, placements: tuple[str, ...]) -> DTensor:
    mesh = param.device_mesh
    # On a mesh of other axes the recorded placements mean nothing.
    chosen = [_placement(name) for name in placements] if len(placements) == mesh.ndim else [Replicate()] * mesh.ndim
    return empty_dtensor(*shape, dtype=dtype, device_mesh=mesh, placements=chosen)


def _device(
    relative: str, shape: tuple[int, ...], group: dict[str, Any], record: Layout, home: torch.device
) -> torch.device:
    recorded = record.device
    if recorded == "any" and relative == "step" and not shape:
        # torch's own rule: the counter is on the CPU unless the kernel needs it beside the parameter.
        recorded = "param" if group.get("fused") or group.get("capturable") else "cpu"
    return torch.device("cpu") if recorded == "cpu" else home
