from __future__ import annotations

import json
import math

import pytest
import torch

from dckpt.errors import ConfigError, CorruptCheckpointError
from dckpt.state.progress import Batch, Leg, TrainProgress


def test_a_batch_counts_the_samples_of_one_optimizer_step():
    assert Batch(micro=8, accumulation=4, data_parallel=2).samples == 64
    assert Batch(3).samples == 3
    for bad in (0, -1, 2.0, True):
        with pytest.raises(ConfigError, match="micro"):
            Batch(bad)


def test_advance_counts_steps_samples_and_losses():
    progress = TrainProgress(max_steps=3, batch=Batch(2, 2, 2))
    progress.micro_step = 1
    for loss in (3.0, torch.tensor(1.5), 2):
        assert not progress.done
        progress.advance(loss)
    assert progress.done
    assert (progress.step, progress.samples, progress.micro_step) == (3, 24, 0)
    assert progress.losses == [3.0, 1.5, 2.0]
    assert progress.loss_history == [(1, 3.0), (2, 1.5), (3, 2.0)]
    assert progress.best_loss == 1.5


def test_a_tensor_loss_is_kept_as_a_copy_and_not_converted_before_it_is_asked_for():
    class Loud(torch.Tensor):
        """Fails when its value is asked for, as a device loss would wait."""

        def item(self):
            raise AssertionError("synchronised")

        __float__ = tolist = item

    progress = TrainProgress()
    buffer = torch.tensor(1.0, requires_grad=True) * 2
    progress.advance(buffer)
    progress.advance(torch.tensor(4.0).as_subclass(Loud))
    assert progress.step == 2
    with torch.no_grad():
        buffer.fill_(9.0)
    progress._pending[1] = (2, progress._pending[1][1].as_subclass(torch.Tensor))
    assert progress.losses == [2.0, 4.0]


def test_the_history_is_capped_but_the_best_loss_is_not_forgotten():
    progress = TrainProgress(history=3)
    progress.advance(0.25)
    for step in range(1, 2500):
        progress.advance(torch.tensor(float(step)))
    assert progress.losses == [2497.0, 2498.0, 2499.0]
    assert progress.best_loss == 0.25
    assert len(progress._pending) == 0
    assert TrainProgress(history=0).losses == []


def test_losses_that_are_no_numbers_are_kept_and_never_the_best():
    progress = TrainProgress()
    progress.advance(float("nan"))
    progress.advance(torch.tensor(float("inf")))
    assert math.isnan(progress.losses[0])
    assert progress.best_loss == math.inf


def test_the_batch_history_grows_only_when_the_global_batch_changes():
    progress = TrainProgress(batch=Batch(4))
    progress.advance()
    progress.advance()
    progress.batch = Batch(8)
    progress.advance()
    progress.advance(samples=3)
    assert progress.batch_history == [(0, 4), (2, 8), (3, 3)]
    assert progress.samples == 4 + 4 + 8 + 3


def test_epochs_end_a_run_too():
    progress = TrainProgress(max_epochs=1)
    assert not progress.done
    progress.finish_epoch()
    assert progress.done
    assert not TrainProgress().done


def test_the_state_comes_back_and_the_limits_stay_the_running_jobs():
    progress = TrainProgress(max_steps=10, batch=Batch(4, 2), history=2)
    for loss in (3.0, 1.0, torch.tensor(2.0)):
        progress.advance(loss)
    progress.finish_epoch()
    state = json.loads(json.dumps(progress.state_dict()))
    other = TrainProgress(max_steps=20, batch=Batch(2, 4))
    other.advance(0.0)
    other.load_state_dict(state)
    assert (other.step, other.epoch, other.samples, other.max_steps) == (3, 1, 24, 20)
    assert other.loss_history == [(2, 1.0), (3, 2.0)]
    assert other.best_loss == 1.0
    assert other.batch_history == [(0, 8)]
    other.advance(samples=8)
    assert other.batch_history == [(0, 8)]


@pytest.mark.parametrize(
    "damage",
    [
        {"step": -1}, {"step": True}, {"epoch": None}, {"loss_history": 3}, {"loss_history": [[1]]},
        {"batch_history": [[0, 1.5]]}, {"best_loss": "x"},
    ],
)  # fmt: skip
def test_a_damaged_state_is_refused_and_nothing_is_taken_over(damage):
    progress = TrainProgress()
    state = TrainProgress().state_dict() | {"step": 5} | damage
    with pytest.raises(CorruptCheckpointError, match=f"progress: field '{next(iter(damage))}'"):
        progress.load_state_dict(state)
    assert progress.step == 0


