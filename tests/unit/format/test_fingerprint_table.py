"""Many chunks of a file at once have the fingerprints that each has by itself, wherever the file is cut."""

import itertools
import random

import numpy as np
import pytest

from dckpt.format.fingerprint import box_runs, fold_box
from dckpt.format.fingerprint_table import SMALL_BYTES, TOGETHER_MIN
from dckpt.format.shard_file import DTYPES, ShardFilePlan, ShardTensor, plan_shard_file

WINDOW = 4 * 2**20


def a_file(*, knows_shapes: bool = True) -> tuple[ShardFilePlan, bytes]:
    """Hundreds of small chunks of few kinds, among them larger ones, columns and some at the seam of windows."""
    chunks = []
    for number in range(40):
        kinds: list[tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = [
            ("F32", (), (), ()),
            ("I64", (), (), ()),
            ("F32", (24,), (24,), (0,)),
            ("F32", (7,), (7,), (0,)),
            ("F32", (24,), (11,), (13,)),
            ("BF16", (24,), (5,), (3,)),
            ("BF16", (5, 6), (5, 3), (0, 3)),
            ("U8", (9,), (9,), (0,)),
            ("F32", (2 * WINDOW,), (24,), (WINDOW // 4 - 12,)),
            ("F64", (WINDOW,), (3,), (WINDOW // 8,)),
            ("F32", (SMALL_BYTES // 4,), (SMALL_BYTES // 4,), (0,)),
            ("F32", (SMALL_BYTES // 4 + 1,), (SMALL_BYTES // 4 + 1,), (0,)),
        ]
        for kind, (dtype, whole, shape, offsets) in enumerate(kinds[: 12 if number < 20 else TOGETHER_MIN]):
            name = f"{number:03d}.{kind}"
            chunks.append(ShardTensor(name, dtype, shape, offsets, whole if knows_shapes else None))
    plan = plan_shard_file("rank00000.safetensors", chunks)
    data = np.random.default_rng(7).integers(0, 256, plan.size - len(plan.header), dtype=np.uint8)
    return plan, plan.header + data.tobytes()


@pytest.mark.parametrize("step", [1, 8, 4096])
def test_they_are_those_of_each_chunk_alone(step: int):
    plan, data = a_file()
    table, view = plan.chunk_table, memoryview(data)
    assert table is not None
    rng = random.Random(step)
    for pieces in (1, 2, 7, 60):
        cuts = sorted({0, plan.size, *(rng.randrange(0, plan.size, step) for _ in range(pieces - 1))})
        values = [0] * len(plan.tensors)
        for begin, end in itertools.pairwise(cuts):
            for number, value in table.fold(begin, view[begin:end]):
                values[number] ^= value

        for tensor, begin, value in zip(plan.tensors, plan.begins, values, strict=True):
            assert tensor.global_shape is not None
            runs = box_runs(tensor.global_shape, tensor.offsets, tensor.shape, DTYPES[tensor.dtype])
            assert value == fold_box(view[begin : begin + tensor.nbytes], 0, runs), tensor


def test_without_the_shape_of_every_tensor_there_is_no_table():
    assert a_file(knows_shapes=False)[0].chunk_table is None


def test_a_file_without_tensors_has_nothing_to_fold():
    plan = plan_shard_file("rank00000.safetensors", [])
    assert plan.chunk_table is not None
    assert plan.chunk_table.fold(0, memoryview(plan.header)) == []
