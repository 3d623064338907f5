"""The loss spikes after a resume: first with torch alone, then it does not, or it is said before the first step or soon after."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dckpt

STEPS = 200
DATA = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))


class Run:
    """One start of a training that has nearly converged after `STEPS` steps."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.02)
        self.progress = dckpt.TrainProgress(max_steps=10 * STEPS, batch=dckpt.Batch(64))
        self.state = dckpt.TrainState(model=self.model, optimizer=self.optimizer, progress=self.progress)

    def train(self, steps: int, checkpointer: dckpt.Checkpointer | None = None) -> list[float]:
        losses = []
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = (self.model(DATA) - DATA.sum(1, keepdim=True).sin()).square().mean()
            loss.backward()
            self.optimizer.step()
            self.progress.advance(loss=loss.detach())
            losses.append(loss.item())
            if checkpointer is not None:
                checkpointer.step(self.state)
        self.optimizer.zero_grad()
        return losses


def save(root: Path, run: Run) -> None:
    with dckpt.Checkpointer(root, signals=()) as checkpointer:
        checkpointer.resume(run.state)
        assert checkpointer.save(run.state, blocking=True).outcome == "committed"


def lose_moments(run: Run) -> None:
    for held in run.optimizer.state.values():
        held["exp_avg"].zero_()
        held["exp_avg_sq"].zero_()


def test_torch_alone_the_loss_spikes_when_only_weights_come_back(tmp_path: Path) -> None:
    run = Run()
    before = run.train(STEPS)
    torch.save(run.model.state_dict(), tmp_path / "model.pt")
    expected = run.train(5)

    resumed = Run(seed=9)
    resumed.model.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    found = resumed.train(5)

    assert max(expected) < 1.2 * before[-1]
    assert found[0] == expected[0], "the first loss looks right: the weights are"
    assert max(found) > 5 * before[-1]


def test_the_loss_goes_on_bit_for_bit(tmp_path: Path) -> None:
    run = Run()
    run.train(STEPS)
    save(tmp_path / "run", run)
    expected = run.train(5)

    resumed = Run(seed=9)
    with dckpt.Checkpointer(tmp_path / "run", signals=()) as checkpointer:
        checkpointer.resume(resumed.state)

    assert resumed.train(5) == expected


def test_moments_that_were_lost_before_the_save_stop_the_resume_before_the_spike(tmp_path: Path) -> None:
    run = Run()
    run.train(STEPS)
    lose_moments(run)
    save(tmp_path / "run", run)

    with (
        dckpt.Checkpointer(tmp_path / "run", signals=()) as checkpointer,
        pytest.raises(dckpt.ResumeRejectedError, match=r"\[moments_lost\].*the loss will spike"),
    ):
        checkpointer.resume(Run().state)


def resume_and_watch(root: Path, spoil: Any, caplog: pytest.LogCaptureFixture) -> str:
    resumed = Run(seed=9)
    with caplog.at_level(logging.WARNING, "dckpt"), dckpt.Checkpointer(root, signals=()) as checkpointer:
        checkpointer.resume(resumed.state)
        spoil(resumed)
        resumed.train(10, checkpointer)
    return caplog.text


def test_a_spike_that_begins_after_the_resume_is_said_within_its_first_steps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By then no check of the checkpoint can know: the program itself throws the moments away."""
    run = Run()
    run.train(STEPS)
    save(tmp_path / "run", run)

    assert "first_steps" not in resume_and_watch(tmp_path / "run", lambda resumed: None, caplog)
    assert "[first_steps] the loss rose to" in resume_and_watch(tmp_path / "run", lose_moments, caplog)
