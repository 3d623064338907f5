"""Facts about the models: which submodules train, what is frozen, what drops out, what is tied, what is recomputed."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from dckpt.format.checksum import digest_bytes
from dckpt.state.model import read_module
from dckpt.state.naming import walk

NAMES_KEPT = 1000
"""Longer lists of names are kept as count and digest only."""
BUFFER_BYTES_MAX = 64 * 2**20
"""Larger buffers that no checkpoint holds are not digested."""


def name_list(names: Sequence[str]) -> dict[str, Any]:
    """Names as a fact: how many, a digest over them in order, and the names themselves unless they are too many."""
    return {
        "count": len(names),
        "digest": digest_bytes("\n".join(names).encode()),
        "names": list(names) if len(names) <= NAMES_KEPT else None,
    }


class ModelFacts:
    """Collects the facts; remembers digests of buffers while these do not change, since it is asked at every save."""

    def __init__(self) -> None:
        self._digests: dict[int, tuple[weakref.ref[torch.Tensor], int, str]] = {}

    def collect(self, models: Mapping[str, nn.Module]) -> dict[str, Any]:
        """`models`: prefix ("" or "<key>.") -> module. Reads flags and small buffers, changes nothing."""
        modes: list[list[Any]] = []
        dropout: list[list[Any]] = []
        norms: list[str] = []
        trainable: list[str] = []
        frozen: list[str] = []
        unsaved: dict[str, str] = {}
        classes: dict[str, str] = {}
        seen: set[int] = set()
        for prefix, model in models.items():
            classes[prefix.removesuffix(".")] = type(model).__name__
            is_parent_training: dict[str, bool] = {}
            for name, module in _modules(model):
                label = f"{prefix}{name}"
                parent = is_parent_training.get(name.rpartition(".")[0]) if name else None
                if module.training is not parent:
                    modes.append([label, module.training])
                is_parent_training[name] = module.training
                if isinstance(module, _DropoutNd):
                    dropout.append([label, float(module.p)])
                elif isinstance(getattr(module, "dropout", None), float):
                    dropout.append([label, float(module.dropout)])  # type: ignore[arg-type]
                if isinstance(module, _BatchNorm):
                    norms.append(label)
                for key, parameter in module._parameters.items():
                    if parameter is not None and id(parameter) not in seen:
                        seen.add(id(parameter))
                        (trainable if parameter.requires_grad else frozen).append(f"{label}.{key}".lstrip("."))
                unsaved.update(self._unsaved_buffers(label, module))
        return {
            "class": classes,
            "modes": modes,
            "dropout": {
                "count": len(dropout),
                "digest": digest_bytes(repr(dropout).encode()),
                "rates": sorted({p for _, p in dropout}),
                "modules": dropout if len(dropout) <= NAMES_KEPT else None,
            },
            "batch_norms": name_list(norms),
            "trainable": name_list(sorted(trainable)),
            "frozen": name_list(sorted(frozen)),
            "unsaved_buffers": unsaved,
        }

    def _unsaved_buffers(self, label: str, module: nn.Module) -> Iterator[tuple[str, str]]:
        """Buffers that are in no state_dict, with a digest of their bytes; "" if too large, "meta" if they hold nothing."""
        for key in sorted(module._non_persistent_buffers_set):
            buffer = module._buffers.get(key)
            if buffer is None:
                continue
            name = f"{label}.{key}".lstrip(".")
            if buffer.device.type == "meta":
                yield name, "meta"
            else:
                yield name, self._digest(buffer) if buffer.nbytes <= BUFFER_BYTES_MAX else ""

    def _digest(self, buffer: torch.Tensor) -> str:
        known = self._digests.get(id(buffer))
        version = -1 if buffer.is_inference() else buffer._version
        if known is not None and known[0]() is buffer and known[1] == version:
            return known[2]
        digest = f"{buffer.dtype}{list(buffer.shape)}{digest_bytes(_raw_bytes(buffer))}"
        if buffer.is_floating_point() and buffer.element_size() > 1 and bool(buffer.detach().isnan().any()):
            digest = f"NaN {digest}"
        self._digests[id(buffer)] = (weakref.ref(buffer), version, digest)
        return digest


def _raw_bytes(tensor: torch.Tensor) -> bytes:
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
    return local.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every submodule under the name that it has in a checkpoint, without wrappers."""
    for site in walk(model):
        yield site.prefix.removesuffix("."), site.module


def tied_names(models: Mapping[str, nn.Module]) -> dict[str, str]:
    """Name -> the name of the tensor that it is tied to."""
    seen: dict[int, str] = {}
    tied: dict[str, str] = {}
    for prefix, model in models.items():
        tied.update(read_module(model, prefix=f"model.{prefix}", seen=seen).aliases)
    return tied


def gradient_names(models: Mapping[str, nn.Module]) -> list[str]:
    """Parameters that have a gradient which is not zero everywhere."""
    found = []
    for prefix, model in models.items():
        for name, module in _modules(model):
            for key, parameter in module._parameters.items():
                gradient = None if parameter is None else parameter.grad
                if gradient is not None and _is_any_nonzero(gradient):
                    found.append(f"{prefix}{name}.{key}".replace("..", ".").lstrip("."))
    return found


def _is_any_nonzero(tensor: torch.Tensor) -> bool:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return bool(local.detach().ne(0).any()) if local.numel() else False
