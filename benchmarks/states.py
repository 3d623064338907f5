"""The states that are saved and loaded: models and optimizers whose values follow from a seed alone.

The values need no training step: moments are a fixed multiple of the parameters. All builders return a `State`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

import dckpt
from benchmarks.world import World

ADAM_TENSORS = 3  # a parameter and its two moments
LARGE_BYTES = 64 << 20  # of one large parameter, where the state has room for several
TRAINED_BYTES = 16 << 20
FEWEST_LAYERS = 4


@dataclass
class State:
    """A model, perhaps with an optimizer. copies: how many ranks hold each byte (1 where everything is sharded)."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    copies: int = 1

    def train_state(self) -> dckpt.TrainState:
        """As dckpt wants it."""
        return dckpt.TrainState(model=self.model, optimizer=self.optimizer)

    def state_dict(self) -> dict[str, Any]:
        """As torch.distributed.checkpoint wants it: nested, the tensors being the live ones."""
        found: dict[str, Any] = {"model": get_model_state_dict(self.model)}
        if self.optimizer is not None:
            found["optim"] = get_optimizer_state_dict(self.model, self.optimizer)
        return found

    def named_local_tensors(self) -> dict[str, torch.Tensor]:
        """What this rank holds, by name: the live tensors themselves, DTensors as their local part."""
        return {name: _local(tensor) for name, tensor in self._tensors()}

    def tensors_to_write(self, world: World) -> dict[str, torch.Tensor]:
        """What this rank writes where each rank writes a file of its own: what is on every rank is written by rank 0."""
        is_replicated = self.copies == world.size > 1
        return self.named_local_tensors() if world.rank == 0 or not is_replicated else {}

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.model.named_parameters():
            yield f"model.{name}", parameter.detach()
            if self.optimizer is not None:
                for key, value in self.optimizer.state.get(parameter, {}).items():
                    yield f"optim.{name}.{key}", value

    def _large(self) -> list[torch.Tensor]:
        """Without the step counters, which every rank has whatever the sharding."""
        return [tensor for tensor in self.named_local_tensors().values() if tensor.dim()]

    @property
    def local_bytes(self) -> int:
        """Bytes of all tensors that this rank holds; the optimizer's step counters, a few bytes, left out."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._large())

    def unique_bytes(self, world: World) -> int:
        """Bytes of the state over the whole job, each counted once: what a checkpoint must hold."""
        return round(world.total(self.local_bytes) / self.copies)

    def unique_trained_bytes(self, world: World) -> int:
        """Of these, what training changes: trained parameters and their moments."""
        own = sum(tensor.numel() * tensor.element_size() for tensor in self._trained())
        return round(world.total(own) / self.copies)

    def _trained(self) -> list[torch.Tensor]:
        parameters = [parameter.detach() for parameter in self.model.parameters() if parameter.requires_grad]
        moments = [] if self.optimizer is None else [v for held in self.optimizer.state.values() for v in held.values()]
        return [_local(tensor) for tensor in (*parameters, *moments) if tensor.dim()]

    def advance(self) -> None:
        """Changes every tensor that is trained, as a step of training does: nobody may reuse what was saved before."""
        with torch.no_grad():
            for tensor in self._trained():
                tensor.mul_(1.001)

    def clear(self) -> None:
        """Zeroes every tensor, so that a load that does nothing is found out."""
        with torch.no_grad():
            for tensor in self.named_local_tensors().values():
                tensor.zero_()

    def fingerprint(self, world: World) -> int:
        """A sum over the bits of all tensors of the job; the same for any sharding of the same state."""
        own = 0
        for tensor in self._large():
            if tensor.numel():
                own += int(tensor.reshape(-1).view(torch.int32).sum(dtype=torch.int64))
        parts = [0] * world.size
        torch.distributed.all_gather_object(parts, own)
        return sum(parts) // self.copies


def few_large(world: World, megabytes: int) -> State:
    """FSDP2 over all ranks, AdamW: square matrices of up to 64 MB."""
    return _fsdp(_stack(world, _layers(megabytes, FEWEST_LAYERS)))


def trainable(world: World, megabytes: int) -> State:
    """For real training steps: FSDP2 over all ranks, plain on one; AdamW; matrices of at most 16 MB.

    Smaller matrices, because FSDP gathers into new memory at each layer, and what is new is slow to touch.
    """
    layers, width = _layers(megabytes, FEWEST_LAYERS, most_bytes=TRAINED_BYTES)
    model = _stack(world, (layers, width))
    return _fsdp(model) if world.size > 1 else State(model, _with_moments(model))


def hybrid(world: World, megabytes: int, replicas: int) -> State:
    """HSDP: `replicas` groups of ranks that hold the same, each group sharding it. Needs a multiple of `replicas` ranks."""
    mesh = init_device_mesh(
        world.device.type, (replicas, world.size // replicas), mesh_dim_names=("replicate", "shard")
    )
    return _fsdp(_stack(world, _layers(megabytes, FEWEST_LAYERS)), mesh, copies=replicas)


def replicated(world: World, megabytes: int) -> State:
    """DDP: every rank holds everything."""
    model = DistributedDataParallel(_stack(world, _layers(megabytes, FEWEST_LAYERS)))
    return State(model, _with_moments(model), copies=world.size)


def many_sharded(world: World, count: int, chunk_bytes: int) -> State:
    """FSDP2 over all ranks, no optimizer: `count` vectors, `chunk_bytes` of each on every rank."""
    model = _Vectors(count, world.size * chunk_bytes // 4, world.device)
    fully_shard(model)
    return State(model, None)


def many_whole(world: World, count: int, tensor_bytes: int) -> State:
    """DDP, no optimizer: `count` vectors of `tensor_bytes`, all of them on every rank."""
    model = DistributedDataParallel(_Vectors(count, tensor_bytes // 4, world.device))
    return State(model, None, copies=world.size)


def columns(world: World, megabytes: int, world_dim: int) -> State:
    """As tensor parallelism leaves it: matrices cut along `world_dim` (1: columns, 0: rows) over all ranks, AdamW."""
    mesh = init_device_mesh(world.device.type, (world.size,))
    model = _stack(world, _layers(megabytes, FEWEST_LAYERS))
    for layer in model:
        assert isinstance(layer, nn.Linear)
        whole = layer.weight.detach()
        own = list(torch.chunk(whole, world.size, dim=world_dim))[world.rank].contiguous()
        cut = DTensor.from_local(
            own, mesh, [Shard(world_dim)], run_check=False, shape=whole.shape, stride=whole.stride()
        )
        layer.weight = nn.Parameter(cut)
    return State(model, _with_moments(model))


def adapters(world: World, megabytes: int) -> State:
    """LoRA: large frozen matrices, each with a trainable adapter of about 1% of its size; AdamW over the adapters."""
    layers, width = _layers(megabytes * ADAM_TENSORS, FEWEST_LAYERS)  # frozen: no moments
    torch.manual_seed(0)
    model = nn.Sequential(*(_Adapted(width, world.device) for _ in range(layers)))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    return State(model, _with_moments(model))


def _layers(megabytes: int, fewest: int, most_bytes: int = LARGE_BYTES) -> tuple[int, int]:
    """(how many square matrices, their width) that with their moments have about so many bytes."""
    parameter_bytes = megabytes * 1_000_000 // ADAM_TENSORS
    each = min(most_bytes, parameter_bytes // fewest)
    width = max(64, int((each / 4) ** 0.5) // 64 * 64)
    return max(fewest, round(parameter_bytes / (4 * width * width))), width


def _stack(world: World, shape: tuple[int, int]) -> nn.Sequential:
    layers, width = shape
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width, bias=False, device=world.device) for _ in range(layers)))


def _fsdp(model: nn.Sequential, mesh: DeviceMesh | None = None, copies: int = 1) -> State:
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return State(model, _with_moments(model), copies)


def _with_moments(model: nn.Module) -> torch.optim.AdamW:
    """AdamW after one step whose gradients are a hundredth of the parameters: no forward or backward is needed."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, foreach=True)
    for parameter in trained:
        parameter.grad = parameter.detach() * 0.01
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class _Vectors(nn.Module):
    """Many small parameters; never called."""

    def __init__(self, count: int, length: int, device: torch.device) -> None:
        super().__init__()
        torch.manual_seed(0)
        for number in range(count):
            self.register_parameter(f"weight_{number:04d}", nn.Parameter(torch.randn(length, device=device)))


class _Adapted(nn.Module):
    """A frozen square matrix and a low-rank adapter beside it."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        rank = max(1, width // 200)  # two matrices of width x rank: 1% of width x width
        self.frozen = nn.Parameter(torch.randn(width, width, device=device), requires_grad=False)
        self.down = nn.Parameter(torch.randn(rank, width, device=device))
        self.up = nn.Parameter(torch.randn(width, rank, device=device))
