"""Fingerprints: equal for every way to cut a tensor, different for every way to get one wrong."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dckpt.format.fingerprint import (
    box_runs,
    decode_fingerprint,
    encode_fingerprint,
    fold_box,
    fold_run,
)

MASK = 2**64 - 1
WINDOW = 4 * 2**20


def mix(x: int) -> int:
    z = (x + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def rotl(word: int, by: int) -> int:
    return ((word << by) | (word >> (64 - by))) & MASK


def by_the_book(data: bytes, begin: int = 0) -> int:
    """Word by word, as FORMAT.md says it; the data begin at byte `begin` of the tensor."""
    data = bytes(begin % 8) + data
    lanes = [0, 0]
    for place in range(0, len(data), 8):
        n = begin // 8 + place // 8
        y = mix(2**32 + n // 524288)
        z = mix((n % 524288 + (y >> 12) % 1021) % 1021)
        word = int.from_bytes(data[place : place + 8], "little")
        lanes[0] ^= rotl(word, (z + y) % 64)
        lanes[1] ^= rotl(word, ((z >> 6) + (y >> 6)) % 64)
    return lanes[0] | lanes[1] << 64


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def whole(array: np.ndarray) -> int:
    return fold_run(memoryview(np.ascontiguousarray(array)).cast("B"), 0)


def of_box(array: np.ndarray, offsets: Sequence[int], sizes: Sequence[int], shape: Sequence[int] | None = None) -> int:
    """Of the box of `array`, as if it stood at these offsets of a tensor of `shape`."""
    region = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
    data = memoryview(np.ascontiguousarray(array[region]).tobytes())
    return fold_box(data, 0, box_runs(shape or array.shape, offsets, sizes, array.itemsize))


@pytest.mark.parametrize("begin", [0, 3, 8, 8160, WINDOW - 5, WINDOW - 16, 3 * WINDOW + 8])
@pytest.mark.parametrize("size", [0, 1, 5, 8, 24, 8167, 8168, 8169, 40_000])
def test_it_is_what_the_format_says(begin: int, size: int):
    data = noise(size).tobytes()

    assert fold_run(memoryview(data), begin) == by_the_book(data, begin)


def test_it_never_changes():
    found = encode_fingerprint(fold_run(memoryview(bytes(range(256)) * 100), 0)).hex()

    assert found == "d51cebf48f46b1ae708b86cbd52e236e"


def test_a_fingerprint_is_two_little_endian_lanes():
    value = 0x0123456789ABCDEF | 0xFEDCBA9876543210 << 64

    assert encode_fingerprint(value) == (0x0123456789ABCDEF).to_bytes(8, "little") + bytes.fromhex("1032547698badcfe")
    assert decode_fingerprint(encode_fingerprint(value)) == value


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[tuple[int, ...], int, list[tuple[list[int], list[int]]], list[int]]:
    """Shape, item size, boxes that make up the tensor, and where the stream of each box's bytes is cut."""
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 5, 7, 8, 64, 100]), max_size=4).map(tuple))
    item = draw(st.sampled_from([1, 2, 4, 8]))
    boxes = [([0] * len(shape), list(shape))]
    for _ in range(draw(st.integers(0, 5))):
        offsets, sizes = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dims = [dim for dim, size in enumerate(sizes) if size > 1]
        if not dims:
            boxes.append((offsets, sizes))
            continue
        dim = draw(st.sampled_from(dims))
        at = draw(st.integers(1, sizes[dim] - 1))
        boxes.append((offsets, [*sizes[:dim], at, *sizes[dim + 1 :]]))
        boxes.append(
            (
                [*offsets[:dim], offsets[dim] + at, *offsets[dim + 1 :]],
                [*sizes[:dim], sizes[dim] - at, *sizes[dim + 1 :]],
            )
        )
    return shape, item, boxes, draw(st.lists(st.integers(0, 10**6), max_size=4))


@settings(max_examples=200, deadline=None)
@given(cut_tensors())
@example(((3, 1021, 8), 8, [([0, 0, 0], [3, 1021, 3]), ([0, 0, 3], [3, 1021, 5])], [1000, 60_000]))
def test_however_a_tensor_and_its_stream_are_cut_the_sum_is_the_same(drawn):
    shape, item, boxes, cuts = drawn
    if math.prod(shape) > 100_000:
        shape, boxes = (), [([], [])]
    array = noise(*shape, item)
    found = 0
    for offsets, sizes in boxes:
        region = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
        data = memoryview(np.ascontiguousarray(array[region]).tobytes())
        runs = box_runs(shape, offsets, sizes, item)
        places = sorted({0, len(data), *(cut % len(data) for cut in cuts)})
        for begin, end in itertools.pairwise(places):
            found ^= fold_box(data[begin:end], begin, runs)

    assert found == by_the_book(array.tobytes())


