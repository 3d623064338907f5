from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules
from torch.optim.swa_utils import AveragedModel

from dckpt.errors import ConfigError
from dckpt.format.streams import stream_digest
from dckpt.state.progress import Batch, TrainProgress
from dckpt.state.rng import capture_rng
from dckpt.state.train_state import TrainState
from tests.unit.state.memory_checkpoint import load, read, same, save


def make(schedule=None, seed=0, **more):
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    groups = [{"params": [model.weight], "lr": 0.3}, {"params": [model.bias]}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    return TrainState(model=model, optimizer=optimizer, scheduler=schedule and schedule(optimizer), **more)


def train(state, steps=5, seed=0):
    gen = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        state.optimizer.zero_grad()
        loss = state.model(torch.rand(4, 3, generator=gen)).square().sum()
        loss.backward()
        state.optimizer.step()
        if isinstance(state.scheduler, schedules.ReduceLROnPlateau):
            state.scheduler.step(1.0)
        elif state.scheduler is not None:
            state.scheduler.step()
    return state


class Warmup:
    """A callable that carries state, as LambdaLR allows."""

    def __init__(self):
        self.calls = 0

    def __call__(self, step):
        self.calls += 1
        return 1 / (1 + step + self.calls / 100)


SCHEDULES = {
    "lambda": lambda o: schedules.LambdaLR(o, [lambda s: 0.9**s, lambda s: 0.8**s]),
    "lambda-object": lambda o: schedules.LambdaLR(o, Warmup()),
    "multiplicative": lambda o: schedules.MultiplicativeLR(o, lambda s: 0.9),
    "step": lambda o: schedules.StepLR(o, 2),
    "multistep": lambda o: schedules.MultiStepLR(o, [2, 6, 6]),
    "constant": lambda o: schedules.ConstantLR(o, 0.5, 7),
    "linear": lambda o: schedules.LinearLR(o, total_iters=8),
    "exponential": lambda o: schedules.ExponentialLR(o, 0.9),
    "polynomial": lambda o: schedules.PolynomialLR(o, 20, 0.9),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, 20),
    "warm-restarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 4, 2),
    "onecycle": lambda o: schedules.OneCycleLR(o, 0.5, total_steps=30),
    "cyclic": lambda o: schedules.CyclicLR(o, 0.1, 0.5, 3),
    "plateau": lambda o: schedules.ReduceLROnPlateau(o, patience=1),
    "sequential": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, total_iters=3), schedules.CosineAnnealingLR(o, 20)], [3]
    ),
    "chained": lambda o: schedules.ChainedScheduler([schedules.StepLR(o, 3), schedules.ExponentialLR(o, 0.9)]),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_every_schedule_of_torch_goes_on_with_the_same_learning_rates(schedule):
    source, target = train(make(schedule)), make(schedule, seed=1)
    load(target, save(source))
    rates = [group["lr"] for group in source.optimizer.param_groups]
    assert [group["lr"] for group in target.optimizer.param_groups] == rates
    for _ in range(5):
        train(source, 1, seed=3)
        train(target, 1, seed=3)
        assert [g["lr"] for g in target.optimizer.param_groups] == [g["lr"] for g in source.optimizer.param_groups]
    same(source, target)


def test_a_schedule_over_a_tensor_learning_rate_goes_on_in_the_same_tensor():
    def build(seed):
        torch.manual_seed(seed)
        model = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.5))
        return TrainState(model=model, optimizer=optimizer, scheduler=schedules.CosineAnnealingLR(optimizer, 9))

    source, target = train(build(0)), build(1)
    rate = target.optimizer.param_groups[0]["lr"]
    load(target, save(source))
    assert target.optimizer.param_groups[0]["lr"] is rate
    train(source)
    train(target)
    same(source, target)


def test_milestones_stay_a_counter():
    source, target = train(make(SCHEDULES["multistep"])), make(SCHEDULES["multistep"])
    load(target, save(source))
    assert type(target.scheduler.milestones) is Counter
    assert target.scheduler.milestones == Counter([2, 6, 6])


