"""Reads are planned as few spans of whole blocks: sorted, joined where they touch, bounded, and every target filled exactly."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dckpt.blocks.scatter import Scatter
from dckpt.dcp.spans import (
    FILL_BYTES_MAX,
    SPAN_BYTES_MAX,
    STRAIGHT_BYTES_MIN,
    BoxRead,
    Span,
    plan_reads,
    plan_spans,
)
from dckpt.format.checksum import BLOCK_BYTES
from dckpt.format.index import Chunk, build_index


def _row_chunks(shape, cuts, file_begin=4096):
    """The tensor's rows cut at `cuts`, each chunk in a file of its own."""
    edges = [0, *cuts, shape[0]]
    return [
        Chunk((a, *[0] * (len(shape) - 1)), (b - a, *shape[1:]), number, file_begin)
        for number, (a, b) in enumerate(itertools.pairwise(edges))
    ]


def _read(chunk, shape, offsets=None, sizes=None, target=None):
    sizes = sizes or shape
    target = torch.full(sizes, -1.0) if target is None else target
    return BoxRead(chunk, "F32", offsets or (0,) * len(shape), sizes, target)


def _run(spans: list[Span], files: dict[int, bytes]) -> None:
    """Does what the spans say with the bytes of `files`, each span by itself and its memory full of rubbish before."""
    for span in spans:
        data = files[span.file][span.begin : span.begin + span.max_bytes]
        memory = memoryview(bytearray(b"\x5a" * span.max_bytes))
        place = 0
        for target in Scatter(span.begin, memory, span.landings).targets(span.begin, span.begin + len(data)):
            target[:] = data[place : place + len(target)]
            place += len(target)
        for fill in span.fills:
            part = np.frombuffer(memory[fill.begin - span.begin : fill.end - span.begin], dtype=np.float32)
            fill.target.copy_(torch.from_numpy(part.copy()).view(fill.shape)[fill.inner])


def _bytes_of(spans):
    return sum(span.max_bytes for span in spans)


def test_neighbouring_chunks_of_one_file_are_one_span():
    a, b = torch.empty(100), torch.empty(50)
    reads = [_read(Chunk((0,), (50,), 0, 4496), (50,), target=b), _read(Chunk((0,), (100,), 0, 4096), (100,), target=a)]

    (span,) = plan_spans(reads)

    assert (span.file, span.first, span.stop) == (0, 0, 1)
    assert [(fill.begin, fill.end) for fill in span.fills] == [(4096, 4496), (4496, 4696)]


def test_a_block_between_and_another_file_begin_new_spans():
    def at(file, begin):
        return _read(Chunk((0,), (4,), file, begin), (4,))

    spans = plan_spans([at(0, 4096), at(0, BLOCK_BYTES), at(0, 3 * BLOCK_BYTES), at(1, 4096)])

    assert [(span.file, span.first, span.stop, len(span.fills)) for span in spans] == [
        (0, 0, 2, 2),
        (0, 3, 4, 1),
        (1, 0, 1, 1),
    ]


def test_a_large_tensor_goes_straight_to_its_memory_in_bounded_spans():
    rows = 3 * SPAN_BYTES_MAX // 4096 + 5
    live = torch.empty(rows, 1024)

    spans = plan_spans([_read(Chunk((0, 0), (rows, 1024), 0, 4096), (rows, 1024), target=live)])

    assert all(span.max_bytes <= SPAN_BYTES_MAX and not span.fills for span in spans)
    assert sum(len(landing.memory) for span in spans for landing in span.landings) == rows * 4096
    address = np.frombuffer(spans[0].landings[0].memory, np.uint8).ctypes.data
    assert address == live.data_ptr()
    assert _bytes_of(spans) <= rows * 4096 + 2 * BLOCK_BYTES


