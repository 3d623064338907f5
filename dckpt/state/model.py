"""A module's tensors by name, as its own `state_dict` gives them, and the way back into it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dckpt.errors import ConfigError, IncompatibleStateError
from dckpt.state.naming import KeyNames, ddp_ignored, ensure_storable, loaded_class, storage_address, unwrap, walk
from dckpt.state.planner import Planner
from dckpt.state.records import NamedTensor, Replication
from dckpt.state.tree import Flat, flatten, live_tensors, unflatten

_EXTRA_STATE = "_extra_state"


@dataclass(frozen=True, slots=True)
class ModelTensor:
    """One tensor of a module's state_dict."""

    name: str
    key: str
    """Its key in the raw state_dict."""
    tensor: torch.Tensor
    replication: Replication
    is_derived: bool
    """A state_dict hook made it; writing into it would not reach the module, `load_state_dict` does."""
    is_frozen: bool


@dataclass(slots=True)
class ModuleState:
    """What a module holds now, by checkpoint name."""

    root: nn.Module
    raw: dict[str, Any]
    tensors: list[ModelTensor] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    values: dict[str, tuple[str, Any]] = field(default_factory=dict)
    """Name -> raw key and value of what is not a plain tensor: extra state, and values that hooks add."""

    def names(self) -> set[str]:
        """Every name in it."""
        return {entry.name for entry in self.tensors} | set(self.aliases) | set(self.values)


def ensure_supported(module: object, *, what: str) -> nn.Module:
    """Refuse what cannot be saved by walking it: sequences of pipeline parts, and FSDP1."""
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"{what}: expected a Module or a Mapping of Modules, found {type(module).__name__}. "
            "Pipeline parts are saved through torch.distributed.checkpoint with dckpt.DckptWriter"
        )
    fsdp1 = loaded_class("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel")
    if fsdp1 is not None and any(isinstance(child, fsdp1) for child in module.modules()):
        raise ConfigError(
            f"{what}: the module is wrapped by FSDP1 (FullyShardedDataParallel), whose state needs collectives to "
            "read. Wrap it with torch.distributed.fsdp.fully_shard, or save through torch.distributed.checkpoint "
            "with dckpt.DckptWriter"
        )
    return module


def read_module(module: nn.Module, *, prefix: str, seen: dict[int, str] | None = None) -> ModuleState:
    """The module's state_dict under canonical names. Tied tensors (one object, several names) are listed once.

    `prefix` ends with a dot. `seen` (id -> name) carries ties over several modules.
    """
    root = unwrap(module)
    # keep_vars gives the parameters themselves, so that ties show by identity; hooks (FSDP2 reshards) run.
    raw = root.state_dict(keep_vars=True)
    seen = {} if seen is None else seen
    names = KeyNames(root)
    replicated, live = _live(module)
    state = ModuleState(root, raw)
    taken: dict[str, str] = {}
    for key, value in raw.items():
        name = f"{prefix}{names.canonical(key)}"
        if name in taken:
            raise ConfigError(f"{name}: the state_dict keys {taken[name]!r} and {key!r} both get this name. Rename one")
        taken[name] = key
        is_extra = key.rpartition(".")[2] == _EXTRA_STATE
        if is_extra or not isinstance(value, torch.Tensor):
            state.values[name] = (key, value)
            continue
        ensure_storable(value, name=name)
        canonical = seen.setdefault(id(value), name)
        if canonical != name:
            state.aliases[name] = canonical
            continue
        state.tensors.append(
            ModelTensor(
                name,
                key,
                value,
                _replication(value, replicated),
                is_derived=not _is_live(value, live),
                is_frozen=isinstance(value, nn.Parameter) and not value.requires_grad,
            )
        )
    return state


def _live(module: nn.Module) -> tuple[set[int], set[int]]:
    """Ids of the parameters under DDP; ids and (negative, so that they never equal an id) storage addresses of all
    parameters and buffers."""
    replicated: set[int] = set()
    live: set[int] = set()
    for site in walk(module):
        for param in site.module._parameters.values():
            if param is not None:
                live.update((id(param), -storage_address(param)))
                if site.is_replicated:
                    replicated.add(id(param))
        for buffer in site.module._buffers.values():
            if buffer is not None:
                live.update((id(buffer), -storage_address(buffer)))
    return replicated - ddp_ignored(module), live


def _is_live(tensor: torch.Tensor, live: set[int]) -> bool:
    if id(tensor) in live:
        return True
    address = storage_address(tensor)
    return address != 0 and -address in live


def _replication(tensor: torch.Tensor, replicated: set[int]) -> Replication:
    if isinstance(tensor, DTensor):
        return "sharded"
    return "trusted" if id(tensor) in replicated else "checked"


