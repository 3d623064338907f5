from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from dckpt.errors import ConfigError, IncompatibleStateError
from dckpt.state.train_state import TrainState
from tests.unit.state.memory_checkpoint import load, read, same, save


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def train(state, steps=3, seed=0):
    gen = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        state.optimizer.zero_grad()
        loss = state.model(torch.rand(5, 3, generator=gen)).square().sum()
        loss.backward()
        state.optimizer.step(lambda loss=loss: loss)
    return state


MAKERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "adamw-tensor-lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1)),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adamax": lambda p: torch.optim.Adamax(p),
    "asgd": lambda p: torch.optim.ASGD(p),
    "rprop": lambda p: torch.optim.Rprop(p),
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.1, centered=True),
    "adafactor": lambda p: torch.optim.Adafactor(p),
    "lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=1),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_a_fresh_optimizer_continues_bit_for_bit(make):
    source, target = [TrainState(model=(m := net(i)), optimizer=make(m.parameters())) for i in (0, 1)]
    train(source)
    load(target, save(source))
    same(source, target)
    train(source, seed=5)
    train(target, seed=5)
    same(source, target)


def test_capture_takes_no_step_fires_no_hook_and_leaves_gradients_alone():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    fired = []
    optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
    optimizer.register_step_post_hook(lambda *_: fired.append("post"))
    model(torch.rand(1, 3)).sum().backward()
    gradients = [param.grad for param in model.parameters()]
    copies = [grad.clone() for grad in gradients]
    weights = [param.detach().clone() for param in model.parameters()]
    state = TrainState(model=model, optimizer=optimizer)
    checkpoint = save(state)
    plan = state.plan_restore(checkpoint)
    assert plan.differences == []
    plan.apply()
    assert fired == []
    assert state.optimizer_steps == 0
    assert not any(name.startswith("optim.") for name in checkpoint.stored)
    assert len(optimizer.state) == 0
    for param, grad, held, weight in zip(model.parameters(), gradients, copies, weights, strict=True):
        assert param.grad is grad
        assert torch.equal(grad, held)
        assert torch.equal(param, weight)


def test_live_gradients_do_not_hide_the_state():
    model = net()
    state = train(TrainState(model=model, optimizer=torch.optim.AdamW(model.parameters())))
    assert all(param.grad is not None for param in model.parameters())
    assert "optim.0.weight.exp_avg" in save(state).stored


def test_parameters_without_state_stay_without_and_lose_what_they_have():
    def frozen_first(seed):
        model = net(seed)
        model[0].weight.requires_grad_(requires_grad=False)
        return TrainState(model=model, optimizer=torch.optim.AdamW(model.parameters()))

    source = train(frozen_first(0))
    assert "optim.0.weight.exp_avg" not in save(source).stored
    target = train(TrainState(model=(m := net(1)), optimizer=torch.optim.AdamW(m.parameters())))
    assert target.model[0].weight in target.optimizer.state
    load(target, save(source))
    assert target.model[0].weight not in target.optimizer.state
    assert target.model[0].bias in target.optimizer.state


def test_groups_and_state_are_matched_by_name_not_by_position():
    def state(order, seed):
        model = net(seed)
        groups = {
            "first": {"params": list(model[0].parameters()), "lr": 0.5, "betas": (0.5, 0.6)},
            "last": {"params": list(model[2].parameters())[:: 1 if seed == 0 else -1], "weight_decay": 0.25},
        }
        return TrainState(model=model, optimizer=torch.optim.AdamW([groups[name] for name in order], lr=0.125))

    source, target = train(state(["first", "last"], 0)), state(["last", "first"], 1)
    for group in target.optimizer.param_groups:
        group.update(lr=9.0, weight_decay=9.0, betas=(0.1, 0.2))
    load(target, save(source))
    last, first = target.optimizer.param_groups
    assert (first["lr"], first["betas"]) == (0.5, (0.5, 0.6))
    assert (last["lr"], last["weight_decay"]) == (0.125, 0.25)
    for a, b in zip(source.model.parameters(), target.model.parameters(), strict=True):
        assert torch.equal(source.optimizer.state[a]["exp_avg"], target.optimizer.state[b]["exp_avg"])


def test_other_groups_than_saved_are_refused_naming_them():
    one, two = net(0), net(1)
    joined = TrainState(model=one, optimizer=torch.optim.AdamW(one.parameters()))
    split = TrainState(
        model=two, optimizer=torch.optim.AdamW([{"params": list(m.parameters())} for m in (two[0], two[2])])
    )
    assert "saved group 0 is split over the live groups 0 and 1" in split.plan_restore(save(joined)).differences[0]
    found = joined.plan_restore(save(split)).differences
    assert found == [
        "optim: live group 0 joins several: 0.weight from saved group 0, 2.weight from saved group 1. Split it as saved"
    ]


