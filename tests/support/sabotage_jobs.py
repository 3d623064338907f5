"""What can be wrong on one rank or between ranks, and the jobs in which real ranks load a run, spoil it and judge it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import dckpt
from tests.support.fingerprint_jobs import _change
from tests.support.sabotage import Net, Outcome, Run, open_run, outcome, validate

Kind = Literal["fsdp", "ddp"]
C, W, I = "critical", "warning", "info"  # noqa: E741 - as in the tables of the documentation


def parallel(kind: Kind) -> Callable[[Net], nn.Module]:
    """Wraps the model."""
    if kind == "fsdp":
        return lambda net: fully_shard(net)
    return lambda net: DistributedDataParallel(net, broadcast_buffers=False)


def build(kind: Kind, rank: int, ranks: int, **options: Any) -> Run:
    """The run of one rank; a world of one has no wrapper."""
    chosen = (lambda net: net) if ranks == 1 else parallel(kind)
    # 8 samples a step on any number of ranks.
    batch = options.pop("batch", None) or dckpt.Batch(micro=2, accumulation=4 // ranks, data_parallel=ranks)
    own = {"parallel": chosen, "rank": rank, "ranks": ranks, "batch": batch, "scaler": {"enabled": False}}
    return Run(**{**own, **options})


def save(rank: int, ranks: int, root: str, kind: Kind, options: dict[str, Any]) -> None:
    """Two checkpoints."""
    run = build(kind, rank, ranks, seed=1, **options)
    with open_run(Path(root)) as checkpointer:
        checkpointer.resume(run.state)
        for _ in range(2):
            run.train(4)
            assert checkpointer.save(run.state, blocking=True).outcome == "committed"


@dataclass(frozen=True)
class RankCase:
    """As `Case`. spoil: done on every rank, with its number; a collective may be in it. kinds: to which it applies."""

    name: str
    expected: dict[str, str]
    says: str
    spoil: Callable[[Run, int], object] = lambda *_: None
    build: dict[str, Any] = field(default_factory=dict)
    kinds: tuple[Kind, ...] = ("fsdp", "ddp")


def judge_all(
    rank: int, ranks: int, root: str, kind: Kind, names: Sequence[str], allow_missing: Sequence[str] = ()
) -> list[Outcome]:
    """For each case a run that is built, loaded, spoiled and validated, and what came of it."""
    found = []
    cases = {case.name: case for case in RANK_CASES}
    with open_run(Path(root)) as checkpointer:
        for name in names:
            found.append(outcome(lambda: _judge(checkpointer, rank, ranks, kind, cases[name], allow_missing)))  # noqa: B023
    return found


def _judge(
    checkpointer: dckpt.Checkpointer,
    rank: int,
    ranks: int,
    kind: Kind,
    case: RankCase,
    allow_missing: Sequence[str],
) -> dckpt.ResumeReport:
    run = build(kind, rank, ranks, seed=2, **case.build)
    earlier = checkpointer.load(run.state, 4, allow_missing=allow_missing)
    loaded = checkpointer.load(run.state, allow_missing=allow_missing)
    if case.name == ANOTHER_CHECKPOINT and rank == 1:
        loaded = earlier
    with torch.no_grad():
        case.spoil(run, rank)
    try:
        return validate(checkpointer, run.state, loaded)
    finally:
        torch.set_float32_matmul_precision("highest")


ANOTHER_CHECKPOINT = "another checkpoint on one rank"


def _one(change: Callable[[Run], object]) -> Callable[[Run, int], object]:
    """On rank 1 alone."""
    return lambda run, rank: change(run) if rank == 1 else None


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _rolled(run: Run, _: int) -> None:
    _change(run.model.up.weight, lambda whole: whole.roll(16, 0))


def _duplicated(run: Run, _: int) -> None:
    _change(run.model.up.weight, lambda whole: torch.cat((whole[:16], whole[:16])))


def _zeroed(run: Run, _: int) -> None:
    _change(run.model.down.weight, torch.zeros_like)


def _columns(run: Run, _: int) -> None:
    _change(run.model.down.weight, lambda whole: torch.cat((whole[:, 16:], whole[:, :16]), dim=1))


def _flip(run: Run) -> None:
    _local(run.model.up.weight).view(torch.int32)[1, 1] ^= 1


def _swap_moments(run: Run) -> None:
    one, other = (_local(run.moments(f"twin_{letter}.weight")["exp_avg"]) for letter in "ab")
    held = one.clone()
    one.copy_(other)
    other.copy_(held)


def _untie(run: Run) -> None:
    run.model.head.weight = nn.Parameter(run.model.embed.weight.detach().clone())


def _meta(run: Run) -> None:
    run.model.rotary = torch.empty(16, device="meta")


def _gradient(run: Run) -> None:
    run.model.up.weight.grad = torch.ones_like(run.model.up.weight)


def _reseed_all(_: Run, rank: int) -> None:
    torch.manual_seed(5)


def _other_matmul(_: Run, rank: int) -> None:
    torch.set_float32_matmul_precision("high" if rank == 1 else "highest")


FINGERPRINTS = {"fingerprints": C}

RANK_CASES = [
    RankCase("unspoiled", {}, ""),
    # Streams.
    RankCase(
        "random stream of one rank replaced",
        {"rng_pattern": C},
        "torch on rank 1",
        _one(lambda _: torch.manual_seed(77)),
    ),
    RankCase("ranks seeded alike", {"rng_pattern": C}, "is now the same on ranks 0, 1", _reseed_all),
    RankCase(
        "a stream of all differs on one rank",
        {"rng_pattern": C},
        "numpy was equal on all ranks",
        _one(lambda _: np.random.seed(9)),
    ),
    RankCase("one rank draws a number", {"rng_pattern": C}, "python", _one(lambda _: random.random())),
    # Flags.
    RankCase("eval mode on one rank", {"train_mode": C}, "rank 1", _one(lambda run: run.model.eval())),
    RankCase("dropout in eval mode on one rank", {"train_mode": C}, "drop", _one(lambda run: run.model.drop.eval())),
    RankCase("no dropout on one rank", {"dropout": W}, "rank 1", _one(lambda run: setattr(run.model.drop, "p", 0.0))),
    RankCase(
        "a layer frozen on one rank",
        {"trainable": C},
        "rank 1",
        _one(lambda run: run.model.up.weight.requires_grad_(False)),
    ),
    RankCase(
        "a layer unfrozen on one rank",
        {"trainable": C},
        "rank 1",
        _one(lambda run: run.model.frozen.weight.requires_grad_(True)),
    ),
    RankCase("untied on one rank", {"tied_weights": C}, "rank 1", _one(_untie), kinds=("ddp",)),
    RankCase("untied on all ranks", {"tied_weights": C}, "head.weight was tied to", lambda run, _: _untie(run)),
    RankCase("gradients left over on one rank", {"gradients": C}, "rank 1", _one(_gradient)),
    RankCase(
        "a computed buffer differs on one rank",
        {"computed_buffers": C},
        "rank 1",
        _one(lambda run: run.model.rotary.mul_(2)),
    ),
    RankCase("a computed buffer never computed on one rank", {"computed_buffers": C}, "rotary", _one(_meta)),
    # Values.
    RankCase("shards at wrong offsets", FINGERPRINTS, "model.up.weight", _rolled),
    RankCase("a duplicated half", FINGERPRINTS, "model.up.weight", _duplicated),
    RankCase("a feed-forward matrix zeroed", FINGERPRINTS, "model.down.weight", _zeroed),
    RankCase("columns exchanged", FINGERPRINTS, "model.down.weight", _columns),
    RankCase("one bit of one rank's shard", FINGERPRINTS, "model.up.weight", _one(_flip), kinds=("fsdp",)),
    RankCase("one bit of one replica", {"replicas": C}, "rank 1", _one(_flip), kinds=("ddp",)),
    RankCase(
        "moments of one rank zeroed",
        FINGERPRINTS,
        "exp_avg",
        _one(lambda run: [_local(m).zero_() for m in run.all_moments("exp_avg")]),
        kinds=("fsdp",),
    ),
    RankCase(
        "moments of one replica zeroed",
        {"replicas": C},
        "exp_avg",
        _one(lambda run: [m.zero_() for m in run.all_moments("exp_avg")]),
        kinds=("ddp",),
    ),
    RankCase(
        "moments swapped on one rank", FINGERPRINTS, "optim.twin_a.weight.exp_avg", _one(_swap_moments), kinds=("fsdp",)
    ),
    RankCase(
        "moments scaled on all ranks",
        FINGERPRINTS,
        "exp_avg_sq",
        lambda run, _: [_local(m).mul_(4) for m in run.all_moments("exp_avg_sq")],
    ),
    RankCase(
        "average drifted on one rank",
        FINGERPRINTS,
        "averaged",
        _one(lambda run: _local(run.ema["up.weight"]).add_(1)),
        kinds=("fsdp",),
    ),
    RankCase(
        "average of one replica drifted",
        {"replicas": C},
        "ema.up.weight",
        _one(lambda run: run.ema["up.weight"].add_(1)),
        kinds=("ddp",),
    ),
    RankCase(
        "NaN on one rank",
        {"finite_weights": C},
        "model.up.weight",
        _one(lambda run: _local(run.model.up.weight)[0, 0].fill_(float("nan"))),
    ),
    RankCase(
        "infinite moment on one rank",
        {"moments_valid": C},
        "optim.up.weight.exp_avg_sq",
        _one(lambda run: _local(run.moments("up.weight")["exp_avg_sq"])[0, 0].fill_(float("inf"))),
    ),
    RankCase("a buffer stale on one rank", {"replicas": C}, "model.seen", _one(lambda run: run.model.seen.sub_(1))),
    RankCase(
        "a buffer of one rank's own lost",
        FINGERPRINTS,
        "running_mean",
        _one(lambda run: run.model.norm.running_mean.zero_()),
    ),
    # Optimizer, schedule, counters.
    RankCase(
        "learning rate on one rank",
        {"learning_rate": C},
        "on rank 1",
        _one(lambda run: run.optimizer.param_groups[0].update(lr=0.5)),
    ),
    RankCase(
        "weight decay on one rank",
        {"optimizer_options": C},
        "on rank 1",
        _one(lambda run: run.optimizer.param_groups[0].update(weight_decay=0.5)),
    ),
    RankCase(
        "step counters on one rank",
        {"optimizer_steps": C},
        "on rank 1",
        _one(lambda run: [_local(step).zero_() for step in run.all_moments("step")]),
    ),
    RankCase("schedule stepped on one rank", {"scheduler": C}, "on rank 1", _one(lambda run: run.scheduler.step())),
    RankCase(
        "counter on one rank", {"same_checkpoint": C}, "rank", _one(lambda run: setattr(run.progress, "step", 99))
    ),
    RankCase(ANOTHER_CHECKPOINT, {"same_checkpoint": C}, "rank"),
    RankCase(
        "position in the data on one rank",
        {"data_order": C},
        "on rank 1",
        _one(lambda run: run.sampler.load_state_dict({**run.sampler.state_dict(), "cursor": 8})),
    ),
    # Settings.
    RankCase(
        "another batch on one rank",
        {"ranks_agree": C},
        "rank 1 was started with other settings than rank 0: micro 2 -> 1",
        _one(lambda run: setattr(run.progress, "batch", dckpt.Batch(micro=1, accumulation=2, data_parallel=2))),
    ),
    RankCase(
        "another end on one rank",
        {"ranks_agree": C},
        "max_steps 1000 -> 500",
        _one(lambda run: setattr(run.progress, "max_steps", 500)),
    ),
    RankCase("another arithmetic on one rank", {"ranks_agree": W}, "matmul highest -> high", _other_matmul),
    RankCase(
        "a larger batch on each rank",
        {"global_batch": C},
        "is now 16",
        build={"batch": dckpt.Batch(micro=4, accumulation=2, data_parallel=2)},
    ),
    RankCase(
        "the batch split otherwise",
        {"global_batch": I},
        "1 x 4 x 2",
        build={"batch": dckpt.Batch(micro=1, accumulation=4, data_parallel=2)},
    ),
]


def elsewhere(rank: int, ranks: int, root: str, kind: Kind, samples: int) -> Outcome:
    """What a resume on another number of ranks says; `samples` a step."""
    batch = dckpt.Batch(micro=samples // ranks, data_parallel=ranks)
    run = build(kind, rank, ranks, seed=2, batch=batch)
    with open_run(Path(root)) as checkpointer:
        loaded = checkpointer.load(run.state)
        return outcome(lambda: validate(checkpointer, run.state, loaded))


def optimizer_before_wrapping(rank: int, ranks: int, root: str) -> Outcome:
    """The optimizer holds the parameters that there were before the model was sharded."""
    net = Net()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    fully_shard(net)

    def act() -> dckpt.ResumeReport:
        with open_run(Path(root)) as checkpointer:
            report = checkpointer.resume(dckpt.TrainState(model=net, optimizer=optimizer))
            assert report is not None
            return report

    return outcome(act)
