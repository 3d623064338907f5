"""Whatever wraps the model when it is saved and when it is loaded, names and training are the same."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import dckpt
from dckpt.state.train_state import TrainState
from tests.unit.state.memory_checkpoint import load, save


@pytest.fixture(autouse=True)
def _one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Net(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(2)])
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def compile_in_place(net):
    net.compile(backend="eager")
    net.blocks[1].compile(backend="eager")
    return net


def compile_blocks(net):
    net.blocks[0] = torch.compile(net.blocks[0], backend="eager")
    return net


def checkpoint_blocks(net):
    apply_activation_checkpointing(net, check_fn=lambda module: isinstance(module, nn.Sequential))
    return net


def shard(net):
    for block in net.blocks:
        fully_shard(block)
    return fully_shard(net)


WRAPS = {
    "plain": lambda net: net,
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "compiled in place": compile_in_place,
    "blocks compiled": compile_blocks,
    "DDP": DistributedDataParallel,
    "compiled DDP": lambda net: torch.compile(DistributedDataParallel(net), backend="eager"),
    "DDP of compiled": lambda net: DistributedDataParallel(torch.compile(net, backend="eager")),
    "activation checkpointing": checkpoint_blocks,
    "all of it": lambda net: DistributedDataParallel(torch.compile(checkpoint_wrapper(net), backend="eager")),
    "FSDP2": shard,
    "FSDP2 of checkpointed blocks, compiled": lambda net: torch.compile(shard(checkpoint_blocks(net)), backend="eager"),
}


def make(wrap, seed):
    model = WRAPS[wrap](Net(seed))
    return TrainState(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.05, foreach=False))


def train(state, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        state.optimizer.zero_grad()
        state.model(torch.randn(6, 4, generator=generator)).square().sum().backward()
        state.optimizer.step()
    return state


@pytest.fixture(scope="module")
def expected_names():
    return sorted(f"model.{name}" for name in Net(0).state_dict())


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        pair
        for pair in itertools.product(WRAPS, WRAPS)
        # Each against the plain model in both directions, and every mixture of what is usual.
        if "plain" in pair or set(pair) <= {"compiled", "DDP", "activation checkpointing", "FSDP2"}
    ],
)
def test_names_do_not_tell_the_wrapper_and_training_goes_on_under_another(saved, loaded, expected_names):
    source, target = train(make(saved, 0), 1), make(loaded, 7)
    checkpoint = save(source)
    assert sorted(name for name in checkpoint.stored if name.startswith("model.")) == expected_names
    load(target, checkpoint)
    before, after = save(source).stored, save(target).stored
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    train(source, 2), train(target, 2)
    for name, tensor in save(target).stored.items():
        torch.testing.assert_close(tensor, save(source).stored[name])


@pytest.mark.parametrize("wrap", WRAPS)
def test_every_flag_comes_back_under_any_wrapper(wrap):
    net = Net(0)
    frozen = net.blocks[0]
    model = WRAPS[wrap](net)
    model.train()
    frozen[1].eval()
    before = {id(module): module.training for module in model.modules()}
    with pytest.raises(SystemExit), dckpt.evaluating(model):
        assert not any(module.training for module in model.modules())
        raise SystemExit
    assert {id(module): module.training for module in model.modules()} == before