def parameter_names(modules: Mapping[str, nn.Module]) -> dict[int, str]:
    """id -> canonical name over several modules by prefix ("" or "gen."); a tied parameter has its first name."""
    names: dict[int, str] = {}
    for prefix, module in modules.items():
        for site in walk(module):
            for name, param in site.module._parameters.items():
                if param is not None:
                    names.setdefault(id(param), f"{prefix}{site.prefix}{name}")
    return names


def replicated_parameters(module: nn.Module) -> set[int]:
    """Ids of the parameters that DDP keeps equal on all ranks."""
    return _live(module)[0]


def capture_module(state: ModuleState, *, what: str) -> tuple[list[NamedTensor], dict[str, Any]]:
    """The module's tensors, and its extra state as a tree by name (tensors in it become tensors of their own)."""
    tensors = [
        NamedTensor(
            t.name, t.tensor if isinstance(t.tensor, DTensor) else t.tensor.detach(), t.replication, t.is_frozen
        )
        for t in state.tensors
    ]
    extra: dict[str, Any] = {}
    for name, (key, value) in state.values.items():
        flat = flatten(value, name=name, path=f"{what}.state_dict()[{key!r}]")
        tensors += named(flat)
        extra[name] = flat.tree
    return tensors, extra


def named(flat: Flat) -> list[NamedTensor]:
    """The tensors of a flattened tree."""
    found = []
    for name, tensor in flat.tensors.items():
        ensure_storable(tensor, name=name)
        found.append(NamedTensor(name, tensor, "sharded" if isinstance(tensor, DTensor) else "checked"))
    return found


def plan_module(
    state: ModuleState, planner: Planner, saved_extra: dict[str, Any], *, component: str, what: str
) -> None:
    """Plan the way from the checkpoint into the module; `saved_extra` is the tree that `capture_module` gave."""
    replaced: dict[str, Any] = {}
    for entry in state.tensors:
        source = _stored_as(entry.name, planner)
        if source is None:
            planner.missing(entry.name, f"in the {what}, not in the checkpoint")
        elif entry.is_derived:
            if planner.fits(source, entry.tensor, label=entry.name):
                replaced[entry.key] = planner.fetch(source, live=entry.tensor.detach(), in_place=False)
        else:
            planner.into(source, entry.tensor, label=entry.name)
    _plan_ties(state, planner)
    for name, (key, value) in state.values.items():
        if name not in saved_extra:
            planner.missing(name, f"extra state of the {what}, not in the checkpoint")
            continue
        present = live_tensors(value, name=name, path=what)
        replaced[key] = unflatten(saved_extra[name], planner.fetcher(present, in_place=False))
    for name in sorted(set(saved_extra) - set(state.values)):
        planner.consume(n for n in planner.saved if n == name or n.startswith(f"{name}."))
        planner.unexpected(name, f"extra state in the checkpoint, not in the {what}")
    planner.plan.actions.append(lambda: _load(state, replaced, component))


def plan_unexpected(planner: Planner, live_names: Collection[str], *, component: str, what: str) -> None:
    """Note what the checkpoint holds under the component's names and nothing live asked for."""
    for name in planner.unconsumed(component):
        planner.unexpected(name, f"in the checkpoint, not in the {what}")
    for alias, canonical in sorted(planner.aliases.items()):
        if alias.startswith(f"{component}.") and alias not in live_names:
            planner.unexpected(alias, f"tied to {canonical} in the checkpoint, not in the {what}")


def _plan_ties(state: ModuleState, planner: Planner) -> None:
    for alias, canonical in state.aliases.items():
        ours, theirs = _stored_as(alias, planner), _stored_as(canonical, planner)
        if theirs is None:
            continue  # The canonical name is reported as missing already.
        if ours is None:
            planner.missing(alias, f"tied to {canonical} in the model, not in the checkpoint")
        elif ours != theirs:
            planner.consume([ours])
            planner.differ(
                f"{alias}: tied to {canonical} in the model, two tensors in the checkpoint ({ours}, {theirs}). "
                "Untie the model before loading"
            )


def _stored_as(name: str, planner: Planner) -> str | None:
    if name in planner.saved:
        return name
    return planner.aliases.get(name)


def _load(state: ModuleState, replaced: dict[str, Any], component: str) -> None:
    # The live tensors hold the checkpoint by now and are passed to themselves, which copies nothing; what reaches
    # the module this way is extra state, tensors that hooks derive, and the load hooks of the user's modules.
    raw = state.raw
    raw.update(replaced)
    result = state.root.load_state_dict(raw, strict=False)
    refused = sorted(set(result.unexpected_keys) & set(replaced))
    if refused:
        raise IncompatibleStateError(
            f"{component}: the module's load_state_dict does not take back what its state_dict gave: {refused}. "
            "Register a load_state_dict pre-hook that undoes the state_dict hook",
            differences=[f"{component}: {key}: given by state_dict, refused by load_state_dict" for key in refused],
        )
