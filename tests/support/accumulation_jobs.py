"""Jobs that accumulate gradients over micro-batches, and save, die or resume between two of them."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import dckpt
from tests.support.models import digests

AccumulationKind = Literal["single", "ddp", "ddp-views", "ddp-sync", "fsdp", "fsdp-no-sync", "hsdp-no-all-reduce"]
"""What is done with gradients at each micro-batch: "sync" and "fsdp" reduce them, the others at the last one of a step."""

SAMPLES, WIDTH = 600, 5
ACCUMULATION = 4
Place = tuple[int, int]
"""(step, micro-step)."""


class Net(nn.Module):
    """Dropout, a tied weight, a parameter without gradients and one that is not trained."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.last.weight = self.first.weight
        self.drop = nn.Dropout(dropout)
        self.unused = nn.Linear(2, 3)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.drop(torch.tanh(self.first(self.frozen(x)))))


class AccumulatingRun:
    """A loop over micro-batches: of each step's samples rank r takes every W-th from the r-th on."""

    def __init__(
        self,
        kind: AccumulationKind,
        rank: int,
        world_size: int,
        *,
        global_batch: int | None = None,
        micro: int = 2,
        dropout: float = 0.2,
    ) -> None:
        torch.manual_seed(3)
        self.kind, self.rank, self.world_size = kind, rank, world_size
        model: nn.Module = Net(dropout)
        if kind == "hsdp-no-all-reduce":
            mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("replicate", "shard"))
            fully_shard(model, mesh=mesh)
        elif kind.startswith("fsdp"):
            fully_shard(model)
        elif kind.startswith("ddp"):
            model = DistributedDataParallel(
                model, find_unused_parameters=True, gradient_as_bucket_view=kind == "ddp-views"
            )
        self.model = model
        trained = [param for param in model.parameters() if param.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.02, foreach=False)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=50)
        accumulation = ACCUMULATION if global_batch is None else global_batch // (micro * world_size)
        self.batch = dckpt.Batch(micro=micro, accumulation=accumulation, data_parallel=world_size)
        self.progress = dckpt.TrainProgress(batch=self.batch)
        self.state = dckpt.TrainState(
            model=model, optimizer=self.optimizer, scheduler=self.scheduler, progress=self.progress
        )
        self.data = torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(1))
        self.seen: list[tuple[Place, list[int], float]] = []
        torch.manual_seed(100 + rank)

    def train(self, until: Place, on_micro: Callable[[], bool] = lambda: False) -> None:
        """Trains up to a place in the run; `on_micro` is called after each micro-batch, and true ends it."""
        progress = self.progress
        while (progress.step, progress.micro_step) < until:
            for chosen in progress.unconsumed(self._micro_batches()):
                self._backward(chosen)
                progress.accumulate()
                if on_micro() or (progress.step, progress.micro_step) == until:
                    return
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            progress.advance()

    def _micro_batches(self) -> Iterator[torch.Tensor]:
        step, size = self.progress.step, self.batch.samples
        own = torch.arange(step * size, (step + 1) * size)[self.rank :: self.world_size]
        return iter((own % SAMPLES).split(self.batch.micro))

    def _backward(self, chosen: torch.Tensor) -> None:
        progress = self.progress
        is_last = progress.micro_step + 1 == self.batch.accumulation
        model: Any = self.model
        if isinstance(model, FSDPModule):
            if self.kind == "fsdp-no-sync":
                model.set_requires_gradient_sync(is_last)
            if self.kind == "hsdp-no-all-reduce":
                model.set_requires_all_reduce(is_last)
        waits = self.kind in ("ddp", "ddp-views") and not is_last
        with model.no_sync() if waits else contextlib.nullcontext():
            loss = (self.model(self.data[chosen]) - 1).square().mean()
            (loss / self.batch.accumulation).backward()
        self.seen.append(((progress.step, progress.micro_step), chosen.tolist(), loss.item()))


def _open(root: str) -> dckpt.Checkpointer:
    return dckpt.Checkpointer(root, deadline_s=30, signals=())


def train_straight(rank: int, world_size: int, kind: AccumulationKind, until: Place) -> Any:
    """The run that nothing interrupts."""
    run = AccumulatingRun(kind, rank, world_size)
    run.train(until)
    return run.seen, digests(run.state)


