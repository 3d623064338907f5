"""DDP, FSDP2 and tensor parallelism: one process, a real gloo group of one rank or a fake group of four."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from dckpt.errors import ConfigError
from dckpt.state.train_state import TrainState
from tests.unit.state.memory_checkpoint import full, load, same, save


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def fake_four(request):
    dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=4)
    yield request.param
    dist.destroy_process_group()


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(6, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.body(self.embedding(x)))


def ddp(net):
    return DistributedDataParallel(net)


def fsdp(net):
    for module in (net.body, net):
        fully_shard(module)
    return net


WRAPS = {
    "single": lambda net: net,
    "ddp": ddp,
    "fsdp2": fsdp,
    "ddp-compiled": lambda net: torch.compile(ddp(net), backend="eager"),
}


class Factored(torch.optim.Optimizer):
    """Keeps one number a row, derived from the gradient: a DTensor of another shape under FSDP2."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for param in self.param_groups[0]["params"]:
            state = self.state[param]
            row = param.grad.square().reshape(param.shape[0], -1).mean(-1, keepdim=True)
            state["row"] = row if not state else state["row"] * 0.5 + row
            state["calls"] = state.get("calls", 0) + 1
            param.add_((param.grad.reshape(param.shape[0], -1) / (1 + state["row"])).reshape(param.shape), alpha=-0.1)


OPTIMIZERS = {"adamw": partial(torch.optim.AdamW, lr=0.1), "factored": Factored}


def make(wrap, optimizer="adamw", seed=0, **more):
    model = WRAPS[wrap](Net(seed))
    return TrainState(model=model, optimizer=OPTIMIZERS[optimizer](model.parameters()), **more)


def train(state, steps=2, seed=0):
    gen = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        state.optimizer.zero_grad()
        state.model(torch.randint(0, 6, (5,), generator=gen)).square().sum().backward()
        state.optimizer.step()
    return state


