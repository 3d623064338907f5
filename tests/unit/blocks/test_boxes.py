"""Ranges of one array's bytes filled from the chunks of another, against NumPy's own indexing."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from dckpt.blocks import boxes
from dckpt.blocks.boxes import intersect, plan_copies, plan_spans, range_boxes
from dckpt.format.grids import cell_box
from dckpt.format.index import Chunk

SHAPES = [(), (7,), (1, 1), (3, 4), (5, 1, 3), (1, 6, 2), (2, 3, 4, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_range_is_covered_once_by_boxes_that_are_contiguous_in_it(shape):
    numbers = np.arange(math.prod(shape)).reshape(shape)
    for first, stop in itertools.combinations_with_replacement(range(numbers.size + 1), 2):
        found = []
        for offsets, sizes in range_boxes(shape, first, stop):
            found += numbers[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].ravel().tolist()
        assert found == list(range(first, stop))


def test_a_range_is_a_handful_of_boxes_however_large_the_array_is():
    sizes = (100_000, 64, 32)

    assert len(list(range_boxes(sizes, 2048 * 7 + 33, 2048 * 90_000 + 5))) <= 5


def test_boxes_that_share_no_element_have_no_intersection():
    assert intersect(((0, 0), (2, 2)), ((2, 0), (1, 2))) is None
    assert intersect(((0, 0), (3, 2)), ((2, 1), (9, 9))) == ((2, 1), (1, 1))
    assert intersect(((), ()), ((), ())) == ((), ())


def lay_out(array, levels, rng):
    """The array's cells, each in a file of its own with foreign bytes around it."""
    chunks, files = [], []
    for place in itertools.product(*(range(math.prod(counts)) for counts in levels)):
        offsets, sizes = cell_box(array.shape, levels, place)
        if 0 in sizes:
            continue
        part = array[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
        begin = array.itemsize * rng.randrange(5)
        chunks.append(Chunk(offsets, sizes, len(files), begin))
        files.append(rng.randbytes(begin) + np.ascontiguousarray(part).tobytes() + rng.randbytes(8))
    return chunks, files


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize(("span", "gap"), [(8 * 2**20, 512 * 1024), (64, 16), (16, 0)])
def test_any_range_of_any_box_comes_out_as_numpy_cuts_it(seed, span, gap, monkeypatch):
    """Small limits make the splits happen that large tensors make."""
    monkeypatch.setattr(boxes, "SPAN_BYTES_MAX", span)
    monkeypatch.setattr(boxes, "GAP_BYTES_MAX", gap)
    rng = random.Random(seed)
    shape = tuple(rng.randint(1, 9) for _ in range(rng.randint(0, 4)))
    dtype = rng.choice(["u1", "<u2", "<f4", "<f8"])
    array = np.frombuffer(rng.randbytes(math.prod(shape) * np.dtype(dtype).itemsize), dtype).reshape(shape)
    levels = tuple(rng.choice([(), (2,), (3,), (2, 2)]) for _ in shape)
    chunks, files = lay_out(array, levels, rng)
    offsets = tuple(rng.randrange(size) for size in shape)
    sizes = tuple(rng.randint(1, size - at) for size, at in zip(shape, offsets, strict=True))
    wanted = np.ascontiguousarray(array[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]).tobytes()
    item = array.itemsize
    first = rng.randrange(len(wanted) // item) * item
    nbytes = rng.randint(1, (len(wanted) - first) // item) * item
    piece = memoryview(bytearray(b"\xa5" * (nbytes + 64)))
    at = item * rng.randrange(4)

    copies = list(plan_copies(chunks, (offsets, sizes), item, first, nbytes, at))
    for read in plan_spans(copies):
        data = memoryview(files[read.file])[read.begin : read.end]
        assert len(data) <= max(span, max(copy.end - copy.begin for copy in read.copies))
        for copy in read.copies:
            copy.run(data[copy.begin - read.begin : copy.end - read.begin], piece)

    assert bytes(piece[at : at + nbytes]) == wanted[first : first + nbytes]
    assert set(piece[:at]) | set(piece[at + nbytes :]) <= {0xA5}


def test_a_column_is_not_read_with_all_that_lies_between_its_elements():
    """64 rows of 2 MiB, of which 4 KiB each are wanted: 64 reads of 4 KiB, not one of 128 MiB."""
    chunk = Chunk((0, 0), (64, 2**19), 0, 4096)
    copies = list(plan_copies([chunk], ((0, 512), (64, 1024)), 4, 0, 64 * 4096, 0))

    assert [read.end - read.begin for read in plan_spans(copies)] == [4096] * 64


def test_neighbouring_columns_are_read_together_and_no_read_is_long():
    """4,096 rows of 16 KiB, half of each wanted: 64 MiB are read in spans of at most 8."""
    chunk = Chunk((0, 0), (4096, 4096), 0, 0)
    copies = list(plan_copies([chunk], ((0, 0), (4096, 2048)), 4, 0, 4096 * 8192, 0))
    reads = plan_spans(copies)

    assert max(read.end - read.begin for read in reads) <= boxes.SPAN_BYTES_MAX
    assert len(reads) <= 16


def test_small_tensors_that_lie_beside_each_other_are_one_read():
    copies = []
    for number in range(1000):
        chunk = Chunk((0,), (256,), 0, 4096 + 1024 * number)
        copies += plan_copies([chunk], ((0,), (256,)), 4, 0, 1024, 1024 * number)

    assert [(read.begin, read.end) for read in plan_spans(copies)] == [(4096, 4096 + 1024 * 1000)]
