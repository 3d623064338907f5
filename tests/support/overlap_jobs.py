"""Ranks that train an FSDP2 model and save behind it at every step."""

from __future__ import annotations

import hashlib

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import dckpt
from dckpt.dcp.chunks import tensor_digest

WIDTH = 512


class Wide:
    """Parts of 512 KiB a rank: large enough to be copied behind the training."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH))
        for layer in self.model:
            fully_shard(layer)
        fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.progress = dckpt.TrainProgress(max_steps=100)
        self.state = dckpt.TrainState(model=self.model, optimizer=self.optimizer, progress=self.progress)

    def step(self) -> None:
        self.model(torch.randn(8, WIDTH)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.advance()

    def digest(self) -> str:
        captured = self.state.capture()
        digests = [f"{item.name}={tensor_digest(item.tensor)}" for item in captured.tensors]
        return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def save_behind_training(rank: int, world_size: int, root: str, steps: int) -> tuple[dict[int, str], int]:
    """Digests of the state at each step that was saved while training went on, and how many saves had to copy later."""
    loop = Wide(seed=1 + rank)
    found, num_deferred = {}, 0
    with dckpt.Checkpointer(root, deadline_s=30, signals=(), overlap=True) as checkpointer:
        checkpointer.resume(loop.state)
        for _ in range(steps):
            loop.step()
            found[loop.progress.step] = loop.digest()
            checkpointer.save(loop.state)
            assert checkpointer._job is not None
            num_deferred += checkpointer._job.deferred is not None
            loop.step()
    return found, num_deferred


def load_step(rank: int, world_size: int, root: str, step: int) -> str:
    """The digest of a state that was built otherwise and loaded."""
    loop = Wide(seed=11 + rank)
    with dckpt.Checkpointer(root, deadline_s=30, signals=()) as checkpointer:
        checkpointer.load(loop.state, step)
    return loop.digest()
