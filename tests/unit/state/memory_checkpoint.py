"""A checkpoint held in memory: what a capture would have stored, as a `CheckpointView`, and the reads of a plan."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from dckpt.format.values import JsonValue, dump_json, load_json
from dckpt.state.naming import DTYPE_NAMES
from dckpt.state.records import Captured, RestorePlan
from dckpt.state.train_state import TrainState


@dataclass
class MemoryCheckpoint:
    """Full copies of all tensors, and values that went through their JSON bytes."""

    stored: dict[str, torch.Tensor]
    stored_values: dict[str, JsonValue]
    aliases: dict[str, str]
    parts: tuple[str, ...]
    rng: dict[str, JsonValue] = field(default_factory=dict)
    world_size: int = 1
    step: int | None = 1
    generation: int = 1

    def tensors(self):
        return {name: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in self.stored.items()}

    def values(self):
        return self.stored_values


def full(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def save(state: TrainState) -> MemoryCheckpoint:
    return store(state.capture())


def store(captured: Captured) -> MemoryCheckpoint:
    data = dump_json(captured.values)
    return MemoryCheckpoint(
        {item.name: full(item.tensor) for item in captured.tensors},
        load_json(data, key="manifest.json", limit=2**24),
        dict(captured.aliases),
        captured.parts,
        dict(captured.rng),
    )


def read(plan: RestorePlan, checkpoint: MemoryCheckpoint) -> None:
    """Carry out the plan's reads, as the engine does before `apply`."""
    with torch.no_grad():
        for name, target in plan.reads:
            source = checkpoint.stored[name]
            assert target.dtype == source.dtype, name
            assert target.shape == source.shape, name
            if isinstance(target, DTensor):
                whole = distribute_tensor(source, target.device_mesh, target.placements)
                target.to_local().copy_(whole.to_local())
            else:
                target.copy_(source)


def load(state: TrainState, checkpoint: MemoryCheckpoint, **options) -> RestorePlan:
    plan = state.plan_restore(checkpoint, **options)
    assert plan.differences == []
    read(plan, checkpoint)
    plan.apply()
    return plan


def same(a: TrainState, b: TrainState) -> None:
    """Both hold the same tensors, bit for bit, and the same values."""
    left, right = store(a.capture()), store(b.capture())
    assert left.stored.keys() == right.stored.keys()
    for name, tensor in left.stored.items():
        assert torch.equal(bits(tensor), bits(right.stored[name])), name
    assert left.stored_values == right.stored_values
    assert left.aliases == right.aliases


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor.reshape(-1)