def save_and_die(
    rank: int,
    world_size: int,
    root: str,
    kind: AccumulationKind,
    place: Place,
    how: Literal["blocking", "async", "overlap"],
) -> None:
    """Saves at a place in the middle of a step, goes on into the next step, and is killed."""
    run = AccumulatingRun(kind, rank, world_size)
    checkpointer = dckpt.Checkpointer(root, deadline_s=30, signals=(), overlap=how == "overlap")
    checkpointer.resume(run.state)
    run.train(place)
    pending = checkpointer.save(run.state, blocking=how == "blocking")
    run.train((place[0] + 1, 1))
    assert pending.wait(30) == "committed", pending.error
    with contextlib.suppress(RuntimeError):  # another rank may leave the barrier, and die, while this one is in it
        if dist.is_initialized():
            dist.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


def resume_and_train(rank: int, world_size: int, root: str, kind: AccumulationKind, until: Place) -> Any:
    """Resumes and trains on; also what the report says, and where it began."""
    run = AccumulatingRun(kind, rank, world_size)
    with _open(root) as checkpointer:
        report = checkpointer.resume(run.state)
        assert report is not None
        begun = run.progress.step, run.progress.micro_step
        run.train(until)
        return run.seen, digests(run.state), begun, report.to_json()


def save_at(
    rank: int,
    world_size: int,
    root: str,
    kind: AccumulationKind,
    place: Place,
    gradients: Literal["store", "drop"] = "store",
    global_batch: int | None = None,
    micro: int = 2,
    dropout: float = 0.0,
) -> Any:
    """Saves at a place; returns what was seen, and the outcome or the error."""
    run = AccumulatingRun(kind, rank, world_size, global_batch=global_batch, micro=micro, dropout=dropout)
    with _open(root) as checkpointer:
        checkpointer.resume(run.state)
        run.train(place)
        try:
            pending = checkpointer.save(run.state, blocking=True, gradients=gradients)
        except dckpt.DckptError as error:
            return type(error).__name__, str(error)
        return pending.outcome, pending.checkpoint, run.seen, gradients_of(run)


def gradients_of(run: AccumulatingRun) -> dict[str, torch.Tensor]:
    """Whole gradients by parameter. A collective under FSDP."""
    found = {}
    for name, param in run.model.named_parameters():
        if param.grad is not None:
            grad: Any = param.grad
            found[name.removeprefix("module.")] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone()
    return found


def resume_elsewhere(
    rank: int,
    world_size: int,
    root: str,
    kind: AccumulationKind,
    global_batch: int,
    micro: int,
    gradients: Literal["restore", "drop"],
    until: Place,
) -> Any:
    """Resumes with other ranks or micro-batches; the error if it is refused."""
    run = AccumulatingRun(kind, rank, world_size, global_batch=global_batch, micro=micro, dropout=0.0)
    with _open(root) as checkpointer:
        try:
            report = checkpointer.resume(run.state, policy=dckpt.ResumePolicy(gradients=gradients))
        except dckpt.DckptError as error:
            return type(error).__name__, str(error)
        assert report is not None
        begun, grads = (run.progress.step, run.progress.micro_step), gradients_of(run)
        run.train(until)
        return begun, grads, run.seen, report.to_json()


def stop_within(rank: int, world_size: int, root: str, kind: AccumulationKind, victim: int) -> Any:
    """One rank gets a signal after the first micro-batch of step 2; `step` is called after every micro-batch."""
    run = AccumulatingRun(kind, rank, world_size)
    actions = []
    with dckpt.Checkpointer(root, deadline_s=30, signals=(signal.SIGUSR1,)) as checkpointer:
        checkpointer.resume(run.state)

        def on_micro() -> bool:
            if rank == victim and (run.progress.step, run.progress.micro_step) == (2, 1):
                os.kill(os.getpid(), signal.SIGUSR1)
            if run.progress.micro_step < ACCUMULATION:
                actions.append(checkpointer.step(run.state))
            return bool(actions) and actions[-1] is dckpt.Stop

        while not (actions and actions[-1] is dckpt.Stop) and run.progress.step < 200:
            run.train((run.progress.step + 1, 0), on_micro)
            if not run.progress.micro_step:
                actions.append(checkpointer.step(run.state))
        return run.progress.step, run.progress.micro_step, checkpointer.steps(), run.progress.step < 200
