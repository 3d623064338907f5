"""The state of one rank of a 405B-parameter Llama with AdamW, wrapped by torch itself for any number of ranks.

The process group is torch's fake one: it gives ranks, meshes and placements, and moves nothing. Parameters and moments are
memory that nobody has touched, so a shard of gigabytes takes address space and hardly any memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

import dckpt

FULL_RANKS = 4096
LAYOUTS = ("fsdp", "hsdp", "fsdp+tp", "fsdp+pp")
WAYS = 8  # replicas, tensor-parallel ranks, or pipeline stages
AXES = {"fsdp": ("dp",), "hsdp": ("replicate", "shard"), "fsdp+tp": ("dp", "tp"), "fsdp+pp": ("pp", "dp")}


@dataclass(frozen=True)
class Llama:
    """Sizes of the model; the defaults are those of Llama 3.1 405B: 1,137 parameters, 4,548 tensors with AdamW."""

    layers: int = 126
    width: int = 16_384
    hidden: int = 53_248
    kv: int = 1_024
    tokens: int = 128_256

    @classmethod
    def for_ranks(cls, ranks: int, layers: int = 126) -> Llama:
        """The full model from 4,096 ranks on. Below, as many tensors, each narrower, so that no rank writes more than 1 GB."""
        shrink = max(1, FULL_RANKS // ranks)
        full = cls()
        tokens = full.tokens // shrink // WAYS * WAYS  # tensor parallelism wants equal parts
        return cls(layers, full.width // shrink, full.hidden // shrink, max(WAYS, full.kv // shrink), tokens)


def mesh_shape(layout: str, ranks: int) -> tuple[int, ...]:
    """Sizes of the axes `AXES[layout]`."""
    return {
        "fsdp": (ranks,),
        "hsdp": (WAYS, ranks // WAYS),
        "fsdp+tp": (ranks // WAYS, WAYS),
        "fsdp+pp": (WAYS, ranks // WAYS),
    }[layout]


class _Layer(nn.Module):
    def __init__(self, sizes: Llama) -> None:
        super().__init__()
        width, hidden, kv = sizes.width, sizes.hidden, sizes.kv
        self.q_proj, self.o_proj = _linear(width, width), _linear(width, width)
        self.k_proj, self.v_proj = _linear(width, kv), _linear(width, kv)
        self.gate_proj, self.up_proj, self.down_proj = (
            _linear(width, hidden),
            _linear(width, hidden),
            _linear(hidden, width),
        )
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(width), nn.RMSNorm(width)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class _Model(nn.Module):
    """All of it, or the layers of one pipeline stage under the names that they have in the whole."""

    def __init__(self, sizes: Llama, stage: int = 0, num_stages: int = 1) -> None:
        super().__init__()
        a_stage = -(-sizes.layers // num_stages)
        mine = range(stage * a_stage, min(sizes.layers, (stage + 1) * a_stage))
        if stage == 0:
            self.embed_tokens = nn.Embedding(sizes.tokens, sizes.width)
        self.layers = nn.ModuleDict({str(number): _Layer(sizes) for number in mine})
        if stage == num_stages - 1:
            self.norm = nn.RMSNorm(sizes.width)
            self.lm_head = _linear(sizes.width, sizes.tokens)


def _cut_columns_and_rows(model: _Model, mesh: DeviceMesh) -> None:
    plan = {f"{name}_proj": ColwiseParallel() for name in ("q", "k", "v", "gate", "up")}
    plan |= {f"{name}_proj": RowwiseParallel() for name in ("o", "down")}
    for layer in model.layers.values():
        parallelize_module(layer, mesh, plan)
    parallelize_module(model, mesh, {"embed_tokens": RowwiseParallel(), "lm_head": ColwiseParallel()})


def _build(layout: str, ranks: int, rank: int, sizes: Llama) -> tuple[nn.Module, DeviceMesh]:
    shape = mesh_shape(layout, ranks)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=AXES[layout])
    stage, num_stages = (rank // shape[1], WAYS) if layout == "fsdp+pp" else (0, 1)
    with torch.device("meta"):
        model = _Model(sizes, stage, num_stages).to(torch.bfloat16)
    if layout == "fsdp+tp":
        _cut_columns_and_rows(model, mesh["tp"])
    over = mesh if layout in ("fsdp", "hsdp") else mesh["dp"]
    for layer in model.layers.values():
        fully_shard(layer, mesh=over)
    fully_shard(model, mesh=over)
    return model.to_empty(device="cpu"), mesh


def _adamw(model: nn.Module) -> torch.optim.AdamW:
    """As after some steps: float32 moments and a step counter for every parameter."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-5, betas=(0.9, 0.95))
    for parameter in model.parameters():
        moments = {name: torch.empty_like(parameter, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(1000.0), **moments}
    return optimizer


@contextmanager
def state_of_rank(layout: str, ranks: int, rank: int, sizes: Llama) -> Iterator[dckpt.TrainState]:
    """What rank `rank` of a job of `ranks` trains; while it is held the default process group is a fake one."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            model, mesh = _build(layout, ranks, rank, sizes)
        optimizer = _adamw(model)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        yield dckpt.TrainState(
            model=model, optimizer=optimizer, scheduler=scheduler, progress=_progress(ranks), mesh=mesh
        )
    finally:
        dist.destroy_process_group()


def _progress(ranks: int) -> Any:
    batch = dckpt.Batch(micro=1, accumulation=4, data_parallel=ranks)
    return dckpt.TrainProgress(max_steps=1_000_000, batch=batch)