def test_another_optimizer_is_refused_and_may_be_allowed_by_name():
    source = train(TrainState(model=(a := net(0)), optimizer=torch.optim.Adam(a.parameters())))
    target = TrainState(model=(b := net(1)), optimizer=torch.optim.NAdam(b.parameters()))
    checkpoint = save(source)
    assert target.plan_restore(checkpoint).differences == ["optim.class: saved by Adam, the live optimizer is NAdam"]
    assert target.plan_restore(checkpoint, allow_unexpected=("optim.class",)).differences == []


def test_parameters_on_one_side_only_are_listed_by_name():
    small = TrainState(model=(a := net(0)), optimizer=torch.optim.AdamW(a[0].parameters()))
    large = TrainState(model=(b := net(1)), optimizer=torch.optim.AdamW(b.parameters()))
    train(small)
    train(large)
    assert large.plan_restore(save(small)).differences == [
        "optim.2.weight: in the optimizer, not in the checkpoint's",
        "optim.2.bias: in the optimizer, not in the checkpoint's",
    ]
    assert small.plan_restore(save(large)).differences == [
        "optim.2.bias: no longer in the optimizer (frozen or removed?)",
        "optim.2.weight: no longer in the optimizer (frozen or removed?)",
    ]
    kept = large.optimizer.state[b[2].weight]["exp_avg"].clone()
    load(large, save(small), allow_missing=("optim.2.*",))
    assert torch.equal(large.optimizer.state[b[2].weight]["exp_avg"], kept)
    assert torch.equal(large.optimizer.state[b[0].weight]["exp_avg"], small.optimizer.state[a[0].weight]["exp_avg"])


def test_a_parameter_of_no_model_is_refused_with_its_group_and_position():
    model = net()
    stray = nn.Parameter(torch.ones(3, 5))
    optimizer = torch.optim.SGD([{"params": list(model.parameters())}, {"params": [model[0].weight.detach(), stray]}])
    with pytest.raises(ConfigError, match=r"parameter 0 of group 1 \(shape \(4, 3\)\) belongs to no model"):
        TrainState(model=model, optimizer=optimizer).capture()


def test_live_state_is_filled_in_place_and_keeps_its_objects():
    source = train(TrainState(model=(a := net(0)), optimizer=MAKERS["adamw-tensor-lr"](a.parameters())))
    target = train(TrainState(model=(b := net(1)), optimizer=MAKERS["adamw-tensor-lr"](b.parameters())))
    source.optimizer.param_groups[0]["lr"].fill_(0.75)
    held, moment = target.optimizer.state[b[0].weight], target.optimizer.state[b[0].weight]["exp_avg"]
    lr = target.optimizer.param_groups[0]["lr"]
    load(target, save(source))
    assert target.optimizer.state[b[0].weight] is held
    assert held["exp_avg"] is moment
    assert target.optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == 0.75
    same(source, target)


def test_a_learning_rate_that_turned_into_a_tensor_is_a_difference():
    source = TrainState(model=(a := net(0)), optimizer=MAKERS["adamw"](a.parameters()))
    target = TrainState(model=(b := net(1)), optimizer=MAKERS["adamw-tensor-lr"](b.parameters()))
    assert target.plan_restore(save(source)).differences == [
        "optim.param_groups[0].lr: a number in the checkpoint, a tensor in the live optimizer"
    ]


