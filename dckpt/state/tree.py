"""Nested containers of a user's state, taken apart into plain values and named tensors, and put together again.

Torch's objects become records that the format knows (`TensorRef`, `DType`, `Size`); everything else goes through to
`encode_value`, which refuses what it cannot carry, with its path. There is no pickle.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dckpt.errors import ConfigError
from dckpt.format.values import VALUES_DEPTH_MAX, DType, Size, TensorRef
from dckpt.state.naming import detached

_BYTES_IO = "$BytesIO"


@dataclass(slots=True)
class Flat:
    """A tree with records in the place of torch's objects, and its tensors by name, in the order of the tree."""

    tree: Any = None
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


def flatten(value: Any, *, name: str, path: str) -> Flat:
    """Take `value` apart. Its tensors are called `name` and the keys that lead to them, joined by dots.

    `path` is where the value lives, for error messages. Tensors are detached, never copied.
    """
    flat = Flat()
    flat.tree = _flatten(value, name, path, flat.tensors, 0)
    return flat


def _flatten(value: Any, name: str, path: str, tensors: dict[str, torch.Tensor], depth: int) -> Any:
    if depth > VALUES_DEPTH_MAX:
        raise ConfigError(
            f"{path[:200]}: nested deeper than {VALUES_DEPTH_MAX} levels, or holds itself. Store a flat record"
        )
    if isinstance(value, torch.Tensor):
        unique = _unique(name, tensors)
        tensors[unique] = detached(value)
        return TensorRef(unique)
    kind = type(value)
    if kind is torch.dtype:
        return DType(str(value).removeprefix("torch."))
    if kind is torch.Size:
        return Size(tuple(value))
    if kind is io.BytesIO:
        return {_BYTES_IO: value.getvalue()}
    if kind in (dict, OrderedDict):
        if kind is dict and set(value) == {_BYTES_IO}:
            raise ConfigError(f"{path}: a dict with the single key {_BYTES_IO!r} is reserved. Rename the key")
        pairs = [
            (key, _flatten(item, f"{name}.{key}" if name else f"{key}", f"{path}[{key!r}]", tensors, depth + 1))
            for key, item in value.items()
        ]
        return kind(pairs)
    if kind in (list, tuple):
        items = [
            _flatten(item, f"{name}.{i}" if name else f"{i}", f"{path}[{i}]", tensors, depth + 1)
            for i, item in enumerate(value)
        ]
        return kind(items)
    return value


def _unique(name: str, tensors: Mapping[str, torch.Tensor]) -> str:
    # {1: a, "1": b} would meet here; the order of the tree decides, so every rank decides alike.
    unique, count = name, 1
    while unique in tensors:
        count += 1
        unique = f"{name}~{count}"
    return unique


def unflatten(tree: Any, fetch: Callable[[str], torch.Tensor]) -> Any:
    """The value that `flatten` took apart; `fetch` gives the tensor of a name. Containers are new ones."""
    kind = type(tree)
    if kind is TensorRef:
        return fetch(tree.name)
    if kind is DType:
        return _dtype(tree.name)
    if kind is Size:
        return torch.Size(tree.sizes)
    if kind is dict and set(tree) == {_BYTES_IO}:
        return io.BytesIO(tree[_BYTES_IO])
    if kind in (dict, OrderedDict):
        return kind((key, unflatten(item, fetch)) for key, item in tree.items())
    if kind in (list, tuple):
        return kind([unflatten(item, fetch) for item in tree])
    return tree


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"dtype {name!r} is not known to torch {torch.__version__}. Use the torch that saved it")
    return found


def tensor_names(tree: Any) -> list[str]:
    """The names of all tensors that `tree` refers to, in its order."""
    names: list[str] = []

    def note(name: str) -> torch.Tensor:
        names.append(name)
        return torch.empty(0)

    unflatten(tree, note)
    return names


def live_tensors(value: Any, *, name: str, path: str) -> dict[str, torch.Tensor]:
    """The tensors that `value` holds now, under the names that `flatten` gives them."""
    return flatten(value, name=name, path=path).tensors
