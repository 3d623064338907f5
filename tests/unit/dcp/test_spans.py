"""Reads are planned as few spans: sorted, coalesced over small gaps, bounded, and they fill every target exactly."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dckpt.dcp.spans import GAP_BYTES_MAX, SPAN_BYTES_MAX, BoxRead, plan_spans, plan_tensor_reads
from dckpt.format.index import Chunk, build_index


def _row_chunks(shape, cuts, file_begin=4096):
    """The tensor's rows cut at `cuts`, each chunk in a file of its own."""
    edges = [0, *cuts, shape[0]]
    return [
        Chunk((a, *[0] * (len(shape) - 1)), (b - a, *shape[1:]), number, file_begin)
        for number, (a, b) in enumerate(itertools.pairwise(edges))
    ]


def _run(spans, files):
    for span in spans:
        data = files[span.file]
        for fill in span.fills:
            part = np.frombuffer(data, dtype=np.float32, count=(fill.end - fill.begin) // 4, offset=fill.begin)
            fill.target.copy_(torch.from_numpy(part.copy()).view(fill.shape)[fill.inner])


def test_neighbouring_chunks_of_one_file_are_one_span():
    a, b = torch.empty(100), torch.empty(50)
    reads = [
        BoxRead(Chunk((0,), (50,), 0, 4496), "F32", (0,), (50,), b),
        BoxRead(Chunk((0,), (100,), 0, 4096), "F32", (0,), (100,), a),
    ]

    (span,) = plan_spans(reads)

    assert (span.file, span.begin, span.end, len(span.fills)) == (0, 4096, 4696, 2)


def test_a_wide_gap_and_another_file_begin_new_spans():
    def at(file, begin):
        return BoxRead(Chunk((0,), (4,), file, begin), "F32", (0,), (4,), torch.empty(4))

    spans = plan_spans([at(0, 4096), at(0, 4096 + 16 + GAP_BYTES_MAX + 1), at(1, 4096)])

    assert [(span.file, span.begin) for span in spans] == [(0, 4096), (0, 4112 + GAP_BYTES_MAX + 1), (1, 4096)]


def test_a_large_tensor_is_read_in_bounded_spans_of_whole_rows():
    rows = 3 * SPAN_BYTES_MAX // 4096 + 5
    read = BoxRead(Chunk((0, 0), (rows, 1024), 0, 4096), "F32", (0, 0), (rows, 1024), torch.empty(rows, 1024))

    spans = plan_spans([read])

    assert all(span.end - span.begin <= SPAN_BYTES_MAX for span in spans)
    assert sum(span.end - span.begin for span in spans) == rows * 4096


def test_a_scalar_is_a_span_of_its_bytes():
    (span,) = plan_spans([BoxRead(Chunk((), (), 0, 4096), "F32", (), (), torch.empty(()))])

    assert (span.begin, span.end) == (4096, 4100)


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

    _run(plan_spans(plan_tensor_reads("w", index, live)), files)

    assert torch.equal(live, whole)


@pytest.mark.parametrize("columns", [(0, 3), (2, 5), (4, 7)])
def test_a_column_slice_takes_its_columns_of_each_row(columns):
    begin, end = columns
    whole = torch.arange(35, dtype=torch.float32).view(5, 7)
    target = torch.empty(5, end - begin)
    read = BoxRead(Chunk((0, 0), (5, 7), 0, 0), "F32", (0, begin), (5, end - begin), target)

    _run(plan_spans([read]), {0: whole.numpy().tobytes()})

    assert torch.equal(target, whole[:, begin:end])