class Nested(Optimizer):
    """Keeps nested containers, a plain number, a list of factors, and one record for all parameters."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "history": [0.5]})

    @torch.no_grad()
    def step(self, closure=None):
        self.state.setdefault("all", {"calls": 0, "norm": torch.zeros(())})["calls"] += 1
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    factors = [torch.eye(size) for size in param.shape]
                    state.update(n=0, blocks={"a.b": {"factors": factors}, 1: (torch.ones(2), 0.5)}, big=2**70)
                state["n"] += 1
                state["blocks"]["a.b"]["factors"][0].add_(param.grad.sum())
                self.state["all"]["norm"].add_(param.grad.norm())
                param.add_(param.grad, alpha=-group["lr"] * state["blocks"][1][1] / state["n"])


def test_nested_optimizer_state_comes_back_with_its_containers():
    source, target = [TrainState(model=(m := net(i)), optimizer=Nested(m.parameters())) for i in (0, 1)]
    train(source)
    checkpoint = save(source)
    assert "optim.0.weight.blocks.a.b.factors.0" in checkpoint.stored
    assert "optim.shared_state.all.norm" in checkpoint.stored
    load(target, checkpoint)
    held = target.optimizer.state[target.model[0].weight]
    assert (held["n"], held["big"], type(held["blocks"][1])) == (3, 2**70, tuple)
    assert target.optimizer.state["all"]["calls"] == 3
    train(source, seed=5)
    train(target, seed=5)
    same(source, target)


def test_structures_that_are_alike_are_described_once():
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(50)])
    state = TrainState(model=model, optimizer=torch.optim.AdamW(model.parameters()))
    state.model(torch.rand(1, 2)).sum().backward()
    state.optimizer.step()
    record = save(state).stored_values["optim"]["optimizers"][""]
    assert len(record["states"]) == 1
    assert len(record["states"][0]["params"]) == 100


def test_several_optimizers_have_their_keys_in_the_names():
    model = net()
    make = lambda m: {  # noqa: E731
        "body": torch.optim.SGD(m[0].parameters(), lr=0.1, momentum=0.5),
        "head": torch.optim.AdamW(m[2].parameters(), lr=0.2),
    }
    source = TrainState(model=model, optimizer=make(model))
    model(torch.rand(1, 3)).sum().backward()
    for optimizer in source.optimizer.values():
        optimizer.step()
    assert source.optimizer_steps == 2
    checkpoint = save(source)
    assert "optim.body.0.weight.momentum_buffer" in checkpoint.stored
    assert "optim.head.2.weight.exp_avg" in checkpoint.stored
    other = net(1)
    target = TrainState(model=other, optimizer=make(other))
    load(target, checkpoint)
    same(source, target)
    del target.optimizer["head"]
    smaller = TrainState(model=other, optimizer=target.optimizer)
    assert smaller.plan_restore(checkpoint).differences == [
        "optim.head: an optimizer in the checkpoint, not in the TrainState"
    ]


def test_step_counting_ends_with_the_state_or_on_request():
    model = net()
    optimizer = torch.optim.SGD(model.parameters())
    first, second = [TrainState(model=model, optimizer=optimizer) for _ in range(2)]
    train(first, steps=2)
    assert (first.optimizer_steps, second.optimizer_steps) == (2, 2)
    second.detach_hooks()
    train(first, steps=1)
    assert (first.optimizer_steps, second.optimizer_steps) == (3, 2)
    del first
    assert len(optimizer._optimizer_step_post_hooks) == 0
    assert TrainState(model=model).optimizer_steps is None


def test_a_copied_optimizer_does_not_count_for_the_original():
    model = net()
    state = TrainState(model=model, optimizer=torch.optim.SGD(model.parameters()))
    copied = copy.deepcopy(model)
    train(TrainState(model=copied, optimizer=torch.optim.SGD(copied.parameters())), steps=2)
    assert state.optimizer_steps == 0


def test_implementation_options_stay_those_of_the_job_that_loads():
    source = train(TrainState(model=(a := net(0)), optimizer=MAKERS["adamw-fused"](a.parameters())))
    target = TrainState(model=(b := net(1)), optimizer=MAKERS["adamw"](b.parameters()))
    load(target, save(source))
    assert target.optimizer.param_groups[0]["fused"] is None


def test_a_moment_of_another_shape_is_refused():
    source = train(TrainState(model=(a := net(0)), optimizer=MAKERS["adamw"](a.parameters())))
    wide = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    target = TrainState(model=wide, optimizer=MAKERS["adamw"](wide.parameters()))
    checkpoint = save(source)
    plan = target.plan_restore(checkpoint)
    assert "optim.2.weight.exp_avg: shape (2, 4) in the checkpoint, (3, 4) live" in plan.differences
    assert len(plan.differences) == 6
    with pytest.raises(IncompatibleStateError):
        plan.apply()
    assert len(target.optimizer.state) == 0


def test_moments_of_another_dtype_are_refused_when_they_are_live_and_converted_on_request():
    source = train(TrainState(model=(a := net(0)), optimizer=MAKERS["adamw"](a.parameters())))
    target = train(TrainState(model=(b := net(1)), optimizer=MAKERS["adamw"](b.parameters())))
    held = target.optimizer.state[b[0].weight]
    held["exp_avg"] = held["exp_avg"].bfloat16()
    checkpoint = save(source)
    assert target.plan_restore(checkpoint).differences == [
        "optim.0.weight.exp_avg: dtype F32 in the checkpoint, BF16 live; cast='allow' would convert it"
    ]
    plan = load(target, checkpoint, cast="allow")
    assert plan.skipped_parts == []
    expected = source.optimizer.state[a[0].weight]["exp_avg"].bfloat16()
    assert torch.equal(target.optimizer.state[b[0].weight]["exp_avg"], expected)


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(ConfigError, match=r"expected a torch\.optim\.Optimizer"):
        TrainState(model=net(), optimizer=object())


def test_reads_name_each_stored_tensor_once():
    source = train(TrainState(model=(a := net(0)), optimizer=MAKERS["adamw"](a.parameters())))
    target = TrainState(model=(b := net(1)), optimizer=MAKERS["adamw"](b.parameters()))
    checkpoint = save(source)
    plan = target.plan_restore(checkpoint)
    assert sorted(name for name, _ in plan.reads) == sorted(checkpoint.stored)
    read(plan, checkpoint)
    assert len(target.optimizer.state) == 0
    plan.apply()
    assert len(target.optimizer.state) == 4
