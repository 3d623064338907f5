"""Random runs that are resumed as they should be, on random layouts: the resume validator has nothing to say to any of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler

import dckpt
from tests.support.sabotage import open_run, validate

SAMPLES_A_STEP, WIDTH, VOCABULARY = 24, 12, 10
PLAIN, SHARDED, TENSOR = ("single", "ddp"), ("single", "ddp", "fsdp", "hsdp"), ("tp", "fsdp-tp")
WORLDS = {"single": (1,), "ddp": (2, 3, 4), "fsdp": (1, 2, 3, 4), "hsdp": (4,), "tp": (2,), "fsdp-tp": (4,)}

SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "none": lambda _: None,
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 60),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.02, total_steps=200, cycle_momentum=False),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.95),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "steps": lambda o: lr_scheduler.MultiStepLR(o, [2, 4, 4], gamma=0.5),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.97),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 50, power=2.0),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.01, step_size_up=3, cycle_momentum=False),
    "chain": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.98)], optimizer=o
    ),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 40)], milestones=[3]
    ),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.9, 0.95), foreach=False),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, foreach=False),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01, foreach=False),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, foreach=False),
}


@dataclass(frozen=True)
class Place:
    """Where one part of a run happens, and how. reshard_to: ranks for which its last checkpoint is rewritten, 0 for none."""

    kind: str
    ranks: int
    accumulation: int
    steps: int
    is_blocking: bool
    ends_within_step: bool = False
    begins_leg: bool = False
    reshard_to: int = 0


@dataclass(frozen=True)
class Story:
    """A run that is resumed once or more often; drawn from a seed, equal for equal seeds."""

    seed: int
    schedule: str
    optimizer: str
    places: tuple[Place, ...]
    options: frozenset[str] = field(default=frozenset())

    def __str__(self) -> str:
        where = " -> ".join(
            f"{p.kind}{p.ranks}x{p.accumulation}"
            + ("/within" * p.ends_within_step + "/leg" * p.begins_leg + f"/reshard{p.reshard_to}" * (p.reshard_to > 0))
            for p in self.places
        )
        return f"{self.seed}: {where}, {self.optimizer}, {self.schedule}, {', '.join(sorted(self.options))}"


OPTIONS = ("dropout", "tied", "average", "two optimizers", "generators", "short", "unused", "extra", "epochs", "facts")


def draw_story(seed: int) -> Story:
    """A pure function of the seed."""
    draw = random.Random(seed)
    options = {name for name in OPTIONS if draw.random() < 0.5}
    kinds = draw.choice((PLAIN, SHARDED, SHARDED, SHARDED, TENSOR))
    stays = draw.random() < 0.3
    if stays and kinds is not TENSOR and draw.random() < 0.7:
        options.add("own buffers")  # differ by rank, so they go on only where the ranks stay
    if kinds is PLAIN:
        options.add("scaler")
    places: list[Place] = []
    for number in range(draw.choice((2, 2, 3))):
        kind = draw.choice(kinds)
        ranks, accumulation = draw.choice(WORLDS[kind]), draw.choice((1, 2))
        if stays and places:
            kind, ranks, accumulation = places[0].kind, places[0].ranks, places[0].accumulation
        elsewhere = draw.choice([count for count in (1, 2, 3, 4) if count != ranks])
        places.append(
            Place(
                kind,
                ranks,
                accumulation,
                steps=draw.randint(1, 5),
                is_blocking=draw.random() < 0.5,
                ends_within_step=stays and accumulation == 2 and draw.random() < 0.6,
                begins_leg=number > 0 and draw.random() < 0.15,
                reshard_to=0 if stays or kind in (*TENSOR, "hsdp") or draw.random() > 0.2 else elsewhere,
            )
        )
    return Story(seed, draw.choice(list(SCHEDULES)), draw.choice(list(OPTIMIZERS)), tuple(places), frozenset(options))


class Block(nn.Module):
    def __init__(self, *, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.down(torch.tanh(self.up(x))))


class Net(nn.Module):
    def __init__(self, options: frozenset[str]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout=0.2 * ("dropout" in options)) for _ in range(2))
        self.norm = nn.BatchNorm1d(WIDTH) if "own buffers" in options else nn.LayerNorm(WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if "tied" in options:
            self.head.weight = self.embed.weight
        if "unused" in options:
            self.unused = nn.Linear(3, 3)
        self.register_buffer("table", torch.linspace(0.5, 1, WIDTH), persistent=False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) * self.table
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x) + self.frozen(x))


def _parallel(net: Net, place: Place) -> tuple[nn.Module, DeviceMesh | None, int, int]:
    """Wrapped, the mesh to tell of, and this rank's place among how many that get different samples."""
    kind, ranks = place.kind, place.ranks
    if kind == "single":
        return net, None, 0, 1
    rank = torch.distributed.get_rank()
    if kind == "ddp":
        return DistributedDataParallel(net, find_unused_parameters=True), None, rank, ranks
    if kind in TENSOR:
        mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("dp", "tp"))
        for block in net.blocks:
            parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        if kind == "fsdp-tp":
            for block in net.blocks:
                fully_shard(block, mesh=mesh["dp"])
            fully_shard(net, mesh=mesh["dp"])
        return net, mesh, rank // 2, ranks // 2
    shape = {"dp": ranks} if kind == "fsdp" else {"replicate": 2, "shard": ranks // 2}
    mesh = init_device_mesh("cpu", tuple(shape.values()), mesh_dim_names=tuple(shape))
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net, mesh if kind == "hsdp" else None, rank, ranks


class Run:
    """One part of a story's run, as its program builds it."""

    def __init__(self, story: Story, place: Place, rank: int, seed: int) -> None:
        options = story.options
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
        self.options, self.place = options, place
        self.net = Net(options)
        self.model, mesh, dp_rank, dp = _parallel(self.net, place)
        trained = [p for p in self.net.parameters() if p.requires_grad]
        make = OPTIMIZERS[story.optimizer]
        self.optimizers = {"": make(trained)}
        if "two optimizers" in options:
            self.optimizers = {
                "matrices": make([p for p in trained if p.ndim > 1]),
                "rest": OPTIMIZERS["sgd"]([p for p in trained if p.ndim == 1]),
            }
        self.schedules = {key: SCHEDULES[story.schedule](found) for key, found in self.optimizers.items()}
        self.scaler = None
        if "scaler" in options:
            self.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)
        batch = dckpt.Batch(
            micro=SAMPLES_A_STEP // place.accumulation // dp, accumulation=place.accumulation, data_parallel=dp
        )
        self.sampler = dckpt.ElasticDistributedSampler(
            100 if "epochs" in options else 10**6,
            batch=batch,
            seed=story.seed,
            rank=dp_rank,
            tail="short" if "short" in options else "drop",
            allow_empty=True,
        )
        self.progress = dckpt.TrainProgress(max_steps=1000, batch=batch)
        self.average = None
        if "average" in options:
            self.average = {name: p.detach().clone() for name, p in self.net.named_parameters()}
        self.generators = {"own": torch.Generator().manual_seed(seed), "numpy": np.random.default_rng(seed)}
        self.state = dckpt.TrainState(
            model=self.model,
            optimizer=self._plain(self.optimizers),
            scheduler=None if story.schedule == "none" else self._plain(self.schedules),
            scaler=self.scaler,
            data=self.sampler,
            progress=self.progress,
            ema=self.average,
            generators=self.generators if "generators" in options else {},
            extra={"notes": {"best": 1.5, "seen": torch.arange(4)}} if "extra" in options else {},
            mesh=mesh,
            facts={"dataset": "a", "seed": story.seed, "config": {"depth": 2}} if "facts" in options else {},
        )
        # A stream of one's own for each data-parallel rank, the same for ranks of one model.
        torch.manual_seed(100 * seed + dp_rank)

    @staticmethod
    def _plain(found: dict[str, Any]) -> Any:
        return found if len(found) > 1 else next(iter(found.values()))

    def train(self, steps: int, *, ends_within_step: bool) -> None:
        for _ in range(steps):
            self._step()
        if ends_within_step:
            for micro in self.progress.unconsumed(self.sampler.batches()):
                self._backward(micro)
                self.progress.accumulate()
                return

    def _step(self) -> None:
        loss = torch.zeros(())
        batches = iter(self.progress.unconsumed(self.sampler.batches()))
        for _ in range(self.place.accumulation - self.progress.micro_step):
            loss = self._backward(next(batches))
            self.progress.accumulate()
        for key, optimizer in self.optimizers.items():
            if self.scaler is None:
                optimizer.step()
            else:
                self.scaler.step(optimizer)
            optimizer.zero_grad()
            schedule = self.schedules[key]
            if isinstance(schedule, lr_scheduler.ReduceLROnPlateau):
                schedule.step(1.0)
            elif schedule is not None:
                schedule.step()
        if self.scaler is not None:
            self.scaler.update()
        if self.average is not None:
            with torch.no_grad():
                for name, parameter in self.net.named_parameters():
                    self.average[name].lerp_(parameter, 0.2)
        self.net.steps += 1
        self.generators["own"].get_state(), torch.rand(2, generator=self.generators["own"])
        self.generators["numpy"].random()
        self.progress.advance(loss=loss.detach())

    def _backward(self, indices: list[int]) -> torch.Tensor:
        # Every token in every micro-batch, so that no row goes without a gradient; the sampler's indices only shift them.
        shift = sum(indices) % VOCABULARY
        loss = (self.model((torch.arange(2 * VOCABULARY) + shift) % VOCABULARY) - 1).square().mean()
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss


def live(rank: int, world_size: int, root: str, story: Story, number: int) -> tuple[dict[str, str], str]:
    """Part `number` of a story: resumes, validates once more, trains and saves; what was found, and the report."""
    place = story.places[number]
    run = Run(story, place, rank, seed=10 * story.seed + number)
    found: dict[str, str] = {}
    text = ""
    with open_run(Path(root)) as checkpointer:
        report = checkpointer.resume(run.state)
        if report is not None:
            again = validate(checkpointer, run.state, report.loaded)
            for told in (report, again):
                found |= {f.check: f.severity for f in (*told.warnings, *told.critical)}
            text = report.text()
        if place.begins_leg and report is not None and not run.progress.micro_step:
            checkpointer.start_leg(run.state, scheduler="keep")
        run.train(place.steps, ends_within_step=place.ends_within_step)
        pending = checkpointer.save(run.state, blocking=place.is_blocking)
        assert pending.wait(60) == "committed", pending.error
    return found, text