def test_the_learning_rate_is_the_saved_one_even_if_the_scheduler_moves_it_while_loading():
    class Eager(schedules.StepLR):
        def load_state_dict(self, state_dict):
            super().load_state_dict(state_dict)
            for group in self.optimizer.param_groups:
                group["lr"] = 123.0

    source, target = train(make(lambda o: Eager(o, 2))), make(lambda o: Eager(o, 2), seed=1)
    load(target, save(source))
    assert [g["lr"] for g in target.optimizer.param_groups] == [g["lr"] for g in source.optimizer.param_groups]


def test_a_scheduler_over_reordered_groups_is_refused():
    source = train(make(SCHEDULES["step"]))
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD([{"params": [model.bias]}, {"params": [model.weight]}], lr=0.1, momentum=0.9)
    target = TrainState(model=model, optimizer=optimizer, scheduler=schedules.StepLR(optimizer, 2))
    assert [text[:40] for text in target.plan_restore(save(source)).differences] == [
        "scheduler: the optimizer's groups stand "
    ]
    alone = TrainState(model=model, optimizer=optimizer)
    assert alone.plan_restore(save(source)).differences == []


def test_optimizer_scheduler_and_scaler_are_loaded_together_or_not_at_all():
    source, target = train(make(SCHEDULES["step"])), make(SCHEDULES["step"])
    checkpoint = save(source)
    with pytest.raises(ConfigError, match="optim, scheduler are restored together"):
        target.plan_restore(checkpoint, parts=("model", "optim"))
    plan = load(target, checkpoint, parts=("model",))
    assert plan.skipped_parts == ["optim", "scheduler"]
    assert len(target.optimizer.state) == 0
    assert torch.equal(target.model.weight, source.model.weight)


def test_a_scheduler_that_holds_code_is_refused_with_its_path():
    class Odd(schedules.StepLR):
        def __init__(self, optimizer):
            self.callback = print
            super().__init__(optimizer, 2)

    with pytest.raises(ConfigError, match=r"scheduler.*callback"):
        make(lambda o: Odd(o)).capture()


def scaler(enabled=True):
    return torch.amp.GradScaler("cpu", init_scale=256.0, enabled=enabled)


def test_the_scaler_comes_back_and_a_disabled_one_is_not_mistaken_for_a_lost_one():
    source, target = make(scaler=scaler()), make(scaler=scaler())
    source.scaler.scale(torch.ones(1))
    source.scaler.update(new_scale=64.0)
    load(target, save(source))
    assert target.scaler.get_scale() == 64.0
    off = make(scaler=scaler(enabled=False))
    assert off.plan_restore(save(source)).differences == [
        "scaler: enabled in the checkpoint, disabled live: its state would be lost"
    ]
    assert target.plan_restore(save(off)).differences == [
        "scaler: disabled in the checkpoint, enabled live: its state would be lost"
    ]
    load(make(scaler=scaler(enabled=False)), save(off))


class Loader:
    """A loader whose state_dict draws a random number, as building an iterator does."""

    def __init__(self, position=0, tensor=None):
        self.position = position
        self.tensor = tensor
        self.asked = 0

    def state_dict(self):
        self.asked += 1
        random.random()
        return {"position": self.position} | ({} if self.tensor is None else {"order": self.tensor})

    def load_state_dict(self, state):
        self.position, self.tensor = state["position"], state.get("order")


def test_loaders_come_back_one_or_several_and_are_not_asked_without_need():
    one = make(data=Loader(7))
    target = make(data=Loader())
    load(target, save(one))
    assert (target.data.position, target.data.asked) == (7, 0)
    several = make(data={"text": Loader(3, torch.arange(4)), "image": Loader(5)})
    other = make(data={"text": Loader(), "image": Loader()})
    load(other, save(several))
    assert (other.data["text"].position, other.data["image"].position) == (3, 5)
    assert torch.equal(other.data["text"].tensor, torch.arange(4))
    assert target.plan_restore(save(several)).differences == ["data: a several in the checkpoint, a stateful live"]
    fewer = make(data={"text": Loader(), "sound": Loader()})
    assert fewer.plan_restore(save(several)).differences == [
        "data.sound: in the data, not in the checkpoint",
        "data.image: in the checkpoint, not in the data",
    ]


