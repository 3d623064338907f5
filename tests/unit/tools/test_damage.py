"""Damage in terms of ranks and tensors; a header and an index that tell different stories are told apart."""

from __future__ import annotations

import pytest

from dckpt.errors import CorruptCheckpointError, StorageError, StorageMissingError
from dckpt.format.index import Chunk, LayoutIndex, build_index
from dckpt.format.shard_file import ShardHeader, ShardTensor, parse_shard_header, plan_shard_file
from dckpt.tools.damage import (
    Damage,
    compare_header,
    damage_from_error,
    extents_from_header,
    extents_from_index,
    merge_ranges,
    sorted_damages,
)

FILE = "rank00000.safetensors"


def header_of(*tensors: ShardTensor) -> ShardHeader:
    plan = plan_shard_file(FILE, tensors)
    return parse_shard_header(plan.header, file_bytes=plan.size, key=FILE)


def index_of(header: ShardHeader, *, dtype: str = "F32", shift: int = 0) -> LayoutIndex:
    chunks = {
        tensor.name: (dtype, tensor.shape, [Chunk(tensor.offsets, tensor.shape, 0, begin + shift)])
        for tensor, begin in zip(header.tensors, header.begins, strict=True)
    }
    return build_index((FILE,), chunks)


WEIGHT = ShardTensor("weight", "F32", (4, 2), (0, 0))
BIAS = ShardTensor("bias", "F32", (4,), (0,))


def test_a_header_and_an_index_that_agree_are_no_damage() -> None:
    header = header_of(WEIGHT, BIAS)

    assert compare_header(header, index_of(header), 0, key=FILE, ranks=(0,)) == []
    assert extents_from_header(header).tensors == extents_from_index(index_of(header), 0).tensors


@pytest.mark.parametrize(
    ("index", "names", "what"),
    [
        (index_of(header_of(WEIGHT, BIAS), shift=4), ["bias", "weight"], "at bytes"),
        (index_of(header_of(WEIGHT, BIAS), dtype="I32"), ["bias", "weight"], "I32"),
        (index_of(header_of(WEIGHT)), ["bias", "weight"], "only the header has it"),
        (index_of(header_of(WEIGHT, BIAS, ShardTensor("zeta", "F32", (1,), (0,)))), ["zeta"], "only the index"),
        (index_of(header_of(ShardTensor("weight", "F32", (2, 4), (0, 0)), BIAS)), ["weight"], "[2, 4]"),
    ],
)
def test_each_difference_between_header_and_index_names_its_tensor(
    index: LayoutIndex, names: list[str], what: str
) -> None:
    damages = compare_header(header_of(WEIGHT, BIAS), index, 0, key=FILE, ranks=(3,))

    assert [damage.tensors for damage in damages] == [(name,) for name in names]
    assert all(damage.file == FILE and damage.ranks == (3,) for damage in damages)
    assert any(what in damage.what for damage in damages)


def test_a_range_names_the_tensors_that_lose_bytes_and_the_header() -> None:
    extents = extents_from_header(header_of(WEIGHT, BIAS))

    assert extents.tensors == (("bias", 4096, 4112), ("weight", 4112, 4144))
    assert extents.names_in(4100, 4112) == ("bias",)
    assert extents.names_in(4111, 4113) == ("bias", "weight")
    assert [extents.describe(*span) for span in ((0, 10), (0, 5000), (4096, 5000))] == [
        *("header", "header and data", "data"),
    ]


def test_ranges_that_touch_are_one() -> None:
    assert merge_ranges([(20, 30), (0, 10), (10, 20), (40, 50)]) == [(0, 30), (40, 50)]


def test_damages_are_listed_once_by_file_and_place() -> None:
    first, second = Damage("a", "x", 5, 6), Damage("a", "x", 1, 2)

    assert sorted_damages([Damage("b", "y"), first, second, first]) == (second, first, Damage("b", "y"))


def test_a_storage_that_fails_is_told_from_damage() -> None:
    assert damage_from_error(StorageMissingError("no such file"), "f") == Damage("f", "missing")
    assert damage_from_error(StorageError("EIO"), "f").is_unreadable
    assert not damage_from_error(CorruptCheckpointError("bad"), "f").is_unreadable
