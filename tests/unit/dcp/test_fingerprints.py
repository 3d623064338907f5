"""Live tensors of any strides have the fingerprint of their row-major bytes, and nothing about them changes."""

from __future__ import annotations

import pytest
import torch

from dckpt.dcp.chunks import copy_to_bytes
from dckpt.dcp.fingerprints import TASK_BYTES, live_fingerprints
from dckpt.format.fingerprint import fold_run
from dckpt.ranks.topology import Topology
from dckpt.state.records import NamedTensor


def expected(tensor: torch.Tensor) -> int:
    data = memoryview(bytearray(tensor.numel() * tensor.element_size()))
    copy_to_bytes(tensor, data)
    return fold_run(data, 0)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


TENSORS = {
    "plain": lambda: numbers(40, 30),
    "a scalar": lambda: numbers(),
    "nothing": lambda: numbers(0, 4),
    "transposed": lambda: numbers(300, 200).t(),
    "every second column": lambda: numbers(50, 60)[:, ::2],
    "expanded": lambda: numbers(7, 1).expand(7, 5),
    "an odd offset": lambda: numbers(1001).to(torch.bfloat16)[3:],
    "conjugated": lambda: torch.complex(numbers(9, 9), numbers(9, 9)).conj(),
    "channels last": lambda: numbers(2, 8, 5, 5).to(memory_format=torch.channels_last),
    "bool": lambda: numbers(77) > 0,
    "eighth": lambda: numbers(33).to(torch.float8_e4m3fn),
    "large": lambda: numbers(TASK_BYTES // 4000, 1030),
    "large and transposed": lambda: numbers(1030, TASK_BYTES // 4000).t(),
    "a parameter": lambda: torch.nn.Parameter(numbers(12, 12)),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_a_tensor_of_any_strides_has_that_of_its_bytes(kind: str):
    tensor = TENSORS[kind]().detach()
    before = tensor.clone()
    found = live_fingerprints([NamedTensor("t", tensor, "trusted")], Topology(0, 1))["t"]

    assert found.value == expected(tensor)
    assert expected(tensor) == expected(before), "it was only read"


def test_all_at_once_and_told_of_every_byte():
    tensors = {kind: make().detach() for kind, make in TENSORS.items()}
    told: list[int] = []
    random_state = torch.get_rng_state()
    found = live_fingerprints(
        [NamedTensor(kind, tensor, "trusted") for kind, tensor in tensors.items()], Topology(2, 3), told.append
    )

    assert {kind: item.value for kind, item in found.items()} == {kind: expected(t) for kind, t in tensors.items()}
    assert sum(told) == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert {(item.group, item.claim, item.place) for item in found.values()} == {(0, 2, "every rank")}
    assert torch.equal(torch.get_rng_state(), random_state)
