"""Tensors whose chunks are the cells of a grid: the same answers as a list of chunks, in a few numbers."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dckpt.errors import ConfigError, CorruptCheckpointError
from dckpt.format.grids import cell_box, cell_place, find_grid, parts_of
from dckpt.format.index import Chunk, Grid, build_index, encode_index, parse_index
from dckpt.format.shard_file import DTYPES, ShardTensor, plan_shard_files
from tests.unit.format.test_index import read_as_a_stranger, write_as_a_stranger

KEY = "step-0000001200.g0007/layout-x.index"


def levels_of(parts) -> tuple[tuple[int, ...], ...]:
    """Numbers of parts, or levels, along each dimension as levels; one part is no cut."""
    found = [(count,) if isinstance(count, int) else tuple(count) for count in parts]
    return tuple(tuple(number for number in counts if number > 1) for counts in found)


def torch_chunk_boxes(size: int, parts: int) -> list[tuple[int, int]]:
    """(offset, length) of every part, by the rule that torch.chunk documents."""
    length = -(-size // parts)
    return [(min(at * length, size), max(0, min(length, size - at * length))) for at in range(parts)]


def files_of(tensors: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]], ranks: int, records: int = 0):
    """(index from lists of chunks, index from grids) of tensors cut over `ranks` ranks, planned as real shard files."""
    mine: list[list[ShardTensor]] = [[] for _ in range(ranks)]
    grids = {}
    for name, (dtype, shape, parts) in tensors.items():
        levels = levels_of(parts)
        parts = parts_of(levels)
        cells = np.prod(parts, dtype=int)
        writers = [(hash(name) + cell) % ranks for cell in range(cells)] if cells <= ranks else None
        assert writers is not None
        for cell, writer in enumerate(writers):
            offsets, sizes = cell_box(shape, levels, cell_place(parts, cell))
            if 0 not in sizes:
                mine[writer].append(ShardTensor(name, dtype, sizes, offsets))
        grids[name] = (dtype, shape, Grid(levels, tuple(writers)))
    for rank in range(records):
        mine[rank].append(ShardTensor(f"rank.{rank}.values.rng", "U8", (7 + rank,), (0,)))
        grids[f"rank.{rank}.values.rng"] = ("U8", (7 + rank,), Grid((), (rank,)))
    names, begins, chunks = [], [], {name: [] for name in grids}
    for rank in range(ranks):
        mine[rank].append(ShardTensor(f"own.{rank}", "F64", (1,), (0,)))
        grids[f"own.{rank}"] = ("F64", (1,), Grid((), (rank,)))
        if rank < 2 <= ranks:  # cut 1 + 3: no grid
            mine[rank].append(ShardTensor("odd", "I32", (1 + 2 * rank,), (rank,)))
        (plan,) = plan_shard_files(rank, mine[rank])
        for tensor, begin in zip(plan.tensors, plan.begins, strict=True):
            chunks.setdefault(tensor.name, []).append(Chunk(tensor.offsets, tensor.shape, rank, begin))
        names.append(plan.file)
        begins.append(plan.begins[0])
    if ranks >= 2:  # listed chunks among cells of grids, in one file
        grids["odd"] = ("I32", (4,), chunks["odd"])
    lists = {name: (grids[name][0], grids[name][1], found) for name, found in chunks.items()}
    return build_index(names, lists), build_index(names, grids, data_begins=begins), (names, lists, begins)


@st.composite
def layouts(draw):
    ranks = draw(st.integers(1, 6))
    tensors = {}
    for number in range(draw(st.integers(0, 6))):
        shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        axis = draw(st.integers(0, max(0, len(shape) - 1)))
        count = draw(st.integers(1, ranks))
        nested = [(first, count // first) for first in range(1, count + 1) if count % first == 0]
        parts = (*(1,) * axis, draw(st.sampled_from([count, *nested]))) if shape else ()
        tensors[f"t{number}"] = (dtype, shape, parts)
    return tensors, ranks, draw(st.integers(0, ranks))


@settings(max_examples=150, deadline=None)
@given(layouts())
def test_grids_answer_as_lists_of_chunks_do(layout):
    tensors, ranks, records = layout
    listed, gridded, (names, lists, begins) = files_of(tensors, ranks, records)
    compacted = build_index(names, lists, data_begins=begins)
    for index in (gridded, parse_index(encode_index(gridded), key=KEY), compacted):
        assert index.names() == listed.names()
        assert index.num_chunks == listed.num_chunks
        assert index.file_extents() == listed.file_extents()
        assert [index.file_extent(file) for file in range(ranks)] == listed.file_extents()
        for file in range(ranks):
            assert index.chunks_in_file(file) == listed.chunks_in_file(file)
        for name in listed.names():
            assert index.meta(name) == listed.meta(name)
            assert index.chunks(name) == listed.chunks(name)
            shape = listed.meta(name).shape
            for box in itertools.islice(boxes_within(shape), 40):
                assert index.chunks_overlapping(name, *box) == listed.chunks_overlapping(name, *box)
    assert parse_index(encode_index(gridded), key=KEY) == gridded


def boxes_within(shape):
    spans = [[(low, high - low) for low in range(size) for high in range(low, size + 1)] for size in shape]
    for box in itertools.product(*spans):
        yield tuple(offset for offset, _ in box), tuple(size for _, size in box)


@pytest.mark.parametrize("size", [0, 1, 5, 16, 31, 128])
@pytest.mark.parametrize("counts", [(2, 3), (3, 2), (2, 2, 2), (8, 4)])
def test_parts_of_parts_are_cut_by_their_own_length(size, counts):
    """Against torch.chunk of torch.chunk, which gives fewer pieces instead of empty ones."""
    pieces = [torch.arange(size)]
    for count in counts:
        pieces = [part for piece in pieces for part in (*torch.chunk(piece, count), *[piece[:0]] * count)[:count]]
    boxes = [cell_box((size,), (counts,), (place,)) for place in range(math.prod(counts))]

    assert [length for _, (length,) in boxes] == [len(piece) for piece in pieces]
    assert [offset for (offset,), (length,) in boxes if length] == [int(piece[0]) for piece in pieces if len(piece)]


@pytest.mark.parametrize("size", range(13))
@pytest.mark.parametrize("parts", range(1, 9))
def test_a_cell_is_what_torch_chunk_gives(size, parts):
    boxes = [cell_box((size, 3), ((parts,),), (place,)) for place in range(parts)]

    assert boxes == [((offset, 0), (length, 3)) for offset, length in torch_chunk_boxes(size, parts)]
    full = [box for box in boxes if box[1][0]]
    assert find_grid((size, 3), full) == (None if size == 0 else ((len(full),),) if len(full) > 1 else ())


def test_a_large_regular_layout_takes_a_few_bytes_a_rank():
    """512 ranks, 300 tensors: 153,600 chunks."""
    ranks = 512
    tensors = {f"layer.{n}.weight": ("BF16", (8192, 64), (ranks,)) for n in range(300)}
    index = build_index(
        [f"rank{rank:05d}.safetensors" for rank in range(ranks)],
        {name: (dtype, shape, Grid((parts,), tuple(range(ranks)))) for name, (dtype, shape, parts) in tensors.items()},
        data_begins=[8192] * ranks,
    )

    assert index.num_chunks == 153_600
    assert len(encode_index(index)) < 64 * 1024
    (chunk,) = index.chunks_overlapping("layer.7.weight", (16 * 100, 0), (16, 64))
    # Names ascend as text: 7 comes after 69 and 299.
    before = sorted(tensors).index("layer.7.weight")
    assert chunk == Chunk((1600, 0), (16, 64), 100, 8192 + before * 16 * 64 * 2)


def a_gridded_index():
    return files_of({"a.weight": ("F32", (8, 6), (4,)), "b.bias": ("BF16", (5,), (2,))}, 4)[1]


@pytest.mark.parametrize(
    ("column", "place", "value", "field"),
    [
        ("grid", 0, 7, "a.weight"),
        ("grid", 0, -2, "a.weight"),
        ("grid", 2, 0, "odd"),
        ("grid_ndim", 0, 2, "column grid_ndim"),
        ("grid_ndim", 0, 65, "column grid_ndim"),
        ("grid_parts", 0, 0, "column grid_parts"),
        ("grid_levels", 0, 2, "column grid_levels"),
        ("grid_levels", 0, 17, "column grid_levels"),
        ("grid_parts", 0, 1, "column grid_parts"),
        ("grid_parts", 0, 3, "column cell_ends"),
        ("grid_parts", 0, 2**40, "column grid_parts"),
        ("cell_ends", 0, 3, "column cell_ends"),
        ("cell_ends", -1, 2**40, "column cell_ends"),
        ("cells", 0, -1, "column cells"),
        ("cells", 0, 4, "column cells"),
        ("cells", 0, lambda cells: cells[1], "column cells"),
        ("data_begin", 0, 2**62, "column data_begin"),
    ],
)
def test_a_forged_grid_is_named(column, place, value, field):
    header, columns = read_as_a_stranger(encode_index(a_gridded_index()))
    columns[column][place] = value(columns[column]) if callable(value) else value
    with pytest.raises(CorruptCheckpointError) as caught:
        parse_index(write_as_a_stranger(header, columns), key=KEY)

    assert caught.value.field == field


def test_grids_need_to_know_where_the_data_of_each_file_begins():
    header, columns = read_as_a_stranger(encode_index(a_gridded_index()))
    columns["data_begin"] = []
    with pytest.raises(CorruptCheckpointError, match="data_begin: expected 4 items"):
        parse_index(write_as_a_stranger(header, columns), key=KEY)


def test_a_listed_chunk_beside_cells_must_lie_where_the_order_says():
    header, columns = read_as_a_stranger(encode_index(a_gridded_index()))
    columns["begin"][0] += 8
    index = parse_index(write_as_a_stranger(header, columns), key=KEY)
    with pytest.raises(CorruptCheckpointError) as caught:
        index.chunks_in_file(0)

    assert (caught.value.key, caught.value.field) == (KEY, "odd")


def test_one_file_cannot_hold_two_cells_of_a_grid():
    with pytest.raises(ConfigError, match="each file at most once"):
        build_index(["a.safetensors"], {"w": ("F32", (4,), Grid(((2,),), (0, 0)))}, data_begins=[4096])
