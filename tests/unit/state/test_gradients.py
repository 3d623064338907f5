from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import dckpt
from dckpt.errors import ConfigError, CorruptCheckpointError
from dckpt.state.gradients import gradient_obstacle, parameters_by_name
from dckpt.state.train_state import TrainState
from tests.unit.state.memory_checkpoint import load, read, store

BATCH = dckpt.Batch(micro=2, accumulation=4)


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.frozen = nn.Linear(3, 3).requires_grad_(False)

    def forward(self, x):
        return self.b(self.a(self.frozen(x)))


def make(batch=BATCH, *, wrap=lambda net: net, net=None, **more):
    model = wrap(net or Net())
    return TrainState(
        model=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad]),
        progress=dckpt.TrainProgress(batch=batch),
        **more,
    )


def accumulate(state, count=2):
    for _ in range(count):
        state.model(torch.ones(2, 3)).square().sum().backward()
        state.progress.accumulate()
    return state


def saved(state):
    return store(state.capture(gradients=True))


def test_exactly_the_parameters_that_had_a_gradient_have_it_again():
    source, target = accumulate(make()), make()
    target.model.unused(torch.ones(3)).sum().backward()
    checkpoint = saved(source)
    assert sorted(n for n in checkpoint.stored if n.startswith("grad.")) == [
        "grad.a.bias",
        "grad.a.weight",
        "grad.b.bias",
    ]
    assert checkpoint.parts == ("model", "optim", "progress", "grad", "rng")
    plan = load(target, checkpoint)

    assert (plan.saved_micro_step, plan.micro_step, target.progress.micro_step) == (2, 2, 2)
    for name, param in parameters_by_name({"": source.model}).items():
        other = parameters_by_name({"": target.model})[name]
        assert (param.grad is None) == (other.grad is None), name
        if param.grad is not None:
            assert torch.equal(param.grad, other.grad), name


def test_gradients_of_several_models_wrapped_today_and_plain_tomorrow_have_the_same_names(one_rank):
    nets = {"gen": nn.Linear(3, 3), "critic": torch.compile(nn.Linear(3, 3), backend="eager")}
    fully_shard(nets["gen"])
    names = set(parameters_by_name({"gen.": nets["gen"], "critic.": nets["critic"]}))
    assert names == {"gen.weight", "gen.bias", "critic.weight", "critic.bias"}


def test_a_sharded_gradient_goes_into_a_plain_model_and_back(one_rank):
    torch.manual_seed(0)
    plain, sharded = accumulate(make()), accumulate(make(wrap=fully_shard))
    for source, target in ((saved(plain), sharded), (saved(sharded), plain)):
        load(target, source)
        found = target.model.a.weight.grad
        assert isinstance(found, DTensor) == (target is sharded)
        whole = found.full_tensor() if isinstance(found, DTensor) else found
        assert torch.equal(whole, source.stored["grad.a.weight"])
    accumulate(sharded, 1)
    assert sharded.progress.micro_step == 3


def test_dropped_gradients_leave_none_behind_and_the_step_begins_again():
    checkpoint, target = saved(accumulate(make())), make()
    plan = load(target, checkpoint, gradients="drop")
    assert (plan.saved_micro_step, plan.micro_step, target.progress.micro_step) == (2, 0, 0)
    assert plan.skipped_parts == ["grad"]
    assert all(param.grad is None for param in target.model.parameters())


@pytest.mark.parametrize("parts", [("model", "optim", "progress"), ("progress",)])
def test_a_load_without_the_gradients_does_not_pretend_that_they_are_there(parts):
    target = make()
    load(target, saved(accumulate(make())), parts=parts)
    assert target.progress.micro_step == 0


def test_gradients_go_with_model_and_progress():
    checkpoint, target = saved(accumulate(make())), make()
    with pytest.raises(ConfigError, match="goes with model and progress"):
        target.plan_restore(checkpoint, parts=("model", "grad"))
    load(target, checkpoint, parts=("model", "progress", "grad"))
    assert target.progress.micro_step == 2


def test_another_split_of_the_same_batch_counts_the_same_samples():
    checkpoint = saved(accumulate(make()))
    finer, coarser = make(dckpt.Batch(micro=1, accumulation=8)), make(dckpt.Batch(micro=8, accumulation=1))
    load(finer, checkpoint)
    assert finer.progress.micro_step == 4
    (difference,) = coarser.plan_restore(checkpoint).differences
    assert "4 samples of the step, which are not a whole number" in difference


def test_gradients_without_a_place_are_differences_until_allowed():
    checkpoint = saved(accumulate(make()))
    net = Net()
    net.a.bias.requires_grad_(False)
    other = nn.Module()
    other.a = nn.Linear(3, 3)
    fixed = make(net=net).plan_restore(checkpoint).differences
    assert "grad.a.bias: in the checkpoint, and the parameter is not trained now" in fixed
    fewer = make(net=other).plan_restore(checkpoint).differences
    assert "grad.b.bias: in the checkpoint, and no parameter of this name is live" in fewer
    del checkpoint.stored["grad.a.bias"]
    lost = make().plan_restore(checkpoint).differences
    assert lost == ["grad.a.bias: its values name the tensor 'grad.a.bias', which the checkpoint does not hold"]


def test_an_allowed_cast_gives_gradients_the_dtype_of_their_parameters():
    checkpoint, target = saved(accumulate(make())), make(net=Net().to(torch.bfloat16))
    plan = target.plan_restore(checkpoint, cast="allow")
    assert plan.differences == []
    read(plan, checkpoint)
    plan.apply()
    assert target.model.a.weight.grad.dtype == torch.bfloat16


def test_gradients_out_of_reach_are_named(one_rank):
    state = make(wrap=fully_shard)
    state.model.set_requires_gradient_sync(False)
    assert state.gradient_obstacle() is None
    accumulate(state, 1)
    obstacle = state.gradient_obstacle()
    assert obstacle is not None
    assert obstacle.startswith("a.weight: ")
    with pytest.raises(ConfigError, match=r"micro-step 1: a\.weight.*set_requires_gradient_sync\(False\)"):
        state.capture(gradients=True)
    state.model.set_requires_gradient_sync(True)
    accumulate(state, 1)
    assert gradient_obstacle({"": state.model}) is None
    assert "grad.a.weight" in saved(state).stored


@pytest.mark.parametrize("reduce_dtype", [None, torch.float32])
def test_gradients_out_of_reach_are_found_wherever_fsdp_puts_them(one_rank, reduce_dtype):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
    state = make(wrap=lambda net: fully_shard(net, mp_policy=policy))
    state.model.set_requires_gradient_sync(False)
    accumulate(state, 1)
    assert state.gradient_obstacle() is not None


def test_a_micro_step_without_any_gradient_is_a_mistake_that_is_said():
    state = make()
    state.progress.accumulate()
    with pytest.raises(ConfigError, match="found none on any parameter"):
        state.capture(gradients=True)


def test_damaged_values_are_told_apart_from_a_misfit():
    checkpoint = saved(accumulate(make()))
    checkpoint.stored_values["grad"] = {"names": ["a.weight", 3]}
    with pytest.raises(CorruptCheckpointError, match=r"names\[1\]"):
        make().plan_restore(checkpoint)
    checkpoint = saved(accumulate(make()))
    checkpoint.stored_values["progress"]["state"]["batch"] = [1, 2]
    with pytest.raises(CorruptCheckpointError, match="progress: field 'batch'"):
        make().plan_restore(checkpoint)