def test_arguments_of_the_wrong_kind_are_refused():
    with pytest.raises(ConfigError, match="max_steps"):
        TrainProgress(max_steps=1.5)
    with pytest.raises(ConfigError, match=r"dckpt\.Batch"):
        TrainProgress(batch=8)
    with pytest.raises(ConfigError, match="shape"):
        TrainProgress().advance(torch.ones(2))
    with pytest.raises(ConfigError, match="a number or a tensor"):
        TrainProgress().advance("low")
    with pytest.raises(ConfigError, match="samples"):
        TrainProgress().advance(samples=-1)


def test_micro_batches_are_counted_up_to_the_step_that_they_make():
    progress = TrainProgress(batch=Batch(micro=2, accumulation=3))
    assert [progress.accumulate() for _ in range(3)] == [False, False, True]
    with pytest.raises(ConfigError, match="at most 3 micro-batches"):
        progress.accumulate()
    progress.advance()
    assert (progress.micro_step, progress.accumulate()) == (0, False)
    with pytest.raises(ConfigError, match="Batch"):
        TrainProgress().accumulate()


def test_micro_batches_that_are_in_the_gradients_are_left_out_and_draw_nothing():
    progress = TrainProgress(batch=Batch(micro=2, accumulation=3))
    assert list(progress.unconsumed([1, 2, 3])) == [1, 2, 3]
    progress.accumulate()
    progress.accumulate()
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    rest = progress.unconsumed((number, torch.rand(1)) for number in range(3))

    assert torch.equal(next(rest)[1], expected)
    assert list(rest) == []
    with pytest.raises(ConfigError, match="found 1"):
        progress.unconsumed([1])


def test_a_leg_counts_from_its_beginning_and_the_life_goes_on():
    progress = TrainProgress(max_steps=2, batch=Batch(4))
    for loss in (3.0, 1.0):
        progress.advance(loss)
    progress.finish_epoch()
    assert progress.done
    progress.begin_leg("round-2")

    assert not progress.done
    assert (progress.leg, progress.leg_step, progress.leg_epoch, progress.leg_samples) == (2, 0, 0, 0)
    progress.advance(2.0)
    assert (progress.step, progress.epoch, progress.samples) == (3, 1, 12)
    assert (progress.leg_step, progress.leg_epoch, progress.leg_samples) == (1, 0, 4)
    assert (progress.best_loss, progress.leg_best_loss) == (1.0, 2.0)
    assert progress.loss_history == [(1, 3.0), (2, 1.0), (3, 2.0)]
    assert not progress.done
    progress.advance(torch.tensor(2.5))
    assert progress.done
    assert progress.legs == (Leg(), Leg("round-2", 2, 1, 8))


def test_max_epochs_is_a_limit_of_the_leg():
    progress = TrainProgress(max_epochs=1)
    progress.finish_epoch()
    progress.begin_leg()
    assert not progress.done
    progress.finish_epoch()
    assert progress.done and progress.epoch == 2


def test_legs_come_back_from_a_state_through_json():
    progress = TrainProgress(max_steps=5)
    progress.advance(0.5)
    progress.begin_leg("b")
    progress.advance(0.75)
    back = TrainProgress(max_steps=5)
    back.load_state_dict(json.loads(json.dumps(progress.state_dict())))
    assert back.state_dict() == progress.state_dict()
    assert (back.leg, back.leg_step, back.leg_best_loss, back.best_loss) == (2, 1, 0.75, 0.5)


def test_a_state_from_before_there_were_legs_is_one_leg():
    progress = TrainProgress()
    progress.advance(0.5)
    state = progress.state_dict()
    del state["legs"], state["leg_best_loss"]
    back = TrainProgress(max_steps=2)
    back.begin_leg()
    back.load_state_dict(state)
    assert (back.leg, back.leg_step, back.leg_best_loss, back.done) == (1, 1, 0.5, False)


@pytest.mark.parametrize(
    "legs", [[], "x", [["a", 0, 0]], [[None, 0, 0, 9]], [[None, -1, 0, 0]], [[1, 0, 0, 0]], [[None, True, 0, 0]]]
)
def test_legs_that_cannot_be_are_damage(legs):
    state = TrainProgress().state_dict()
    with pytest.raises(CorruptCheckpointError, match="legs"):
        TrainProgress().load_state_dict({**state, "legs": legs})
