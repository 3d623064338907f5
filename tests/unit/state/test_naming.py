from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from dckpt.errors import ConfigError
from dckpt.format.shard_file import DTYPES
from dckpt.state.model import read_module
from dckpt.state.naming import DTYPE_NAMES, dtype_name, ensure_key, ensure_storable, unwrap, walk


class Block(nn.Module):
    """A user's block whose own child is called `module`, as a wrapper's would be."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(2, 2)
        self._orig_mod = nn.Linear(2, 2, bias=False)

    def forward(self, x):
        return self._orig_mod(self.module(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(2, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def names_of(module):
    return [entry.name for entry in read_module(module, prefix="").tensors]


PLAIN = list(Net().state_dict())


def test_every_safetensors_dtype_of_the_format_has_a_torch_dtype():
    assert set(DTYPE_NAMES.values()) == set(DTYPES)
    for dtype, name in DTYPE_NAMES.items():
        assert torch.empty(0, dtype=dtype).element_size() == DTYPES[name]


@pytest.mark.parametrize("dtype", [torch.complex128, torch.uint4])
def test_a_dtype_that_safetensors_lacks_is_refused_by_the_tensors_name(dtype):
    with pytest.raises(ConfigError, match=r"model\.w: dtype .* has no safetensors name"):
        dtype_name(dtype, tensor="model.w")


def test_a_users_own_submodule_named_like_a_wrapper_keeps_its_name():
    assert names_of(Net()) == PLAIN
    assert "blocks.0.module.weight" in PLAIN
    assert "blocks.0._orig_mod.weight" in PLAIN


def test_torch_compile_of_the_root_and_of_nested_blocks_leaves_no_trace_in_names():
    net = Net()
    net.blocks[1] = torch.compile(net.blocks[1])
    net.head = torch.compile(net.head)
    assert names_of(torch.compile(net)) == PLAIN


def test_activation_checkpointing_leaves_no_trace_in_names():
    net = Net()
    net.blocks[0] = checkpoint_wrapper(net.blocks[0])
    net.head = checkpoint_wrapper(torch.compile(net.head))
    net.blocks[1] = torch.compile(checkpoint_wrapper(net.blocks[1]))
    assert names_of(checkpoint_wrapper(net)) == PLAIN


def test_data_parallel_is_unwrapped():
    assert names_of(nn.DataParallel(Net())) == PLAIN
    assert isinstance(unwrap(nn.DataParallel(torch.compile(Net()))), Net)


def test_walk_lists_parameters_under_the_same_names_as_the_state_dict():
    net = torch.compile(checkpoint_wrapper(Net()))
    found = [f"{site.prefix}{name}" for site in walk(net) for name in site.module._parameters if name]
    assert {name for name in found if not name.endswith("_orig_mod.bias")} == set(PLAIN)


def test_meta_sparse_quantized_and_subclass_tensors_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"model\.w: the tensor is on the meta device"):
        ensure_storable(torch.empty(2, device="meta"), name="model.w")
    with pytest.raises(ConfigError, match=r"model\.w: layout torch.sparse_coo"):
        ensure_storable(torch.eye(2).to_sparse(), name="model.w")


@pytest.mark.parametrize("key", ["", "a.b", 3, None])
def test_a_key_that_would_break_names_is_refused(key):
    with pytest.raises(ConfigError, match="model: key"):
        ensure_key(key, what="model")
