"""A base vocabulary under new tokens, whose rows must not train; and what goes wrong with the mask that holds them."""

from __future__ import annotations

import re

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import dckpt
from dckpt.resume.explain import read_page

BASE, SIZE = 8, 12


def mask_base_rows(weight: nn.Parameter) -> None:
    """No gradient for the first rows; what everybody writes."""
    keep = (torch.arange(SIZE) >= BASE).float().unsqueeze(1)
    weight.register_hook(lambda gradient: gradient * keep)


class Extended:
    """One start of a fine-tuning of new tokens. replaces_masked_weight: the mask is set on a weight that is then replaced."""

    def __init__(
        self, *, weight_decay: float = 0.0, replaces_masked_weight: bool = False, shards_after: bool = False
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Embedding(SIZE, 6), nn.Linear(6, SIZE))
        mask_base_rows(self.model[0].weight)
        if replaces_masked_weight:
            self.model[0].weight = nn.Parameter(self.model[0].weight.detach().clone())
        if shards_after:
            fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05, weight_decay=weight_decay)
        self.progress = dckpt.TrainProgress(max_steps=1000, batch=dckpt.Batch(SIZE))
        self.state = dckpt.TrainState(
            model=self.model, optimizer=self.optimizer, progress=self.progress, frozen_rows={"0.weight": BASE}
        )

    def train(self, steps: int) -> list[float]:
        losses = []
        tokens = torch.arange(SIZE)
        for _ in range(steps):
            loss = nn.functional.cross_entropy(self.model(tokens), tokens.roll(1))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.progress.advance()
            losses.append(loss.item())
        self.optimizer.zero_grad()
        return losses

    def base_rows(self) -> torch.Tensor:
        """A copy; of all ranks if the model is sharded."""
        weight = self.model[0].weight.detach()
        whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        return whole[:BASE].clone()


def corrupted_rows(found: torch.Tensor, base: torch.Tensor) -> int:
    """How many rows are not those of the base, bit for bit."""
    return int((found != base).any(1).sum())


def train_masked_before_wrapping(rank: int, world_size: int, root: str | None) -> int | str:
    """Without a root: how many base rows five steps corrupted, with torch alone. With one: why the next resume stops."""
    run = Extended(shards_after=True)
    if root is None:
        base = run.base_rows()
        run.train(5)
        return corrupted_rows(run.base_rows(), base)
    with dckpt.Checkpointer(root, deadline_s=30, signals=()) as checkpointer:
        checkpointer.resume(run.state)
        run.train(5)
        checkpointer.save(run.state, blocking=True)
    with dckpt.Checkpointer(root, deadline_s=30, signals=()) as checkpointer:
        try:
            checkpointer.resume(Extended(shards_after=True).state)
        except dckpt.ResumeRejectedError as error:
            return str(error)
    return "nothing was said"


def train_with_the_mask_of_the_page(rank: int, world_size: int) -> tuple[bool, bool]:
    """Whether base rows, and whether new rows, are as before after some steps under `fully_shard`."""
    base, size = 50_257, 50_260
    torch.manual_seed(0)
    model = nn.Module()
    model.embed = nn.Embedding(size, 2)
    before = model.embed.weight.detach().clone()
    fully_shard(model.embed)
    blocks = re.findall(r"```python\n(.*?)```", read_page("frozen_rows").text, flags=re.DOTALL)
    exec(next(block for block in blocks if "register_post" in block), {"torch": torch, "model": model})
    optimizer = torch.optim.AdamW(model.embed.parameters(), lr=0.1, weight_decay=0.0)
    for _ in range(2):
        model.embed(torch.tensor([0, 3, base - 1, base, size - 1])).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model.embed.weight.full_tensor()
    return torch.equal(after[:base], before[:base]), torch.equal(after[base:], before[base:])