@pytest.mark.parametrize(
    ("saved", "loaded", "optimizer"),
    [
        ("ddp", "fsdp2", "adamw"), ("fsdp2", "single", "adamw"), ("single", "ddp", "adamw"),
        ("ddp-compiled", "fsdp2", "adamw"), ("fsdp2", "ddp", "adamw"), ("single", "fsdp2", "factored"),
        ("fsdp2", "ddp", "factored"), ("fsdp2", "fsdp2", "factored"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_one_wrapping_loads_into_another(one_rank, saved, loaded, optimizer):
    source, target = train(make(saved, optimizer)), make(loaded, optimizer, seed=1)
    checkpoint = save(source)
    assert set(checkpoint.stored) == set(save(train(make("single", optimizer))).stored)
    load(target, checkpoint)
    for name, tensor in save(target).stored.items():
        assert torch.equal(tensor, checkpoint.stored[name]), name
    train(source, seed=4)
    train(target, seed=4)
    for name, tensor in save(target).stored.items():
        torch.testing.assert_close(tensor, save(source).stored[name])


def test_an_fsdp2_run_continues_bit_for_bit_and_its_moments_are_sharded_like_its_parameters(one_rank):
    source, target = train(make("fsdp2")), make("fsdp2", seed=1)
    load(target, save(source))
    param = target.model.body[0].weight
    moment = target.optimizer.state[param]["exp_avg"]
    assert isinstance(moment, DTensor)
    assert moment.placements == param.placements
    assert not isinstance(target.optimizer.state[param]["step"], DTensor)
    train(source, seed=4)
    train(target, seed=4)
    same(source, target)


def test_replication_says_what_is_equal_by_construction(one_rank):
    found = {item.name: item.replication for item in train(make("ddp")).capture().tensors}
    assert found["model.embedding.weight"] == "trusted"
    assert found["optim.body.0.weight.exp_avg"] == "trusted"
    assert found["optim.body.0.weight.step"] == "checked"
    assert found["model.body.1.running_mean"] == "checked"
    found = {item.name: item.replication for item in train(make("fsdp2")).capture().tensors}
    assert found["model.embedding.weight"] == "sharded"
    assert found["optim.body.0.weight.exp_avg"] == "sharded"
    assert found["optim.body.0.weight.step"] == "checked"
    assert found["model.body.1.running_mean"] == "checked"
    assert {item.replication for item in train(make("single")).capture().tensors} == {"checked"}


def test_parameters_that_ddp_ignores_are_not_trusted(one_rank):
    net = Net()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ["body.0.weight"])
    found = {item.name: item.replication for item in TrainState(model=ddp(net)).capture().tensors}
    assert found["model.body.0.weight"] == "checked"
    assert found["model.body.0.bias"] == "trusted"


def test_ddp_around_a_part_leaves_no_trace_in_names_and_vouches_for_that_part_only(one_rank):
    net = nn.ModuleDict({"a": ddp(nn.Linear(2, 2)), "b": nn.Linear(2, 2)})
    found = {item.name: item.replication for item in TrainState(model=net).capture().tensors}
    assert found == {
        "model.a.weight": "trusted",
        "model.a.bias": "trusted",
        "model.b.weight": "checked",
        "model.b.bias": "checked",
    }


def test_moments_of_a_scalar_parameter_follow_it_and_its_counter_does_not(one_rank):
    def build(is_sharded):
        net = nn.Module()
        net.scale = nn.Parameter(torch.ones(()))
        if is_sharded:
            mesh = init_device_mesh("cpu", (1,))
            net.scale = nn.Parameter(distribute_tensor(torch.zeros(()), mesh, [Replicate()]))
        return TrainState(model=net, optimizer=torch.optim.AdamW(net.parameters()))

    source, target = build(is_sharded=False), build(is_sharded=True)
    source.model.scale.square().backward()
    source.optimizer.step()
    load(target, save(source))
    held = target.optimizer.state[target.model.scale]
    assert isinstance(held["exp_avg"], DTensor)
    assert not isinstance(held["step"], DTensor)


def test_ties_hold_under_fsdp2(one_rank):
    state = make("fsdp2")
    assert state.capture().aliases == {"model.head.weight": "model.embedding.weight"}
    assert "optim.head.weight.exp_avg" not in save(train(state)).stored


def test_fsdp2_is_captured_sharded_even_right_after_a_forward(one_rank):
    net = Net()
    fully_shard(net, reshard_after_forward=False)
    state = TrainState(model=net, optimizer=torch.optim.AdamW(net.parameters()))
    net(torch.tensor([1, 2]))
    assert {item.replication for item in state.capture().tensors if "running" not in item.name
            and "tracked" not in item.name} == {"sharded"}  # fmt: skip
    net(torch.tensor([1, 2])).sum().backward()
    state.optimizer.step()
    save(state)


def test_fsdp1_is_refused_with_what_to_use(one_rank):
    wrapped = nn.Sequential(FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu")))
    with pytest.raises(ConfigError, match=r"FSDP1.*fully_shard.*DckptWriter"):
        TrainState(model=wrapped)


def test_the_zero_redundancy_optimizer_is_refused(one_rank):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    net = Net()
    with pytest.raises(ConfigError, match="ZeroRedundancyOptimizer"):
        TrainState(model=net, optimizer=ZeroRedundancyOptimizer(net.parameters(), torch.optim.SGD, lr=0.1))


def test_ema_of_dtensors_as_a_mapping_and_in_an_extra(one_rank):
    source, target = make("fsdp2"), make("fsdp2", seed=1)

    def averages(state):
        return {name: param.detach().clone() for name, param in state.model.named_parameters()}

    source = TrainState(model=source.model, ema=averages(source), extra={"ema": averages(source)})
    target = TrainState(model=target.model, ema=averages(target), extra={"ema": averages(target)})
    held = target.ema["body.0.weight"]
    load(target, save(source))
    assert target.ema["body.0.weight"] is held
    assert isinstance(target.extra["ema"]["body.0.weight"], DTensor)
    same(source, target)


@pytest.mark.parametrize("fake_four", [0, 1, 3], indirect=True)
def test_empty_and_uneven_shards_are_named_alike_on_every_rank_without_communication(fake_four):
    net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2, bias=False))
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))
    fully_shard(net, mesh=mesh)
    optimizer = torch.optim.AdamW(net.parameters())
    for param in net.parameters():
        optimizer.state[param] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros_like(param)}
    captured = TrainState(model=net, optimizer=optimizer, mesh=mesh).capture()
    shapes = {item.name: tuple(item.tensor.shape) for item in captured.tensors}
    assert shapes["model.1.weight"] == (2, 5)
    assert shapes["optim.1.weight.exp_avg"] == (2, 5)
    local = {item.name: item.tensor.to_local().shape[0] for item in captured.tensors if "step" not in item.name}
    assert local["model.0.weight"] == {0: 2, 1: 2, 3: 0}[fake_four]
    assert local["model.1.weight"] == {0: 1, 1: 1, 3: 0}[fake_four]
    record = captured.values["optim"]["optimizers"][""]["states"]
    assert len(record) == 1
    fresh = TrainState(model=net, optimizer=torch.optim.AdamW(net.parameters()))
    plan = fresh.plan_restore(_view(captured))
    assert plan.differences == []
    made = dict(plan.reads)["optim.1.weight.exp_avg"]
    assert (tuple(made.shape), made.to_local().shape[0]) == ((2, 5), local["model.1.weight"])


