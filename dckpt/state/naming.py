"""Names and dtypes: what a tensor is called in a checkpoint, whatever wraps the model today.

Wrappers are found by walking the module tree and asking for their class, never by cutting strings out of names: a user's
own submodule named `module` keeps its name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dckpt.errors import ConfigError

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.complex64: "C64",
}
TORCH_DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}

# Where a wrapper class lives, its name, and the attribute under which it holds the module that it wraps.
_WRAPPERS: tuple[tuple[str, str, str], ...] = (
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
        "_checkpoint_wrapped_module",
    ),
)


def dtype_name(dtype: torch.dtype, *, tensor: str) -> str:
    """The safetensors name of `dtype`; ConfigError names the tensor when the format has none."""
    name = DTYPE_NAMES.get(dtype)
    if name is None:
        raise ConfigError(
            f"{tensor}: dtype {dtype} has no safetensors name; expected one of {', '.join(TORCH_DTYPES)}. "
            "Store it as another dtype (complex128 as torch.view_as_real, packed sub-byte data as a uint8 view)"
        )
    return name


def ensure_storable(tensor: torch.Tensor, *, name: str) -> None:
    """Refuse, by name, a tensor whose bytes cannot stand in a checkpoint."""
    dtype_name(tensor.dtype, tensor=name)
    if tensor.device.type == "meta":
        raise ConfigError(
            f"{name}: the tensor is on the meta device and has no data. "
            "Materialise the model (module.to_empty(device=...)) before saving or loading"
        )
    if isinstance(tensor, DTensor):
        if any(placement.is_partial() for placement in tensor.placements):
            raise ConfigError(
                f"{name}: the DTensor has placements {tensor.placements}; a partial sum is not a value. "
                "Redistribute it to Shard or Replicate before saving"
            )
        tensor = local_part(tensor)
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise ConfigError(
            f"{name}: layout {tensor.layout} (quantized: {tensor.is_quantized}) is not a dense array. "
            "Keep its parts (values, indices, scales) as plain tensors"
        )
    if hasattr(tensor, "__tensor_flatten__"):
        raise ConfigError(
            f"{name}: the tensor subclass {type(tensor).__name__} hides several tensors. "
            "Keep its parts as plain tensors, or save through torch's dcp with dckpt.DckptWriter"
        )


def storage_address(tensor: torch.Tensor) -> int:
    """Where the tensor's storage begins on this rank; 0 when it has none (empty, meta)."""
    return local_part(tensor).untyped_storage().data_ptr()


def detached(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor out of reach of autograd, sharing its memory. One that autograd does not follow is handed back as it is."""
    return tensor.detach() if tensor.requires_grad or not isinstance(tensor, DTensor) else tensor


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor, out of reach of autograd; any other tensor itself."""
    # Not to_local(): that makes a new view, and with gradients an autograd node, of each of some thousand tensors at each save.
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def is_same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Both are views of one storage from its first byte on, which is how a detached tensor relates to its origin."""
    address = storage_address(a)
    return address != 0 and address == storage_address(b) and a.shape == b.shape


def loaded_class(module: str, name: str) -> type | None:
    """The class `module.name` if its module is imported: an instance cannot exist otherwise, and importing is slow."""
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) else None


@lru_cache(maxsize=4096)
def _inner_attribute(kind: type) -> str | None:
    for module, name, attribute in _WRAPPERS:
        wrapper = loaded_class(module, name)
        if wrapper is not None and issubclass(kind, wrapper):
            return attribute
    return None


def _inner(module: nn.Module) -> tuple[str, nn.Module] | None:
    kind: Any = type(module)
    attribute = _inner_attribute(kind)
    inner = module._modules.get(attribute) if attribute is not None else None
    return (attribute, inner) if attribute is not None and inner is not None else None


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside DDP, DataParallel, torch.compile and activation checkpointing, in whatever order they stand."""
    while (found := _inner(module)) is not None:
        module = found[1]
    return module


@dataclass(frozen=True, slots=True)
class Site:
    """One module of the tree under its canonical prefix ("" or "layers.0.")."""

    prefix: str
    module: nn.Module
    is_replicated: bool
    """A DDP wrapper stands above it: parameters are equal on all ranks by construction."""


def walk(root: nn.Module) -> Iterator[Site]:
    """Every module below `root`, wrappers left out, a shared one under each of its names."""
    yield from _walk(root, "", is_replicated=False)


def _walk(module: nn.Module, prefix: str, *, is_replicated: bool) -> Iterator[Site]:
    while (found := _inner(module)) is not None:
        is_replicated = is_replicated or found[0] == "module"
        module = found[1]
    yield Site(prefix, module, is_replicated)
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{prefix}{name}.", is_replicated=is_replicated)


def ddp_ignored(root: nn.Module) -> set[int]:
    """Ids of the parameters that a DDP wrapper in the tree was told to leave alone."""
    ignored: set[int] = set()
    ddp = loaded_class("torch.nn.parallel.distributed", "DistributedDataParallel")
    for module in root.modules():
        if ddp is not None and isinstance(module, ddp):
            names = getattr(module, "parameters_to_ignore", ())
            inner = module._modules["module"]
            assert inner is not None
            ignored.update(id(param) for name, param in inner.named_parameters() if name in names)
    return ignored


class KeyNames:
    """Canonical names of one module's state_dict keys."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._prefixes: dict[str, str] = {"": ""}

    def canonical(self, key: str) -> str:
        """`key` without the segments that name a wrapper. What is no module's name stays as it is."""
        prefix, dot, leaf = key.rpartition(".")
        known = self._prefixes.get(prefix)
        if known is None:
            known = self._prefixes[prefix] = self._canonical_prefix(prefix)
        return f"{known}{leaf}" if dot else leaf

    def _canonical_prefix(self, prefix: str) -> str:
        segments = prefix.split(".")
        kept: list[str] = []
        module = self._root
        at = 0
        while True:
            # Some wrappers take their own segment out of the keys again (activation checkpointing does): it is
            # stepped over where it is there, and each wrapper steps over one at most.
            while (found := _inner(module)) is not None:
                if at < len(segments) and segments[at] == found[0]:
                    at += 1
                module = found[1]
            child = module._modules.get(segments[at]) if at < len(segments) else None
            if child is None:
                kept += segments[at:]
                return "".join(f"{segment}." for segment in kept)
            kept.append(segments[at])
            module = child
            at += 1


def ensure_key(key: object, *, what: str) -> str:
    """A mapping's key as it enters tensor names: a string without dots."""
    if type(key) is not str or not key or "." in key:
        raise ConfigError(f"{what}: key {key!r} cannot be part of a name; use a non-empty string without '.'")
    return key
