"""Facts about code, libraries, hardware and the switches that decide how numbers are computed."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from dckpt.state.naming import loaded_class
from dckpt.version import __version__


def writer_versions() -> dict[str, str]:
    """Versions of what wrote the checkpoint."""
    return {
        "dckpt": __version__,
        "torch": str(torch.__version__),
        "numpy": str(np.__version__),
        "python": platform.python_version(),
    }


def library_facts() -> dict[str, str]:
    """Versions of what computes, and the device's architecture; what is not there is left out."""
    found = {**writer_versions(), "cuda": torch.version.cuda or ""}
    if torch.cuda.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version() or "")  # type: ignore[no-untyped-call]
        found["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())  # type: ignore[no-untyped-call]
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            found["gpu"] = torch.cuda.get_device_name()  # asking would start CUDA in a process that does not use it
    return {name: value for name, value in found.items() if value}


def precision_facts(models: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Switches that change results without changing a name or a shape."""
    return {
        "default_dtype": str(torch.get_default_dtype()),
        "matmul": torch.get_float32_matmul_precision(),
        "cudnn_tf32": bool(torch.backends.cudnn.allow_tf32),
        "cudnn_benchmark": bool(torch.backends.cudnn.benchmark),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "autocast": str(torch.get_autocast_dtype("cuda" if torch.cuda.is_available() else "cpu"))
        if torch.is_autocast_enabled("cuda" if torch.cuda.is_available() else "cpu")
        else "",
        **_wrappers(models),
    }


def _wrappers(models: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Which models are compiled, and the mixed-precision policies of FSDP2, for which torch has no public question."""
    optimized = loaded_class("torch._dynamo.eval_frame", "OptimizedModule")
    compiled: set[str] = set()
    policies: set[str] = set()
    for prefix, model in models.items():
        if getattr(model, "_compiled_call_impl", None) is not None:
            compiled.add(prefix)
        for module in model.modules():
            if optimized is not None and isinstance(module, optimized):
                compiled.add(prefix)
            ask = getattr(type(module), "_get_fsdp_state", None)
            policy = None if ask is None else getattr(ask(module), "_mp_policy", None)
            dtypes = [getattr(policy, name, None) for name in ("param_dtype", "reduce_dtype", "output_dtype")]
            if any(dtype is not None for dtype in dtypes):
                policies.add(", ".join(str(dtype) for dtype in dtypes))
    return {"compiled": sorted(compiled), "fsdp": sorted(policies)}


def world_facts(mesh: DeviceMesh | None, world_size: int) -> dict[str, Any]:
    """How many ranks, and how they are arranged."""
    if mesh is None:
        return {"size": world_size, "mesh": None}
    names = mesh.mesh_dim_names or tuple(f"dim{i}" for i in range(mesh.ndim))
    return {"size": world_size, "mesh": dict(zip(names, mesh.shape, strict=True))}