def test_no_block_is_read_twice_where_pieces_can_be_cut():
    sizes = [1000, 3000, 700_001, 5, 1024, 2_000_003, 17] * 3
    begins = [4096 + 4 * sum(sizes[:number]) for number in range(len(sizes))]
    reads = [_read(Chunk((0,), (size,), 0, begin), (size,)) for size, begin in zip(sizes, begins, strict=True)]

    spans = plan_spans(reads)

    assert all(before.stop == after.first for before, after in itertools.pairwise(spans))
    assert {bool(span.landings) for span in spans} == {True}
    whole = np.arange(1024 + sum(sizes), dtype=np.float32)
    _run(spans, {0: whole.tobytes()})
    for read, begin in zip(reads, begins, strict=True):
        assert torch.equal(read.target, torch.from_numpy(whole[begin // 4 :][: len(read.target)].copy()))


def test_a_small_tensor_is_copied_and_a_scalar_is_one_of_them():
    small = STRAIGHT_BYTES_MIN // 4 - 1
    (span,) = plan_spans([_read(Chunk((), (), 0, 4096), (), (), ()), _read(Chunk((0,), (small,), 0, 4100), (small,))])

    assert not span.landings
    assert [(fill.begin, fill.end, fill.shape) for fill in span.fills] == [
        (4096, 4100, (1,)),
        (4100, 4096 + 4096, (small,)),
    ]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_box_of_any_layout_is_filled_with_its_own_values(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, shape[0] - 1)), max_size=3))) if shape[0] > 1 else []
    chunks = _row_chunks(shape, cuts)
    index = build_index([f"rank{n:05d}.safetensors" for n in range(len(chunks))], {"w": ("F32", shape, chunks)})
    whole = torch.arange(int(np.prod(shape)), dtype=torch.float32).view(shape)
    files = {
        chunk.file: b"\0" * 4096 + whole[chunk.offsets[0] : chunk.offsets[0] + chunk.sizes[0]].numpy().tobytes()
        for chunk in chunks
    }
    live = torch.full(shape, -1.0)

    _run(plan_spans(plan_reads([("w", live)], index)), files)

    assert torch.equal(live, whole)


SHAPES = [
    (7,),
    (5, 7),
    (3, 50_000),
    (40, 3, 900),
    (2, 300, 2, 301),
    (2, 2, 90_000),
    (300, 5000),
    (1, 600_000),
    (6, 1, 5),
]


@settings(max_examples=50, deadline=None)
@given(
    data=st.data(), shape=st.sampled_from(SHAPES), is_strided=st.booleans(), begin=st.sampled_from([4096, 65_540, 4097])
)
def test_any_region_of_a_chunk_reads_little_more_than_it_needs(data, shape, is_strided, begin):
    ranges = [sorted(data.draw(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)))) for n in shape]
    offsets, sizes = tuple(a for a, _ in ranges), tuple(b - a + 1 for a, b in ranges)
    whole = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    target = torch.full(sizes[::-1], -1.0).permute(*reversed(range(len(sizes)))) if is_strided else None
    read = _read(Chunk((0,) * len(shape), shape, 0, begin), shape, offsets, sizes, target)
    wanted = {
        (begin + 4 * place) // BLOCK_BYTES
        for place in np.arange(math.prod(shape))
        .reshape(shape)[tuple(map(slice, offsets, np.add(offsets, sizes)))]
        .ravel()
    }

    spans = plan_spans([read])
    _run(spans, {0: b"\0" * begin + whole.numpy().tobytes()})

    assert torch.equal(read.target, whole[tuple(map(slice, offsets, np.add(offsets, sizes)))])
    assert all(span.max_bytes <= SPAN_BYTES_MAX + FILL_BYTES_MAX + BLOCK_BYTES for span in spans)
    blocks = [block for span in spans for block in range(span.first, span.stop)]
    assert wanted <= set(blocks)
    # Rows are copied whole: at most one block before and behind; and the seams of spans.
    assert len(blocks) <= len(wanted) + 2 + len(spans)


def test_rows_that_are_far_apart_are_read_without_what_lies_between():
    shape = (64, 4 * BLOCK_BYTES // 4)
    read = _read(Chunk((0, 0), shape, 0, 0), shape, (0, 100), (64, 50))

    spans = plan_spans([read])

    assert _bytes_of(spans) == 64 * BLOCK_BYTES


@pytest.mark.parametrize("columns", [(0, 3), (2, 5), (4, 7)])
def test_a_column_slice_takes_its_columns_of_each_row(columns):
    begin, end = columns
    whole = torch.arange(35, dtype=torch.float32).view(5, 7)
    target = torch.empty(5, end - begin)
    read = BoxRead(Chunk((0, 0), (5, 7), 0, 0), "F32", (0, begin), (5, end - begin), target)

    _run(plan_spans([read]), {0: whole.numpy().tobytes()})

    assert torch.equal(target, whole[:, begin:end])


@pytest.mark.parametrize("count", [10, 5000])
def test_bytes_that_several_targets_want_reach_all_of_them(count):
    whole = torch.arange(2 * count, dtype=torch.float32)
    chunk = Chunk((0,), (2 * count,), 0, 0)
    targets = [torch.full((count + extra,), -1.0) for extra in (0, 0, 7)]
    reads = [
        _read(chunk, (2 * count,), (offset,), (len(target),), target)
        for offset, target in zip((0, 3, 1), targets, strict=True)
    ]

    _run(plan_spans(reads), {0: whole.numpy().tobytes()})

    for offset, target in zip((0, 3, 1), targets, strict=True):
        assert torch.equal(target, whole[offset : offset + len(target)])