def _view(captured):
    from tests.unit.state.memory_checkpoint import MemoryCheckpoint

    shapes = {item.name: torch.empty(item.tensor.shape, dtype=item.tensor.dtype) for item in captured.tensors}
    return MemoryCheckpoint(shapes, captured.values, captured.aliases, captured.parts)


@pytest.mark.parametrize("fake_four", [2], indirect=True)
def test_a_mesh_gives_axes_and_coordinates(fake_four):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    state = TrainState(model=nn.Linear(2, 2), mesh=mesh)
    assert state.mesh_axes() == {"dp": 2, "tp": 2}
    assert state.coordinates() == {"dp": 1, "tp": 0}
    unnamed = TrainState(model=nn.Linear(2, 2), mesh=init_device_mesh("cpu", (4,)))
    assert unnamed.coordinates() == {"dim0": 2}


@pytest.mark.parametrize("fake_four", [2], indirect=True)
def test_tensor_parallel_and_hsdp_placements_are_sharded_and_partial_is_refused(fake_four):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    parallelize_module(net, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(net, mesh=mesh["dp"])
    found = {
        item.name: (item.replication, tuple(item.tensor.shape)) for item in TrainState(model=net).capture().tensors
    }
    assert set(found.values()) == {("sharded", (4, 4)), ("sharded", (4,))}
    hsdp = nn.Linear(4, 4)
    fully_shard(hsdp, mesh=mesh)
    assert {item.replication for item in TrainState(model=hsdp).capture().tensors} == {"sharded"}
    partial_sum = DTensor.from_local(torch.ones(2), mesh["dp"], [Partial()])
    with pytest.raises(ConfigError, match=r"extra\.p: the DTensor has placements"):
        TrainState(model=nn.Linear(1, 1), extra={"p": partial_sum}).capture()


def test_state_of_another_shape_than_a_sharded_parameter_becomes_a_dtensor_too(one_rank):
    source, target = train(make("single", "factored")), make("fsdp2", "factored", seed=1)
    load(target, save(source))
    row = target.optimizer.state[target.model.body[0].weight]["row"]
    assert isinstance(row, DTensor)
    assert row.shape == (4, 1)
    again = make("fsdp2", "factored", seed=2)
    load(again, save(train(make("fsdp2", "factored"))))
    assert again.optimizer.state[again.model.body[0].weight]["row"].placements == (Shard(0),)


def test_a_deliberately_plain_state_beside_a_sharded_parameter_stays_plain(one_rank):
    def build(seed):
        net = fsdp(Net(seed))
        return TrainState(model=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1))

    source, target = build(0), build(1)
    for param in source.model.parameters():
        source.optimizer.state[param] = {"seen": torch.arange(3), "factor": distribute_tensor(
            torch.ones(3, 2), param.device_mesh, [Replicate()])}  # fmt: skip
    load(target, save(source))
    held = target.optimizer.state[target.model.body[0].weight]
    assert type(held["seen"]) is torch.Tensor
    assert isinstance(held["factor"], DTensor)
    assert torch.equal(full(held["factor"]), torch.ones(3, 2))
    assert held["factor"].placements == (Replicate(),)
    assert Shard(0) in target.model.body[0].weight.placements