def test_rng_is_captured_after_everything_that_may_draw():
    state = make(data=Loader())
    captured = state.capture()
    now = capture_rng({})
    assert stream_digest(captured.rng["python"]) == stream_digest(now["python"])


def test_an_averaged_model_comes_back_in_place():
    source, target = make(), make(seed=1)
    source = make(ema=AveragedModel(source.model, use_buffers=True))
    source.ema.update_parameters(source.model)
    target = make(seed=1, ema=AveragedModel(target.model, use_buffers=True))
    weight = target.ema.module.weight
    checkpoint = save(source)
    assert "ema.module.weight" in checkpoint.stored
    load(target, checkpoint)
    assert target.ema.module.weight is weight
    assert int(target.ema.n_averaged) == 1
    same(source, target)


def test_a_mapping_of_ema_tensors_is_held_to_names_and_shapes():
    source, target = (
        make(ema={"w": torch.ones(2), "b": torch.ones(1)}),
        make(ema={"w": torch.zeros(2), "b": torch.zeros(1)}),
    )
    held = target.ema["w"]
    load(target, save(source))
    assert target.ema["w"] is held
    assert torch.equal(held, torch.ones(2))
    other = make(ema={"w": torch.zeros(3), "c": torch.zeros(1)})
    assert other.plan_restore(save(source)).differences == [
        "ema.w: shape (2,) in the checkpoint, (3,) live",
        "ema.c: in the ema, not in the checkpoint",
        "ema.b: in the checkpoint, not in the ema",
    ]


def test_extras_of_every_kind_come_back():
    def extras(full):
        return {
            "module": nn.Linear(1, 1),
            "stateful": Loader(9) if full else Loader(),
            "tensor": torch.full((2,), 5.0 if full else 0.0),
            "dict": {"a": {"b": torch.ones(2) if full else torch.zeros(2)}, "n": 3 if full else 0},
            "list": [1, torch.ones(3), "x"] if full else [],
            "number": 2.5 if full else 0.0,
            "nothing": None,
        }

    mine = extras(full=False)
    source, target = make(extra=extras(full=True)), make(extra=mine)
    inner, tensor, listed = mine["dict"], mine["tensor"], mine["list"]
    load(target, save(source))
    assert mine["dict"] is inner
    assert inner["n"] == 3
    assert torch.equal(inner["a"]["b"], torch.ones(2))
    assert mine["tensor"] is tensor
    assert torch.equal(tensor, torch.full((2,), 5.0))
    assert mine["list"] is listed
    assert listed[0] == 1
    assert torch.equal(listed[1], torch.ones(3))
    assert target.extra["number"] == 2.5
    assert mine["number"] == 2.5
    assert mine["stateful"].position == 9
    same(source, target)


def test_a_tensor_directly_in_an_extra_dict_keeps_its_object():
    mine = {"t": torch.zeros(2), "changed": torch.zeros(3)}
    load(make(extra={"d": mine}), save(make(extra={"d": {"t": torch.ones(2), "changed": torch.ones(4)}})))
    assert torch.equal(mine["t"], torch.ones(2))
    assert torch.equal(mine["changed"], torch.ones(4))


