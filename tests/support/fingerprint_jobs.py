"""Jobs that load a run in one way or another, spoil it or not, and compare fingerprints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import dckpt
from dckpt.catalog.catalog import Catalog
from dckpt.engine.fingerprints import compare_fingerprints
from dckpt.errors import ConfigError, DckptError
from dckpt.resume.fingerprints import Comparison
from dckpt.storage.local import LocalStorage
from tests.support.models import digests

Kind = Literal["plain", "fsdp", "tp", "hsdp", "fsdp-tp"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(24, 36)
        self.down = nn.Linear(36, 24)
        self.other = nn.Linear(24, 36)


NUM_TRAINED, NUM_FROZEN, NUM_BUFFERS = 15, 2, 2
NUM_MODEL = NUM_TRAINED + NUM_FROZEN + NUM_BUFFERS
NUM_TENSORS = 5 * NUM_TRAINED + 2 * NUM_FROZEN + NUM_BUFFERS
"""Parameters, their moments and step counters, their average; buffers."""


class Net(nn.Module):
    """Tied weights, uneven shards, twins of one shape, frozen and narrow ones, buffers that do and do not differ by rank."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1201, 24)  # above one line of a fingerprint
        self.blocks = nn.ModuleList([Block(), Block()])
        self.brief = nn.Linear(7, 5, dtype=torch.bfloat16)
        self.frozen = nn.Linear(24, 24)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(24, 1201, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("running", torch.zeros(9))


def parallel(model: Net, kind: Kind, world_size: int) -> DeviceMesh | None:
    """Cuts the model; the mesh of the job, None without one."""
    if kind == "plain":
        return None
    if kind in ("tp", "fsdp-tp"):
        axes = {"tp": world_size} if kind == "tp" else {"dp": world_size // 2, "tp": 2}
        mesh = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
        for block in model.blocks:
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel(), "other": ColwiseParallel()}
            parallelize_module(block, mesh["tp"], plan)
        if kind == "fsdp-tp":
            for block in model.blocks:
                fully_shard(block, mesh=mesh["dp"])
        return mesh
    axes = {"dp": world_size} if kind == "fsdp" else {"replicate": 2, "shard": world_size // 2}
    mesh = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return mesh


class Run:
    """Trained without data: every rank computes the same."""

    def __init__(self, kind: Kind, world_size: int, seed: int, *, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(seed)
        self.model = Net() if dtype is torch.float32 else Net().to(dtype)
        mesh = parallel(self.model, kind, world_size)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=0.01, foreach=False)
        self.progress = dckpt.TrainProgress(max_steps=100)
        self.ema = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        self.state = dckpt.TrainState(
            model=self.model, optimizer=self.optimizer, progress=self.progress, ema=self.ema, mesh=mesh
        )

    def train(self, rank: int, *, differs: bool) -> None:
        for _ in range(2):
            for number, parameter in enumerate(self.trained):
                parameter.grad = parameter.detach() * 0.5 + 0.01 * number
            self.optimizer.step()
            self.progress.advance(loss=1.0)
        self.optimizer.zero_grad()
        self.model.seen += 2
        with torch.no_grad():
            self.model.running.copy_(torch.linspace(0, 1, 9) + (rank if differs else 0))
        torch.manual_seed(rank)


def open_run(root: str) -> dckpt.Checkpointer:
    return dckpt.Checkpointer(root, deadline_s=30, signals=())


def save(rank: int, world_size: int, root: str, kind: Kind, differs: bool) -> int:
    """Two checkpoints, one blocking and one not; `differs`: a buffer of each rank's own. How many files the second took over."""
    run = Run(kind, world_size, seed=1)
    with open_run(root) as checkpointer:
        checkpointer.resume(run.state)
        for is_blocking in (True, False):
            run.train(rank, differs=differs)
            pending = checkpointer.save(run.state, blocking=is_blocking)
            assert pending.wait() == "committed", pending.error
        manifest, _ = Catalog(LocalStorage(root)).read_manifest(pending.checkpoint or "")
    return sum(entry.reused > 0 for entry in manifest.files)


def compare(checkpointer: dckpt.Checkpointer, run: Run, loaded: Any) -> Comparison:
    """On all ranks, in a session of its own; proves that nothing changed."""
    before = digests(run.state), [parameter.grad for parameter in run.model.parameters()]
    session = checkpointer._coordination.session("fingerprints", what="validate", call="validate")
    try:
        found = compare_fingerprints(run.state, loaded, session.exchange, checkpointer._topology)
    finally:
        session.close()
    assert (digests(run.state), [parameter.grad for parameter in run.model.parameters()]) == before
    return found


def load_and_compare(
    rank: int, world_size: int, root: str, kind: Kind, spoilings: Sequence[str | None], options: dict[str, Any]
) -> list[Comparison]:
    """For each of the ways to spoil a load (None: none) a load and the comparison after it."""
    run = Run(kind, world_size, seed=2, dtype=options.pop("dtype", torch.float32))
    found = []
    with open_run(root) as checkpointer:
        for spoiling in spoilings:
            loaded = checkpointer.load(run.state, **options)
            if spoiling is not None:
                with torch.no_grad():
                    SPOILINGS[spoiling](run, rank)
            found.append(compare(checkpointer, run, loaded))
    return found


def load_error(rank: int, world_size: int, root: str) -> str:
    """The error of a load."""
    run = Run("plain", world_size, seed=2)
    with open_run(root) as checkpointer:
        try:
            checkpointer.load(run.state)
        except DckptError as error:
            return f"{type(error).__name__}: {error}"
    return ""


def fail_on_one_rank(rank: int, world_size: int, root: str) -> str:
    """The error when rank 1 cannot say what it holds."""
    run = Run("plain", world_size, seed=2)
    with open_run(root) as checkpointer:
        loaded = checkpointer.load(run.state)
        if rank == 1:
            run.ema["bad"] = torch.zeros(2, dtype=torch.complex128)
        session = checkpointer._coordination.session("fingerprints", what="validate", call="validate")
        try:
            compare_fingerprints(run.state, loaded, session.exchange, checkpointer._topology)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        finally:
            session.close()
    raise ConfigError("nothing was raised")


# -- ways to spoil a load ----------------------------------------------------------------------------------------------


def _change(tensor: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Sets the whole tensor, whatever its layout; a collective."""
    if isinstance(tensor, DTensor):
        whole = change(tensor.full_tensor().clone())
        tensor.copy_(distribute_tensor(whole, tensor.device_mesh, tensor.placements))
    else:
        tensor.copy_(change(tensor.clone()))


def _swapped(*places: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(whole: torch.Tensor) -> torch.Tensor:
        whole[list(places)] = whole[list(reversed(places))]
        return whole

    return change


def _one_bit(whole: torch.Tensor) -> torch.Tensor:
    whole.view(torch.int32)[3, 3] ^= 1
    return whole


def _swap(one: torch.Tensor, other: torch.Tensor) -> None:
    held = one.clone()
    one.copy_(other)
    other.copy_(held)


def _moments(run: Run, name: str) -> dict[str, torch.Tensor]:
    return run.optimizer.state[dict(run.model.named_parameters())[name]]


def _up(run: Run) -> torch.Tensor:
    return run.model.blocks[0].up.weight


def _down(run: Run) -> torch.Tensor:
    return run.model.blocks[1].down.weight


def _drift(run: Run, rank: int) -> None:
    if rank == 1:
        local = _up(run)
        (local.to_local() if isinstance(local, DTensor) else local)[0, 0] += 1.0


SPOILINGS: dict[str, Callable[[Run, int], None]] = {
    "swapped rows": lambda run, _: _change(_up(run), _swapped(1, 30)),
    "shard at the wrong offset": lambda run, _: _change(_up(run), lambda whole: whole.roll(9, 0)),
    "duplicated half": lambda run, _: _change(_up(run), lambda whole: torch.cat((whole[:18], whole[:18]))),
    "zeroed": lambda run, _: _change(_down(run), torch.zeros_like),
    "swapped column shards": lambda run, _: _change(
        _down(run), lambda whole: torch.cat((whole[:, 18:], whole[:, :18]), dim=1)
    ),
    "one bit": lambda run, _: _change(_down(run), _one_bit),
    "swapped parameters": lambda run, _: _swap(run.model.blocks[0].up.weight, run.model.blocks[0].other.weight),
    "swapped moments": lambda run, _: _swap(
        _moments(run, "blocks.1.up.weight")["exp_avg"], _moments(run, "blocks.1.other.weight")["exp_avg"]
    ),
    "moments of one parameter swapped": lambda run, _: _swap(
        _moments(run, "blocks.1.up.bias")["exp_avg"], _moments(run, "blocks.1.up.bias")["exp_avg_sq"]
    ),
    "step": lambda run, _: _moments(run, "brief.bias")["step"].add_(1),
    "stale buffer": lambda run, _: run.model.seen.zero_(),
    "ema is the model": lambda run, _: run.ema["brief.weight"].copy_(run.model.brief.weight),
    "tied weight": lambda run, _: _change(run.model.head.weight, _swapped(1200, 0)),
    "rank 1 alone": _drift,
    "own buffer of rank 1": lambda run, rank: run.model.running.add_(1.0 if rank == 1 else 0.0),
}
EXPECTED: dict[str, tuple[str, ...]] = {
    "swapped rows": ("model.blocks.0.up.weight",),
    "shard at the wrong offset": ("model.blocks.0.up.weight",),
    "duplicated half": ("model.blocks.0.up.weight",),
    "zeroed": ("model.blocks.1.down.weight",),
    "swapped column shards": ("model.blocks.1.down.weight",),
    "one bit": ("model.blocks.1.down.weight",),
    "swapped parameters": ("model.blocks.0.other.weight", "model.blocks.0.up.weight"),
    "swapped moments": ("optim.blocks.1.other.weight.exp_avg", "optim.blocks.1.up.weight.exp_avg"),
    "moments of one parameter swapped": ("optim.blocks.1.up.bias.exp_avg", "optim.blocks.1.up.bias.exp_avg_sq"),
    "step": ("optim.brief.bias.step",),
    "stale buffer": ("model.seen",),
    "ema is the model": ("ema.brief.weight",),
    "tied weight": ("model.embed.weight",),
}
