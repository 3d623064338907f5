"""Models and states with everything in them that checkpointing gets wrong; equal at every rank count for one seed."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import dckpt

Kind = Literal["single", "ddp", "fsdp"]

WIDTH = 6


class RunningMean(nn.Module):
    """Like BatchNorm without its synchronisation: each rank's buffers follow its own batches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
                self.batches.add_(1)
        return x - 0.01 * self.mean


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width + 1)  # uneven over 2 and 4 ranks
        self.down = nn.Linear(2 * width + 1, width, bias=False)
        self.norm = RunningMean(width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.down(torch.tanh(self.up(self.norm(x)))))


class Extra(nn.Module):
    """Carries `_extra_state` that is not a tensor, and a tuple with int keys inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[Any, Any] = {"calls": 0, 7: (1, 2)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen["calls"] += 1
        return x

    def get_extra_state(self) -> Any:
        return dict(self.seen)

    def set_extra_state(self, state: Any) -> None:
        self.seen = dict(state)


class Zoo(nn.Module):
    """Tied, frozen, never-used, narrow (empty shards) parameters; buffers of many dtypes; wrapped blocks."""

    def __init__(self, width: int = WIDTH, *, wrap: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        blocks: list[nn.Module] = [Block(width), Block(width)]
        if wrap:
            blocks[0] = checkpoint_wrapper(blocks[0])
            blocks[1] = torch.compile(blocks[1], backend="eager")  # type: ignore[assignment]
        self.blocks = nn.ModuleList(blocks)
        self.narrow = nn.Linear(width, 1)  # one row: empty shards from 2 ranks on
        self.unused = nn.Linear(3, 5)  # never gets a gradient
        self.frozen = nn.Linear(width, width)
        self.frozen.requires_grad_(False)
        self.brief = nn.Linear(width, width, dtype=torch.bfloat16)
        self.extra = Extra()
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("count", torch.tensor(3, dtype=torch.int32))
        self.register_buffer("eighth", torch.linspace(-1, 1, 9).to(torch.float8_e4m3fn))
        self.register_buffer("nothing", torch.zeros(0, 4))
        self.register_buffer("scale", torch.tensor(1.5, dtype=torch.float64))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.extra(self.embed(tokens))
        for block in self.blocks:
            x = block(x)
        x = self.frozen(x) + self.brief(x.to(torch.bfloat16)).float()
        return self.head(x) * self.narrow(x)


def parallelise(model: nn.Module, kind: Kind) -> nn.Module:
    if kind == "fsdp":
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model.brief)
        fully_shard(model)
        return model
    if kind == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=True, broadcast_buffers=False)
    return model


class Run:
    """One small training run: deterministic in (seed, world size), any kind of parallelism."""

    def __init__(
        self,
        kind: Kind,
        rank: int,
        world_size: int,
        *,
        seed: int = 1,
        wrap: bool = True,
        steps: int = 100,
        width: int = WIDTH,
    ):
        torch.manual_seed(seed)
        self.rank, self.world_size = rank, world_size
        self.model = parallelise(Zoo(width, wrap=wrap), kind)
        trained = [p for n, p in self.model.named_parameters() if p.requires_grad]
        slow = [p for p in trained if p.ndim == 1]
        fast = [p for p in trained if p.ndim != 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": fast, "lr": 0.01}, {"params": slow, "lr": 0.005, "weight_decay": 0.0}], foreach=False
        )
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, milestones=[3, 3, 7], gamma=0.5)
        self.progress = dckpt.TrainProgress(
            max_steps=steps, batch=dckpt.Batch(micro=24 // world_size, data_parallel=world_size)
        )
        self.notes = {"tags": ("a", 1), 3: [1.5, None], "inner": {"deep": torch.arange(5)}}
        self.state = dckpt.TrainState(
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            progress=self.progress,
            extra={"notes": self.notes},
        )
        # Every rank its own streams from here on, as a training script does.
        torch.manual_seed(1000 * seed + rank)

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            tokens = torch.randint(0, 11, (4,))
            out = self.model(tokens)
            loss = (out - 1.0).square().mean() + 0.0 * sum(p.sum() for p in [out])
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.progress.advance(loss=loss.detach())
            losses.append(loss.item())
        return losses


def digests(state: Any, *, with_rng: bool = True) -> dict[str, str]:
    """Every tensor (gathered whole), value and random stream of `state` by name, as digests. A collective under FSDP."""
    from dckpt.dcp.chunks import tensor_digest
    from dckpt.format.checksum import digest_bytes
    from dckpt.format.values import dump_json

    captured = state.capture()
    found = {}
    for item in captured.tensors:
        tensor = item.tensor
        full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        found[item.name] = f"{full.dtype}{tuple(full.shape)}{tensor_digest(full)}"
    values = dict(captured.values)
    optim = values.pop("optim", None)
    if optim is not None:
        # How a moment is laid out over ranks is the live run's business; groups and options must be equal.
        values["optim"] = {key: record["groups"] for key, record in optim["optimizers"].items()}
    for name, value in values.items():
        found[f"values:{name}"] = digest_bytes(dump_json(value))
    if with_rng:
        for name, value in captured.rng.items():
            found[f"rng:{name}"] = digest_bytes(dump_json(value))
    return found


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
