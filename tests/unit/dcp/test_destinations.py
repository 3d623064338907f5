"""Pieces of stripes into live tensors of any strides and dtypes, packed for the wire or straight out of the stripe."""

from __future__ import annotations

import pytest
import torch

from dckpt.dcp.destinations import Destinations, pack, packed
from dckpt.planning.pieces import Piece

SHAPE = (64, 48)


def stripe_of(full: torch.Tensor) -> memoryview:
    return memoryview(bytearray(full.contiguous().view(-1).view(torch.uint8).numpy().tobytes()))


def piece_of(full: torch.Tensor, rows: slice, columns: slice) -> Piece:
    """The part of `full` that goes to a tensor of just that part."""
    item = full.element_size()
    strides = (SHAPE[1] * item, item)
    offset = rows.start * strides[0] + columns.start * item
    return Piece(0, 0, item, offset, strides, (rows.stop - rows.start, columns.stop - columns.start), (0, 0))


def random_tensor(dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(0, 255, (SHAPE[0], SHAPE[1] * dtype.itemsize), dtype=torch.uint8).view(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.float8_e5m2])
@pytest.mark.parametrize("columns", [slice(0, 48), slice(5, 17)])
@pytest.mark.parametrize("is_contiguous", [True, False])
@pytest.mark.parametrize("by_wire", [True, False])
def test_every_bit_lands_where_it_belongs(dtype, columns, is_contiguous, by_wire):
    full, rows = random_tensor(dtype), slice(7, 50)
    shape = (43, columns.stop - columns.start)
    target = torch.zeros(shape, dtype=dtype) if is_contiguous else torch.zeros(shape[::-1], dtype=dtype).t()
    destinations, pieces, data = Destinations([[target]]), [piece_of(full, rows, columns)], stripe_of(full)
    if by_wire:
        payload = memoryview(bytearray(b"".join(pack(pieces, data))))
        destinations.fill(packed(pieces), payload)
    else:
        destinations.fill(pieces, data)

    assert same_bits(target, full[rows, columns])


def test_a_conjugated_view_gets_the_numbers_and_not_the_bits():
    full = torch.randn(SHAPE, dtype=torch.complex64)
    base = torch.zeros(SHAPE, dtype=torch.complex64)
    Destinations([[base.conj()]]).fill([piece_of(full, slice(0, 64), slice(0, 48))], stripe_of(full))

    assert torch.equal(base.conj(), full)


def test_payloads_land_in_live_memory_only_where_it_lies_in_one_stretch():
    full = random_tensor(torch.float64)
    whole = piece_of(full, slice(0, 64), slice(0, 48))
    target = torch.zeros(SHAPE, dtype=torch.float64)
    views = Destinations([[target]]).landings([whole])

    assert views is not None
    views[0][:] = stripe_of(full)
    assert same_bits(target, full)
    assert Destinations([[torch.zeros(SHAPE[::-1], dtype=torch.float64).t()]]).landings([whole]) is None
    assert Destinations([[target]]).landings([piece_of(full, slice(0, 64), slice(0, 2))]) is None, "too small"


def test_neighbouring_pieces_are_sent_as_one_stretch():
    full = random_tensor(torch.float32)
    pieces = [piece_of(full, slice(at, at + 8), slice(0, 48)) for at in (0, 8, 16, 40)]

    assert [len(view) for view in pack(pieces, stripe_of(full))] == [24 * 48 * 4, 8 * 48 * 4]
