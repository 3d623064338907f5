"""The order of an epoch: a permutation as a function of a position, pinned by version 1."""

from __future__ import annotations

import hashlib
import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from dckpt.data.order import EpochOrder, derive_words, mix

# Version 1's first indices. A change here makes every saved position meaningless: it needs another ORDER_VERSION.
GOLDEN = {
    (0, 0, 5): [2, 4, 3, 1, 0],
    (0, 0, 1003): [963, 588, 610, 548, 942, 751, 542, 597],
    (1, 0, 1003): [927, 401, 967, 365, 51, 931, 341, 677],
    (0, 1, 1003): [162, 483, 142, 380, 837, 132, 394, 457],
    (2**63 - 1, 12, 10**9): [353198868, 474098689, 388891562, 146109916, 876077804, 978420692, 753956593, 924037179],
    (0, 0, 2**62): [2451555951734283048, 2560318511887090365, 3906997644413936865, 3623610989507779883],
}


def whole(seed: int, epoch: int, size: int) -> np.ndarray:
    return EpochOrder(seed, epoch, size).indices(np.arange(size))


@pytest.mark.parametrize("key", GOLDEN)
def test_the_first_indices_of_version_1_are_these(key):
    positions = np.arange(min(key[2], len(GOLDEN[key])))

    assert EpochOrder(*key).indices(positions).tolist() == GOLDEN[key]


def written_out(seed: int, epoch: int, size: int, position: int) -> int:
    """The definition in the module's docstring, in whole numbers."""
    bits = (size - 1).bit_length()
    rounds = 32 if bits < 8 else 10
    text = f"dckpt-order-v1|{seed}|{epoch}|{size}"
    digest = hashlib.shake_256(text.encode()).digest(8 * rounds)
    low_bits = bits - bits // 2
    number = position
    while True:
        high, low = number >> low_bits, number % 2**low_bits
        for turn in range(rounds):
            key = int.from_bytes(digest[8 * turn : 8 * turn + 8], "little")
            x = ((low if turn % 2 == 0 else high) + key) % 2**64
            x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
            x ^= x >> 31
            if turn % 2 == 0:
                high ^= x % 2 ** (bits // 2)
            else:
                low ^= x % 2**low_bits
        number = high << low_bits | low
        if number < size:
            return number


@pytest.mark.parametrize("size", [2, 5, 100, 129, 1003, 10**9, 2**62 - 1])
def test_the_order_is_what_its_definition_says(size):
    positions = [position for position in (0, 1, 2, 77, 1000, size // 2, size - 1) if position < size]
    found = EpochOrder(11, 3, size).indices(np.array(positions))

    assert found.tolist() == [written_out(11, 3, size, position) for position in positions]


def test_the_building_blocks_are_the_published_ones():
    """splitmix64's output function, at the first state of seed 0; SHAKE-256."""
    assert mix(np.array([0x9E3779B97F4A7C15], np.uint64)).tolist() == [0xE220A8397B1DCDAF]
    assert derive_words("", 1).tolist() == [int.from_bytes(bytes.fromhex("46b9dd2b0ba88d13"), "little")]


@pytest.mark.parametrize("size", [*range(1, 70), 127, 128, 129, 255, 256, 257, 1003, 65_537])
def test_every_index_comes_once(size):
    for seed in range(3):
        assert sorted(whole(seed, seed, size).tolist()) == list(range(size))


def test_an_index_does_not_depend_on_what_else_is_asked_for():
    order, positions = EpochOrder(3, 1, 10_007), np.arange(10_007).reshape(-1, 1)
    together = order.indices(positions)

    assert together.shape == positions.shape and together.dtype == np.int64
    for position in (0, 1, 5000, 10_006):
        assert order.indices(np.array([position])).tolist() == [together[position, 0]]


def test_without_shuffling_the_order_is_the_data_sets_own():
    assert EpochOrder(1, 2, 9, shuffle=False).indices(np.arange(9)).tolist() == list(range(9))


def test_seed_epoch_and_size_each_make_another_order():
    """seed + epoch would make the second epoch of one seed the first one of the next."""
    orders = [whole(seed, epoch, 1000).tolist() for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == 9
    assert sum(a == b for a, b in zip(whole(0, 0, 1000), whole(0, 0, 1001)[:1000], strict=True)) < 20


@pytest.mark.parametrize(("size", "seeds"), [(3, 1000), (4, 1500), (5, 3000)])
def test_all_permutations_of_a_few_are_equally_likely(size, seeds):
    counts = Counter(tuple(whole(seed, 0, size).tolist()) for seed in range(seeds))
    kinds = math.factorial(size)

    assert len(counts) == kinds
    assert _surprise(np.array(list(counts.values())), kinds - 1) < 4


@pytest.mark.parametrize("size", [7, 64, 129, 1000])
def test_every_index_is_as_likely_at_every_position(size):
    seeds = 1000
    counts = np.zeros((size, size))
    for seed in range(seeds):
        counts[np.arange(size), whole(seed, 5, size)] += 1

    assert _surprise(counts.ravel(), (size - 1) ** 2) < 4


def test_neighbours_in_the_order_are_no_neighbours_in_the_data():
    order = whole(0, 0, 200_000) * 16 // 200_000
    counts = np.bincount(order[:-1] * 16 + order[1:], minlength=256)

    assert _surprise(counts, 255) < 4


def _surprise(counts: np.ndarray, freedom: int) -> float:
    """How many standard deviations chi-squared of equal frequencies lies from what chance gives; fixed seeds, fixed value."""
    expected = counts.sum() / counts.size
    return abs(((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


def test_a_billion_samples_cost_no_memory():
    """Starting, and asking in the middle, allocate a few kilobytes: nothing grows with the data set."""
    positions = np.arange(4096) + 700_000_000
    EpochOrder(0, 0, 1000).indices(positions[:1] * 0)
    tracemalloc.start()
    try:
        found = EpochOrder(0, 0, 10**9).indices(positions)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert len(set(found.tolist())) == 4096 and found.min() >= 0 and found.max() < 10**9
    assert peak < 100 * positions.nbytes
