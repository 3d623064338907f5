"""Checkpoints as other programs write them: the files of a trainer, or one training_state.pt; and the run that wrote them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from torch import nn

import dckpt

Kind = Literal["bin", "safetensors", "sharded", "bundle", "bundle beside weights"]


class Block(nn.Module):
    """Parameters whose order is not that of their names, several of one shape: only the true order tells them apart."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(torch.tanh(self.query(self.norm(x))) * self.key(x))


class Net(nn.Module):
    """Tied embedding and head; a buffer; blocks with dropout."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.head = nn.Linear(width, 16, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("inv_freq", torch.arange(4.0))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class ForeignRun:
    """Trains as a script without dckpt would; every random stream is used."""

    def __init__(self, seed: int = 0, *, is_grouped: bool = True) -> None:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        self.model = Net()
        named = list(self.model.named_parameters())
        decay = [p for n, p in named if not (n.endswith("bias") or "norm" in n)]
        rest = [p for n, p in named if n.endswith("bias") or "norm" in n]
        groups: Any = [p for _, p in named]
        if is_grouped:
            groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 0.9**step)
        self.progress = dckpt.TrainProgress(max_steps=100)
        self.state = dckpt.TrainState(
            model=self.model, optimizer=self.optimizer, scheduler=self.scheduler, progress=self.progress
        )

    @property
    def names_in_order(self) -> list[str]:
        """What `--order` wants: the optimizer's parameters by name."""
        names = {id(p): n for n, p in self.model.named_parameters()}
        return [names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            tokens = torch.randint(0, 16, (4,)) + random.randrange(1) + int(np.random.rand() < 0)
            loss = self.model(tokens).square().mean() * (1 + random.random() + np.random.rand())
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.progress.advance(loss=loss.item())
            losses.append(loss.item())
        return losses

    def write(self, place: Path, kind: Kind, *, ranks: int = 1) -> Path:
        """The checkpoint's directory, or file."""
        place.mkdir(parents=True, exist_ok=True)
        weights = self.model.state_dict()
        streams = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
        if kind.startswith("bundle"):
            record: dict[str, Any] = {
                "optimizer_state_dict": self.optimizer.state_dict(),
                "scheduler_state_dict": self.scheduler.state_dict(),
                "rng_states": streams if ranks == 1 else [streams] * ranks,
                "global_step": self.progress.step,
                "epoch": 1,
                "best_loss": 0.5,
            }
            if kind == "bundle":
                record["model_state_dict"] = weights
            else:
                torch.save(weights, place / "pytorch_model.bin")
            torch.save(record, place / "training_state.pt")
            return place
        _write_weights(place, weights, kind)
        torch.save(self.optimizer.state_dict(), place / "optimizer.pt")
        torch.save(self.scheduler.state_dict(), place / "scheduler.pt")
        for rank in range(ranks):
            torch.save(streams, place / ("rng_state.pth" if ranks == 1 else f"rng_state_{rank}.pth"))
        history = [{"step": step, "loss": loss, "learning_rate": 0.1} for step, loss in self.progress.loss_history]
        trainer = {"global_step": self.progress.step, "epoch": 1.5, "max_steps": 100, "log_history": history}
        (place / "trainer_state.json").write_text(json.dumps(trainer))
        return place


def _write_weights(place: Path, weights: dict[str, torch.Tensor], kind: Kind) -> None:
    if kind == "bin":
        torch.save(weights, place / "pytorch_model.bin")
        return
    untied = {name: tensor for name, tensor in weights.items() if name != "head.weight"}
    if kind == "safetensors":
        safetensors.torch.save_file(untied, place / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(untied)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in shards.items():
        safetensors.torch.save_file({name: untied[name] for name in held}, place / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))


def losses_after_resume(root: Path, steps: int, **options: Any) -> tuple[list[float], int]:
    """Resumes the imported run into a fresh process's objects and trains on; the step it resumed at."""
    run = ForeignRun(seed=77, **options)
    with dckpt.Checkpointer(root, signals=()) as checkpointer:
        report = checkpointer.resume(run.state)
        assert report is not None
        step = run.progress.step
        losses = run.train(steps)
        assert checkpointer.save(run.state, blocking=True).outcome == "committed"
    return losses, step
