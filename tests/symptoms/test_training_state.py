"""What people report after a resume: each first happens with torch alone, then it is gone, or said, with dckpt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

import dckpt
from tests.support.ranks import RankPool
from tests.support.rng_jobs import draw_save_draw

DATA = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
ACCUMULATION = 4


def build(seed: int = 0) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Dropout(0.3), nn.Linear(12, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=0.02)


def loss_of(model: nn.Module, number: int) -> torch.Tensor:
    rows = DATA[4 * number % 64 :][:4]
    return (model(rows) - rows.sum(1, keepdim=True)).square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, begin: int = 0) -> list[float]:
    losses = []
    for number in range(begin, begin + steps):
        optimizer.zero_grad()
        loss = loss_of(model, number)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([param.detach().flatten() for param in model.parameters()])


def save(root: Path, state: dckpt.TrainState, **options: Any) -> None:
    with dckpt.Checkpointer(root, signals=()) as checkpointer:
        checkpointer.resume(state)
        assert checkpointer.save(state, blocking=True, **options).outcome == "committed"


def resume(root: Path, state: dckpt.TrainState) -> dckpt.ResumeReport:
    with dckpt.Checkpointer(root, signals=()) as checkpointer:
        report = checkpointer.resume(state)
    assert report is not None
    return report


# A model left in eval mode after a failed validation.


def validate(model: nn.Module) -> None:
    model.eval()
    raise RuntimeError("CUDA out of memory")


def test_torch_alone_a_validation_that_fails_leaves_dropout_off_for_the_rest_of_training() -> None:
    model, _ = build()
    with pytest.raises(RuntimeError):
        validate(model)
    assert not model[2].training
    assert torch.equal(model(DATA), model(DATA))


def test_a_validation_that_fails_leaves_every_module_as_it_was() -> None:
    model, _ = build()
    torch.manual_seed(3)
    expected = model(DATA)
    torch.manual_seed(3)
    with pytest.raises(RuntimeError), dckpt.evaluating(model):
        model(DATA)
        validate(model)
    assert all(module.training for module in model.modules())
    assert torch.equal(model(DATA), expected), "nor did the validation draw from the training's random numbers"


def test_a_model_that_was_left_in_eval_mode_is_caught_by_the_next_resume(tmp_path: Path) -> None:
    model, optimizer = build()
    save(tmp_path / "run", dckpt.TrainState(model=model, optimizer=optimizer), step=0)

    model, optimizer = build()
    with pytest.raises(RuntimeError):
        validate(model)
    state = dckpt.TrainState(model=model, optimizer=optimizer)
    with pytest.raises(
        dckpt.ResumeRejectedError, match=r"\[train_mode\].*dropout or BatchNorm layers work differently"
    ):
        resume(tmp_path / "run", state)
    model.train()
    resume(tmp_path / "run", state)


# Random states missing, or a crash, because the number of GPUs changed.


def test_torch_alone_a_file_of_random_state_a_rank_is_missing_on_more_ranks_or_replayed_on_fewer_and_more_again(
    tmp_path: Path,
) -> None:
    for rank in range(2):
        torch.manual_seed(rank)
        torch.rand(100)
        torch.save(torch.get_rng_state(), tmp_path / f"rng_state_{rank}.pth")
    with pytest.raises(FileNotFoundError):
        torch.load(tmp_path / "rng_state_2.pth")
    # "Then leave it out": rank 2 begins its launch seed again and again.
    draws = []
    for _ in range(2):
        torch.manual_seed(2)
        draws.append(torch.rand(3))
    assert torch.equal(*draws)


@pytest.mark.distributed
def test_on_another_number_of_ranks_every_rank_has_streams_and_none_is_replayed(
    ranks: RankPool, tmp_path: Path
) -> None:
    seen: list[float] = []
    for world_size in (2, 4, 2):
        # The same launch seed at every start, as a script has it.
        found = ranks.run(draw_save_draw, world_size, str(tmp_path / "run"), 1)
        seen += [number for drawn, *_ in found for number in (*drawn["torch"], *drawn["python"])]
        told = found[0][2]
    assert len(set(seen)) == len(seen)
    assert told["torch"] == "re-derived"


# Stopped in the middle of an accumulation: micro-batches lost.


def accumulate(model: nn.Module, numbers: range) -> None:
    for number in numbers:
        (loss_of(model, number) / ACCUMULATION).backward()


def uninterrupted() -> torch.Tensor:
    model, optimizer = build()
    accumulate(model, range(ACCUMULATION))
    optimizer.step()
    return weights(model)


def test_torch_alone_the_micro_batches_before_a_stop_are_in_no_step(tmp_path: Path) -> None:
    model, optimizer = build()
    accumulate(model, range(2))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "batches": 2}, tmp_path / "state.pt")

    model, optimizer = build(seed=9)
    saved = torch.load(tmp_path / "state.pt")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    accumulate(model, range(saved["batches"], ACCUMULATION))
    optimizer.step()
    assert not torch.allclose(weights(model), uninterrupted(), atol=1e-4)


def accumulating(seed: int) -> tuple[nn.Module, torch.optim.AdamW, dckpt.TrainState]:
    model, optimizer = build(seed)
    progress = dckpt.TrainProgress(batch=dckpt.Batch(micro=4, accumulation=ACCUMULATION))
    return model, optimizer, dckpt.TrainState(model=model, optimizer=optimizer, progress=progress)


def test_the_micro_batches_before_a_stop_are_in_the_step_after_the_resume(tmp_path: Path) -> None:
    model, _, state = accumulating(0)
    accumulate(model, range(2))
    state.progress.accumulate(), state.progress.accumulate()
    save(tmp_path / "run", state)

    model, optimizer, state = accumulating(9)
    report = resume(tmp_path / "run", state)
    assert (report.loaded.micro_step, report.loaded.continued_micro_step, state.progress.micro_step) == (2, 2, 2)
    accumulate(model, range(state.progress.micro_step, ACCUMULATION))
    optimizer.step()
    assert torch.equal(weights(model), uninterrupted())


def test_micro_batches_that_were_given_up_are_said_to_be_lost(tmp_path: Path) -> None:
    model, _, state = accumulating(0)
    accumulate(model, range(2))
    state.progress.accumulate(), state.progress.accumulate()
    save(tmp_path / "run", state, gradients="drop")

    *_, state = accumulating(9)
    report = resume(tmp_path / "run", state)
    assert state.progress.micro_step == 0
    assert "2 micro-batches" in str(report)


# A learning-rate schedule that is not the optimizer's.


def schedule(optimizer: torch.optim.Optimizer) -> SequentialLR:
    warm, cool = LinearLR(optimizer, 0.001, total_iters=20), CosineAnnealingLR(optimizer, T_max=100)
    return SequentialLR(optimizer, [warm, cool], milestones=[20])


def learning_rates(optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_torch_alone_a_schedule_built_after_the_optimizer_was_loaded_gives_other_rates(tmp_path: Path) -> None:
    _, optimizer = build()
    scheduler = schedule(optimizer)
    learning_rates(optimizer, scheduler, 40)
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, tmp_path / "state.pt")
    expected = learning_rates(optimizer, scheduler, 3)

    _, optimizer = build()
    saved = torch.load(tmp_path / "state.pt")
    optimizer.load_state_dict(saved["optimizer"])
    late = schedule(optimizer)
    late.load_state_dict(saved["scheduler"])
    found = learning_rates(optimizer, late, 3)
    assert found[0] < expected[0] / 100

    _, optimizer = build()
    alone = schedule(optimizer)
    alone.load_state_dict(saved["scheduler"])
    assert learning_rates(optimizer, alone, 1)[0] != pytest.approx(expected[0], rel=0.01)


def test_torch_alone_a_schedule_that_was_not_saved_starts_again(tmp_path: Path) -> None:
    _, optimizer = build()
    learning_rates(optimizer, schedule(optimizer), 40)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")

    _, fresh = build()
    expected = learning_rates(fresh, schedule(fresh), 5)
    _, optimizer = build()
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    assert learning_rates(optimizer, schedule(optimizer), 5)[1:] == expected[1:], (
        "the warm-up, in the middle of training"
    )


def test_schedule_and_optimizer_go_on_together_or_not_at_all(tmp_path: Path) -> None:
    def make() -> tuple[torch.optim.Optimizer, SequentialLR, dckpt.TrainState]:
        model, optimizer = build()
        scheduler = schedule(optimizer)
        return optimizer, scheduler, dckpt.TrainState(model=model, optimizer=optimizer, scheduler=scheduler)

    optimizer, scheduler, state = make()
    learning_rates(optimizer, scheduler, 40)
    save(tmp_path / "run", state, step=40)
    expected = learning_rates(optimizer, scheduler, 30)

    optimizer, scheduler, state = make()
    resume(tmp_path / "run", state)
    assert learning_rates(optimizer, scheduler, 30) == expected
    with (
        dckpt.Checkpointer(tmp_path / "run", signals=()) as checkpointer,
        pytest.raises(dckpt.ConfigError, match="optim, scheduler are restored together or not at all"),
    ):
        checkpointer.load(state, parts=("model", "scheduler"))
    model, optimizer = build()
    without = dckpt.TrainState(model=model, optimizer=optimizer)
    with pytest.raises(
        dckpt.IncompatibleStateError, match="scheduler: in the checkpoint, but this TrainState has none"
    ):
        resume(tmp_path / "run", without)


# Optimizer moments that were reset.


def test_torch_alone_moments_are_reset_by_a_checkpoint_of_weights_and_lost_beside_live_gradients() -> None:
    model, optimizer = build()
    train(model, optimizer, 60)
    fresh = torch.optim.AdamW(model.parameters(), lr=0.02)
    kept = [param.detach().clone() for param in model.parameters()]
    moves = []
    for one in (optimizer, fresh):
        model.eval(), one.zero_grad()
        loss_of(model, 60).backward()
        one.step()
        moves.append(max((a - b).abs().max().item() for a, b in zip(model.parameters(), kept, strict=True)))
        with torch.no_grad():
            for param, old in zip(model.parameters(), kept, strict=True):
                param.copy_(old)
    assert moves[1] == pytest.approx(0.02, rel=0.05), "the first step after a reset is a full learning rate, everywhere"
    assert moves[0] < moves[1]

    # A state that was just built, with gradients from anywhere: torch hands out no moments and says nothing.
    model, untrained = build()
    loss_of(model, 0).backward()
    assert get_optimizer_state_dict(model, untrained)["state"] == {}


def test_moments_come_back_whatever_gradients_are_live_and_weights_alone_are_refused(tmp_path: Path) -> None:
    model, optimizer = build()
    train(model, optimizer, 20)
    loss_of(model, 20).backward()
    save(tmp_path / "run", dckpt.TrainState(model=model, optimizer=optimizer), step=20)
    optimizer.zero_grad()
    torch.manual_seed(7)
    expected = train(model, optimizer, 10, begin=20)

    model, optimizer = build(seed=9)
    loss_of(model, 0).backward()
    state = dckpt.TrainState(model=model, optimizer=optimizer)
    resume(tmp_path / "run", state)
    moments = [optimizer.state[param]["exp_avg"].abs().max() for param in model.parameters()]
    assert all(moment > 0 for moment in moments)
    torch.manual_seed(7)
    assert train(model, optimizer, 10, begin=20) == expected

    save(tmp_path / "weights", dckpt.TrainState(model=model), step=30)
    model, optimizer = build()
    with pytest.raises(dckpt.IncompatibleStateError, match="optim: a part of the TrainState, not in the checkpoint"):
        resume(tmp_path / "weights", dckpt.TrainState(model=model, optimizer=optimizer))
