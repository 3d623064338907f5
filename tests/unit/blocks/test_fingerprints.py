"""Sums files hold the fingerprint of each chunk, whoever the source of the bytes is and however they pass by."""

from pathlib import Path

import numpy as np
import pytest

from dckpt.blocks.source import ImageSource
from dckpt.blocks.write import WriterPool, checksum_source, write_shard_file
from dckpt.format.checksum import parse_sums
from dckpt.format.fingerprint import fold_run
from dckpt.format.shard_file import ShardFilePlan, ShardTensor, plan_shard_file
from dckpt.storage.local import LocalStorage

SHAPES = {
    "model.wide": ("F32", (300, 20_000)),
    "model.narrow": ("BF16", (40_000, 3)),
    "model.odd": ("U8", (70_001,)),
    "optim.step": ("F32", ()),
    "optim.wide": ("F64", (1500, 1000)),
}
ITEMS = {"F64": 8, "F32": 4, "BF16": 2, "U8": 1}


def tensors() -> dict[str, np.ndarray]:
    """Whole tensors, as bytes: the last dimension is that of an element."""
    rng = np.random.default_rng(5)
    return {
        name: rng.integers(0, 256, (*shape, ITEMS[dtype]), dtype=np.uint8) for name, (dtype, shape) in SHAPES.items()
    }


def halves(whole: dict[str, np.ndarray], rank: int, *, knows_shapes: bool = True) -> tuple[ShardFilePlan, memoryview]:
    """The shard file of one of two ranks: columns of the wide ones, rows of the others, scalars on rank 0."""
    chunks, data = [], {}
    for name, (dtype, shape) in SHAPES.items():
        if not shape:
            if rank == 0:
                chunks.append(ShardTensor(name, dtype, shape, (), shape))
                data[name] = whole[name].tobytes()
            continue
        dim = 1 if name.endswith("wide") else 0
        half = shape[dim] // 2
        region = [slice(None)] * len(shape)
        region[dim] = slice(0, half) if rank == 0 else slice(half, None)
        part = whole[name][tuple(region)]
        offsets = tuple(half * rank if place == dim else 0 for place in range(len(shape)))
        chunks.append(ShardTensor(name, dtype, part.shape[:-1], offsets, shape if knows_shapes else None))
        data[name] = part.tobytes()
    plan = plan_shard_file(f"rank{rank:05d}.safetensors", chunks)
    return plan, memoryview(plan.header + b"".join(data[tensor.name] for tensor in plan.tensors))


@pytest.mark.parametrize("threads", [1, 3])
def test_those_of_all_files_make_up_those_of_the_tensors(tmp_path: Path, threads: int):
    storage, whole, pool = LocalStorage(tmp_path), tensors(), WriterPool(threads)
    storage.make_dirs("a")
    found = dict.fromkeys(SHAPES, 0)
    for rank in range(2):
        plan, image = halves(whole, rank)
        source = ImageSource(image, plan)
        write_shard_file(storage, "a", "attempt", rank, plan.file, source, lambda _: None, pool)
        sums = parse_sums((tmp_path / "a" / f"rank{rank:05d}.sums").read_bytes(), key="sums")
        assert sums == checksum_source(source, lambda _: None, pool)
        for tensor, value in zip(plan.tensors, sums.fingerprints, strict=True):
            found[tensor.name] ^= value

    pool.stop()
    assert found == {name: fold_run(memoryview(array.tobytes()), 0) for name, array in whole.items()}


def test_a_source_that_does_not_know_where_its_chunks_lie_writes_none():
    pool = WriterPool(1)
    plan, image = halves(tensors(), 1, knows_shapes=False)

    assert checksum_source(ImageSource(image, plan), lambda _: None, pool).fingerprints == ()
    assert checksum_source(ImageSource(image), lambda _: None, pool).fingerprints == ()
    pool.stop()