def test_parts_that_one_side_lacks_are_skipped_or_reported():
    full = train(make(SCHEDULES["step"], progress=TrainProgress(), extra={"k": 1, "l": 2}))
    checkpoint = save(full)
    assert checkpoint.parts == ("model", "optim", "scheduler", "progress", "extra.k", "extra.l", "rng")
    assert full.parts == checkpoint.parts
    bare = TrainState(model=nn.Linear(3, 2))
    assert bare.parts == ("model", "rng")
    plan = load(bare, checkpoint)
    assert plan.skipped_parts == ["optim", "scheduler", "progress", "extra.k", "extra.l"]
    found = full.plan_restore(save(bare)).differences
    assert found == [
        "optim: a part of the TrainState, not in the checkpoint",
        "scheduler: a part of the TrainState, not in the checkpoint",
        "progress: a part of the TrainState, not in the checkpoint",
        "extra.k: a part of the TrainState, not in the checkpoint",
        "extra.l: a part of the TrainState, not in the checkpoint",
    ]
    allowed = ("optim", "scheduler", "progress", "extra.*")
    assert full.plan_restore(save(bare), allow_missing=allowed).differences == []
    assert full.plan_restore(checkpoint, parts=("model", "extra")).skipped_parts == ["optim", "scheduler", "progress"]
    with pytest.raises(ConfigError, match=r"has no \['scaler'\]"):
        full.plan_restore(checkpoint, parts=("scaler",))
    with pytest.raises(ConfigError, match="a sequence of names"):
        full.plan_restore(checkpoint, parts="model")


def test_capture_moves_no_random_stream_and_the_order_is_the_same_each_time():
    state = train(make(SCHEDULES["cosine"], generators={"g": np.random.default_rng(0)}))
    before = {name: stream_digest(value) for name, value in capture_rng(state.generators).items()}
    first, second = state.capture(), state.capture()
    after = {name: stream_digest(value) for name, value in capture_rng(state.generators).items()}
    assert before == after
    assert [item.name for item in first.tensors] == [item.name for item in second.tensors]
    assert set(first.rng) == {"python", "numpy", "torch", "generator:g"}


def test_names_that_meet_are_refused():
    with pytest.raises(ConfigError, match=r"key 'a\.w' cannot be part of a name"):
        make(extra={"a": {"w": torch.ones(1)}, "a.w": torch.ones(1)})
    model = nn.Sequential(torch.compile(nn.Linear(1, 1)))
    model.register_state_dict_post_hook(lambda m, state, prefix, _: state.update({"0.weight": torch.ones(1)}))
    with pytest.raises(
        ConfigError, match=r"model\.0\.weight: the state_dict keys '0\._orig_mod\.weight' and '0\.weight'"
    ):
        TrainState(model=model).capture()


def test_arguments_of_the_wrong_kind_are_refused():
    with pytest.raises(ConfigError, match="scheduler: expected state_dict"):
        make(lambda o: 3)
    with pytest.raises(ConfigError, match=r"data\['a'\]: expected state_dict"):
        make(data={"a": 3})
    with pytest.raises(ConfigError, match="mesh: expected a torch DeviceMesh"):
        make(mesh=3)
    with pytest.raises(ConfigError, match="generators"):
        make(generators={"g": random.Random(0)}).capture()


def test_progress_and_facts_travel_with_the_state():
    source = make(progress=TrainProgress(batch=Batch(4)), facts={"data": "v1"})
    source.progress.advance(1.5)
    target = make(progress=TrainProgress(batch=Batch(4)))
    load(target, save(source))
    assert (target.progress.step, target.progress.samples) == (1, 4)
    assert source.facts == {"data": "v1"}
    assert target.facts == {}


def test_without_a_mesh_there_are_no_coordinates():
    assert make().coordinates() is None
    assert make().mesh_axes() is None


def test_a_plan_is_applied_only_after_its_reads_and_does_not_change_the_checkpoint():
    source, target = train(make(SCHEDULES["sequential"])), make(SCHEDULES["sequential"], seed=1)
    checkpoint = save(source)
    values = repr(checkpoint.stored_values)
    for _ in range(2):
        plan = target.plan_restore(checkpoint)
        read(plan, checkpoint)
        plan.apply()
        train(target, 1)
    load(target, checkpoint)
    same(source, target)
    assert repr(checkpoint.stored_values) == values
