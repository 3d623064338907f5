"""Jobs that train on real loaders, each start on its own number of ranks; they return which samples were trained on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import dckpt

SIZE = 103
GLOBAL_BATCH = 8


class Numbers(Dataset):
    """Each item is its own index."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> int:
        return index


class DataRun:
    """A small training run over `Numbers` that remembers which samples it saw."""

    def __init__(self, rank: int, batch: dckpt.Batch, *, size: int = SIZE, **limits: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(1, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.batch = batch
        self.progress = dckpt.TrainProgress(batch=batch, **limits)
        self.sampler = dckpt.ElasticDistributedSampler(size, batch=batch, seed=3, rank=rank)
        self.loader = DataLoader(Numbers(), batch_sampler=self.sampler.batches(), generator=torch.Generator())
        self.state = dckpt.TrainState(
            model=self.model, optimizer=self.optimizer, data=self.sampler, progress=self.progress
        )
        self.seen: list[tuple[int, int]] = []

    def train(self, steps: int) -> None:
        """So many optimizer steps, over the ends of epochs."""
        while steps:
            for number, micro in enumerate(self.loader, 1):
                self.seen += [(self.sampler.epoch, index) for index in micro.tolist()]
                if number % self.batch.accumulation == 0:
                    self.optimizer.step()
                    self.progress.advance(loss=1.0)
                    steps -= 1
                if not steps:
                    break


def train_and_save(
    rank: int, world_size: int, root: str, micro: int, steps: int, lost: int
) -> tuple[list[tuple[int, int]], dict[str, Any]]:
    """Resumes, trains `steps`, saves; then trains `lost` more, which no checkpoint has. What was saved, and the position."""
    accumulation = GLOBAL_BATCH // (micro * world_size)
    run = DataRun(rank, dckpt.Batch(micro, accumulation, world_size))
    with dckpt.Checkpointer(root, deadline_s=30, signals=()) as checkpointer:
        checkpointer.resume(run.state)
        run.train(steps)
        pending = checkpointer.save(run.state, blocking=True)
        assert pending.outcome == "committed", pending.error
        seen, position = list(run.seen), run.sampler.state_dict()
        run.train(lost)
    return seen, position


def resume_with(rank: int, world_size: int, root: str, seed: int, size: int) -> str:
    """The error of a resume with another order, and whether anything live changed before it was raised."""
    batch = dckpt.Batch(2, 1, world_size)
    model, progress = nn.Linear(1, 1), dckpt.TrainProgress(batch=batch)
    before = model.weight.clone()
    sampler = dckpt.ElasticDistributedSampler(size, batch=batch, seed=seed, rank=rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = dckpt.TrainState(model=model, optimizer=optimizer, data=sampler, progress=progress)
    with dckpt.Checkpointer(root, deadline_s=30, signals=()) as checkpointer:
        try:
            checkpointer.resume(state)
        except dckpt.IncompatibleStateError as error:
            assert torch.equal(model.weight, before) and progress.step == 0
            return str(error)
    return "no error"


def second_round(rank: int, world_size: int, root: str, size: int, steps: int) -> tuple[bool, dict[str, Any], dict]:
    """Begins the leg "round-2" on `size` samples, or goes on in it: whether it began, the counters, the position."""
    batch = dckpt.Batch(GLOBAL_BATCH // world_size, 1, world_size)
    run = DataRun(rank, batch, size=size, max_steps=6)
    with dckpt.Checkpointer(root, deadline_s=30, signals=(), save=dckpt.Every(steps=1)) as checkpointer:
        begun = checkpointer.start_leg(run.state, name="round-2")
        for _ in range(steps):
            run.progress.advance(loss=1.0)
            checkpointer.step(run.state)
    progress = run.progress
    counters = {
        name: getattr(progress, name) for name in ("step", "leg", "leg_step", "leg_samples", "leg_epoch", "done")
    }
    return begun, counters, run.sampler.state_dict()
