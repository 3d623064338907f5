"""TensorBoard events of a run: read back with TensorBoard's own reader."""

from __future__ import annotations

from pathlib import Path

import pytest

import dckpt
from tests.support.resume_runs import SmallRun

event_accumulator = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator", reason="TensorBoard is not installed"
)


def train(root: Path, directory: Path, steps: int) -> list[float]:
    run = SmallRun()
    with dckpt.Checkpointer(root, save=dckpt.Every(steps=4), signals=(), tensorboard=directory) as checkpointer:
        checkpointer.resume(run.state)
        losses = []
        for _ in range(steps):
            losses += run.train(1)
            checkpointer.step(run.state)
        checkpointer.save(run.state, blocking=True)
        return losses


def read(directory: Path):
    found = event_accumulator.EventAccumulator(str(directory))
    found.Reload()
    return found


def test_losses_rates_and_resumes_are_events(tmp_path):
    losses = train(tmp_path / "run", tmp_path / "events", 6)
    losses += train(tmp_path / "run", tmp_path / "events", 3)
    events = read(tmp_path / "events")

    told = events.Scalars("train/loss")
    assert [event.step for event in told] == list(range(1, 10))
    assert [event.value for event in told] == pytest.approx(losses)
    rates = events.Scalars("train/lr")
    assert [event.step for event in rates] == list(range(1, 10))
    assert rates[0].value > rates[-1].value > 0
    (marker,) = events.Scalars("dckpt/resumed_at")
    assert (marker.step, marker.value) == (6, 6.0)
    (text,) = events.Tensors("dckpt/resume")
    assert b"Resumed from step-0000000006" in text.tensor_proto.string_val[0]


def test_events_that_cannot_be_written_end_and_training_goes_on(tmp_path, caplog):
    (tmp_path / "events").write_text("a file where a directory should be")
    train(tmp_path / "run", tmp_path / "events", 1)

    assert "no TensorBoard events" in caplog.text
    assert [path.name for path in (tmp_path / "run").glob("step-*")] == ["step-0000000001.g0001"]
