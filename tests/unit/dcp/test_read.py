"""Boxes read from real files for every rank of another layout: right, and counted; many small tensors; small memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from dckpt.blocks.source import ImageSource
from dckpt.blocks.write import WriterPool, write_shard_file
from dckpt.dcp.chunks import LocalChunk
from dckpt.dcp.read import READ_BYTES_MAX, CheckpointFiles
from dckpt.dcp.spans import reads_of_box
from dckpt.format.grids import Grid, cell_box
from dckpt.format.index import LayoutIndex, build_index
from dckpt.format.layout import shard_file_name
from dckpt.format.manifest import FileEntry, Manifest
from dckpt.format.shard_file import ShardTensor, plan_shard_file
from dckpt.storage.local import LocalStorage

Shape = tuple[int, ...]
ATTEMPT = "a" * 32


def value_of(shape: Shape, number: int) -> torch.Tensor:
    return torch.arange(math.prod(shape), dtype=torch.int32).view(shape) + 1000 * number


def levels_of(parts: Shape) -> tuple[tuple[int, ...], ...]:
    return tuple((count,) if count > 1 else () for count in parts)


def boxes_of(shape: Shape, parts: Shape) -> list[tuple[Shape, Shape]]:
    """The box of each rank: `parts` along each of the first dimensions, as torch.chunk cuts."""
    places = itertools.product(*(range(count) for count in parts))
    return [cell_box(shape, levels_of(parts), place) for place in places]


def save(root: Path, shapes: Sequence[Shape], parts: Shape) -> tuple[LocalStorage, Manifest, LayoutIndex]:
    """What math.prod(parts) ranks would have saved, without the manifest file."""
    storage, pool = LocalStorage(root), WriterPool(1)
    storage.make_dirs(f"step/{ATTEMPT}")
    entries: list[FileEntry] = []
    begins = []
    for rank in range(math.prod(parts)):
        boxes = {f"t{number:05d}": boxes_of(shape, parts)[rank] for number, shape in enumerate(shapes)}
        plan = plan_shard_file(shard_file_name(rank), [ShardTensor(n, "I32", s, o) for n, (o, s) in boxes.items()])
        image = bytearray(plan.header)
        for tensor in plan.tensors:
            region = tuple(slice(o, o + s) for o, s in zip(tensor.offsets, tensor.shape, strict=True))
            whole = value_of(shapes[int(tensor.name[1:])], int(tensor.name[1:]))
            image += whole[region].contiguous().numpy().tobytes()
        begins.append(len(plan.header))
        entries += write_shard_file(
            storage, f"step/{ATTEMPT}", ATTEMPT, rank, plan.file, ImageSource(memoryview(image)), lambda _: None, pool
        )
    pool.stop()
    files = [shard_file_name(rank) for rank in range(math.prod(parts))]
    grid = Grid(levels_of(parts), tuple(range(len(files))))
    tensors = {f"t{number:05d}": ("I32", shape, grid) for number, shape in enumerate(shapes)}
    index = build_index(files, tensors, data_begins=begins)
    index_entry = FileEntry("layout.index", 0, "0" * 32, "index", None)
    manifest = Manifest("run", 1, 0, 1, ATTEMPT, 1.0, len(files), files=(*entries, index_entry))
    return storage, manifest, index


def load(
    storage: LocalStorage, manifest: Manifest, index: LayoutIndex, shapes: Sequence[Shape], parts: Shape
) -> tuple[int, int]:
    """Loads as each of math.prod(parts) ranks in turn and compares all values; bytes read and held by all."""
    read = held = 0
    for rank in range(math.prod(parts)):
        targets = []
        with CheckpointFiles(storage, "step", manifest, index) as files:
            reads = []
            for number, shape in enumerate(shapes):
                offsets, sizes = boxes_of(shape, parts)[rank]
                box = LocalChunk(offsets, sizes, torch.full(sizes, -1, dtype=torch.int32))
                targets.append(box)
                reads += reads_of_box(f"t{number:05d}", box, index)
            files.read_boxes(reads, lambda _: None)
            for number in range(rank, len(index.files), math.prod(parts)):
                files.verify_rest(number, lambda _: True, lambda _: None)
            read += files.tally.total
        for number, box in enumerate(targets):
            region = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))
            assert torch.equal(box.tensor, value_of(shapes[number], number)[region]), (rank, number)
            held += box.tensor.numel() * 4
    return read, held


LARGE = [(2400, 2500), (1201, 5000), (6_000_007,)]  # 24 MB each: of 8 ranks, one holds 3 MB


@pytest.mark.parametrize(
    ("shapes", "saved", "loaded"),
    [
        *((LARGE, (n,), (m,)) for n, m in [(2, 2), (2, 3), (2, 8), (4, 2), (8, 3)]),
        ([(4, 3000, 1000)], (1, 2), (1, 3)),
        ([(300, 5000)], (2,), (2, 1)),
    ],
)
def test_the_bytes_read_stay_close_to_the_bytes_needed(tmp_path, shapes, saved, loaded):
    read, held = load(*save(tmp_path, shapes, saved), shapes, loaded)

    assert held == sum(4 * math.prod(shape) for shape in shapes)
    assert read <= 1.05 * held, read / held


@pytest.mark.parametrize("loaded", [(1, 2), (3, 1), (2, 2)])
def test_columns_of_rows_arrive_right(tmp_path, loaded):
    shapes = [(50, 70), (3, 40_000), (5, 6, 7), (130, 5001)]

    read, held = load(*save(tmp_path, shapes, (2,)), shapes, loaded)

    # Rows are read whole by every rank that wants some of their columns.
    assert read <= held * math.prod(loaded[1:]) + 16 * 65536 * math.prod(loaded)


def test_thousands_of_small_tensors_take_few_reads(tmp_path):
    shapes = [(16, 16)] * 2000
    storage, manifest, index = save(tmp_path, shapes, (2,))
    beats: list[int] = []
    targets = [torch.empty(16, 16, dtype=torch.int32) for _ in shapes]
    with CheckpointFiles(storage, "step", manifest, index) as files:
        reads = [
            read
            for number, target in enumerate(targets)
            for read in reads_of_box(f"t{number:05d}", LocalChunk((0, 0), (16, 16), target), index)
        ]
        files.read_boxes(reads, beats.append)

    assert len(beats) == 2
    assert all(torch.equal(target, value_of((16, 16), number)) for number, target in enumerate(targets))


def memory_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("columns", [100_000, 50_000])
def test_reading_takes_no_more_memory_than_it_says(tmp_path, columns):
    """Whole rows go straight to the tensor; half of each row passes through the memory of the threads."""
    shape = (300, 100_000)
    storage, manifest, index = save(tmp_path, [shape], (1,))
    target = torch.full((300, columns), -1, dtype=torch.int32)
    with CheckpointFiles(storage, "step", manifest, index) as files:
        reads = list(reads_of_box("t00000", LocalChunk((0, 0), (300, columns), target), index))
        Path("/proc/self/clear_refs").write_text("5")  # the peak is measured from here on
        before = memory_bytes("VmRSS")
        files.read_boxes(reads, lambda _: None)
        grown = memory_bytes("VmHWM") - before

    assert torch.equal(target, value_of(shape, 0)[:, :columns])
    assert grown <= READ_BYTES_MAX + 8 * 2**20