@pytest.mark.parametrize("shape", [(3000, 1000), (40, 100_000), (1500, 1000, 2), (3, 1_000_001), (500_000, 3, 2)])
@pytest.mark.parametrize("item", [2, 4])
@pytest.mark.parametrize("dim", [0, 1])
def test_tensors_of_several_windows_are_cut_along_either_dimension(shape: tuple[int, ...], item: int, dim: int):
    array = noise(*shape, item).view(f"u{item}")[..., 0]
    third = -(-shape[dim] // 3)
    found = 0
    for begin in range(0, shape[dim], third):
        offsets, sizes = [0] * len(shape), list(shape)
        offsets[dim], sizes[dim] = begin, min(third, shape[dim] - begin)
        found ^= of_box(array, offsets, sizes)

    assert found == whole(array)


# -- what goes wrong in loading ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", name="matrix")
def _matrix() -> np.ndarray:
    """Two and a half MiB, as weights are: small numbers."""
    return np.random.default_rng(1).normal(0, 0.02, (640, 1024)).astype("<f4")


def swapped_rows(a: np.ndarray) -> np.ndarray:
    a[[3, 500]] = a[[500, 3]]
    return a


def rows_of_a_shard_at_the_wrong_offset(a: np.ndarray) -> np.ndarray:
    a[160:320] = a[161:321].copy()
    return a


def duplicated_half(a: np.ndarray) -> np.ndarray:
    a[320:] = a[:320]
    return a


def swapped_column_shards(a: np.ndarray) -> np.ndarray:
    return np.concatenate((a[:, 512:], a[:, :512]), axis=1)


def one_bit(a: np.ndarray) -> np.ndarray:
    a.view("<u4")[77, 77] ^= 1
    return a


def negative_zero(a: np.ndarray) -> np.ndarray:
    a[5, 5] = -0.0
    return a


SABOTAGE = {
    "swapped rows": swapped_rows,
    "neighbouring rows swapped": lambda a: a[[1, 0, *range(2, 640)]],
    "a shard at the wrong offset": rows_of_a_shard_at_the_wrong_offset,
    "rolled shards": lambda a: np.roll(a, 160, axis=0),
    "rolled by a row": lambda a: np.roll(a, 1, axis=0),
    "duplicated half": duplicated_half,
    "swapped column shards": swapped_column_shards,
    "rolled columns": lambda a: np.roll(a, 1, axis=1),
    "zeroed": np.zeros_like,
    "one bit": one_bit,
    "a negative zero": negative_zero,
    "transposed": lambda a: a.T.reshape(a.shape),
    "negated": lambda a: -a,
    "halved precision": lambda a: a.astype(np.float16).astype(np.float32),
    "scaled": lambda a: a * np.float32(1.0001),
}


@pytest.mark.parametrize("kind", SABOTAGE)
def test_each_way_to_get_a_tensor_wrong_is_seen(matrix: np.ndarray, kind: str):
    good = matrix.copy()
    good[5, 5] = 0.0
    bad = np.ascontiguousarray(SABOTAGE[kind](good.copy()))

    assert bad.tobytes() != good.tobytes()
    assert whole(bad) != whole(good)


@pytest.mark.parametrize("dtype", ["<f4", "<f2", "<f8", "u1"])
@pytest.mark.parametrize("shape", [(4,), (4096,), (4096, 512), (6, 300_000)])
def test_constant_tensors_differ(shape: tuple[int, ...], dtype: str):
    """Norms begin as ones, moments as zeros: words that are all alike must not cancel."""
    values = {whole(np.full(shape, value, dtype)) for value in (0, 1, 2, 3)}

    assert len(values) == 4


def test_permuted_elements_within_a_row_are_seen(matrix: np.ndarray):
    bad = matrix.copy()
    bad[9, [0, 2, 4, 6]] = bad[9, [6, 4, 2, 0]]

    assert whole(bad) != whole(matrix)


def test_what_is_not_seen_is_said():
    """Words that are 1,021 apart fall into one class: the documented blind spot."""
    words = np.frombuffer(noise(8 * 5000), dtype="<u8").copy()
    swapped = words.copy()
    swapped[[10, 10 + 1021]] = swapped[[10 + 1021, 10]]
    assert whole(swapped) == whole(words)

    swapped = words.copy()
    swapped[[10, 10 + 1020]] = swapped[[10 + 1020, 10]]
    assert whole(swapped) != whole(words)


def test_two_swapped_words_are_missed_once_in_thousands():
    words = np.frombuffer(noise(8 * 1021), dtype="<u8").copy()
    good, missed = whole(words), 0
    for first in range(0, 1000, 10):
        for second in range(1, 1000, 10):
            swapped = words.copy()
            swapped[[first, second]] = swapped[[second, first]]
            missed += whole(swapped) == good

    assert 0 < missed < 10
