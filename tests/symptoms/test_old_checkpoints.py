"""Old checkpoints without random or optimizer state: torch resumes without a word; dckpt says what is missing and its effect."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from dckpt.cli.main import main
from dckpt.errors import IncompatibleStateError
from tests.support.foreign import ForeignRun, losses_after_resume


def dckpt(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def old_checkpoint(place: Path, *left_out: str) -> tuple[Path, list[float]]:
    """Step 6 of a run, as an older script wrote it; and the losses of the steps that really followed."""
    run = ForeignRun(is_grouped=False)
    run.train(6)
    source = run.write(place, "bin")
    for name in left_out:
        (source / name).unlink()
    return source, run.train(4)


def resume_by_hand(source: Path) -> tuple[ForeignRun, list[float]]:
    """What such scripts do: load what is there, pass over what is not."""
    run = ForeignRun(seed=77, is_grouped=False)
    run.model.load_state_dict(torch.load(source / "pytorch_model.bin", weights_only=True))
    for name, target in (("optimizer.pt", run.optimizer), ("scheduler.pt", run.scheduler)):
        if (source / name).exists():
            target.load_state_dict(torch.load(source / name, weights_only=True))
    moments = len(run.optimizer.state)
    losses = run.train(4)
    assert moments == (13 if (source / "optimizer.pt").exists() else 0)
    return run, losses


def test_without_dckpt_a_missing_random_state_changes_the_run_without_a_word(tmp_path: Path) -> None:
    source, straight = old_checkpoint(tmp_path / "old", "rng_state.pth")

    _, losses = resume_by_hand(source)

    assert losses != straight


def test_without_dckpt_missing_moments_restart_at_zero_without_a_word(tmp_path: Path) -> None:
    source, straight = old_checkpoint(tmp_path / "old", "optimizer.pt")

    run, losses = resume_by_hand(source)

    assert losses != straight
    assert {int(held["step"]) for held in run.optimizer.state.values()} == {4}, "bias correction began anew, too"


def test_a_missing_random_state_is_said_and_derived_the_same_each_time(tmp_path: Path) -> None:
    source, _ = old_checkpoint(tmp_path / "old", "rng_state.pth")

    verified = dckpt("verify", source)
    assert verified.exit_code == 1
    assert "PARTIAL" in verified.stdout and "No rng (no random streams): random streams restart" in verified.stdout
    first = dckpt("repair", source, "--to", tmp_path / "a", "--yes")
    second = dckpt("repair", source, "--to", tmp_path / "b", "--yes")

    assert first.exit_code == second.exit_code == 0
    assert "by the rule" in first.stdout and "the draws differ from the uninterrupted run" in first.stdout
    losses, step = losses_after_resume(tmp_path / "a", 4, is_grouped=False)
    assert step == 6
    assert losses_after_resume(tmp_path / "b", 4, is_grouped=False) == (losses, 6)
    assert dckpt("verify", tmp_path / "a").stdout.count("rng        present") == 1


def test_missing_moments_are_said_never_invented_and_a_resume_with_an_optimizer_is_refused(tmp_path: Path) -> None:
    source, _ = old_checkpoint(tmp_path / "old", "optimizer.pt")

    verified = dckpt("verify", source)
    assert verified.exit_code == 1
    assert "moments are lost and are not invented" in verified.stdout and "loss spike" in verified.stdout
    repaired = dckpt("repair", source, "--to", tmp_path / "run", "--yes")

    assert repaired.exit_code == 1
    assert "moments are lost" in repaired.stdout and "Missing in it: optim, data" in repaired.stdout
    with pytest.raises(IncompatibleStateError, match="optim"):
        losses_after_resume(tmp_path / "run", 4, is_grouped=False)


def test_a_whole_one_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    source, straight = old_checkpoint(tmp_path / "old")

    assert dckpt("import", source, tmp_path / "run", "--yes").exit_code == 0

    assert losses_after_resume(tmp_path / "run", 4, is_grouped=False) == (straight, 6)
