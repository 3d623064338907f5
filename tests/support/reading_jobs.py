"""Jobs that save and load a sharded state of a few large tensors and say how many bytes were read for it."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import dckpt


def _build(seed: int, dim: int | None) -> nn.Module:
    """Two tensors of 12 MB: sharded by FSDP (`dim` None), or along one dimension as tensor parallelism does."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(1024, 3000, bias=False), nn.Linear(3000, 1024, bias=False))
    if dim is None:
        return fully_shard(model)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model:
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(dim)]))
    return model


def save_large(rank: int, world_size: int, root: str, dim: int | None = None) -> None:
    """Saves the model that `read_large` loads."""
    with dckpt.Checkpointer(root, deadline_s=60, signals=()) as checkpointer:
        pending = checkpointer.save(dckpt.TrainState(model=_build(1, dim)), step=1, blocking=True)
        assert pending.outcome == "committed", pending.error


def read_large(rank: int, world_size: int, root: str, dim: int | None = None) -> tuple[int, int]:
    """Loads it into another one: bytes that this rank read, bytes that it holds. Every value is compared."""
    model = _build(2, dim)
    with dckpt.Checkpointer(root, deadline_s=60, signals=()) as checkpointer:
        read = checkpointer.load(dckpt.TrainState(model=model)).bytes_read
    held = 0
    for found, expected in zip(model.parameters(), _build(1, dim).parameters(), strict=True):
        assert isinstance(found, DTensor)
        assert isinstance(expected, DTensor)
        assert torch.equal(found.to_local(), expected.to_local())
        held += found.to_local().numel() * found.element_size()
    return read, held
