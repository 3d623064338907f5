"""Bytes that lie in several pieces of memory have the checksums of the whole, and land where they should."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dckpt.blocks.scatter import Landing, Scatter, checksums_of, overwrite
from dckpt.format.checksum import BLOCK_BYTES, block_checksums

DATA = np.random.default_rng(0).integers(0, 256, 3 * BLOCK_BYTES + 777, dtype=np.uint8).tobytes()
PLACES = st.one_of(
    st.integers(0, len(DATA)), st.sampled_from([BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 2 * BLOCK_BYTES])
)


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(PLACES, max_size=6), size=st.sampled_from([1, BLOCK_BYTES, 2 * BLOCK_BYTES, len(DATA)]))
def test_checksums_do_not_depend_on_where_the_memory_is_cut(cuts: list[int], size: int):
    edges = sorted({0, size, *(cut for cut in cuts if cut < size)})
    pieces = [memoryview(DATA)[begin:end] for begin, end in itertools.pairwise(edges)]

    assert checksums_of(pieces).tolist() == block_checksums(memoryview(DATA)[:size]).tolist()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_byte_goes_to_its_landing_or_to_its_place_in_the_memory(data: st.DataObject):
    begin = data.draw(st.sampled_from([0, 100]))
    edges = sorted(data.draw(st.sets(st.integers(begin, begin + 200), min_size=0, max_size=8)))
    taken = list(zip(edges[::2], edges[1::2], strict=False))
    landings = [Landing(first, memoryview(bytearray(stop - first))) for first, stop in taken]
    memory = memoryview(bytearray(200))
    scatter = Scatter(begin, memory, landings)
    cuts = sorted({begin, begin + 200, *data.draw(st.lists(st.integers(begin, begin + 200), max_size=3))})

    for first, stop in itertools.pairwise(cuts):
        place = first
        for target in scatter.targets(first, stop):
            target[:] = DATA[place : place + len(target)]
            place += len(target)
        assert place == stop

    for landing in landings:
        assert landing.memory == DATA[landing.begin : landing.end]
    outside = [place for place in range(begin, begin + 200) if not any(a <= place < b for a, b in taken)]
    assert [memory[place - begin] for place in outside] == [DATA[place] for place in outside]


def test_deliver_copies_what_lies_in_the_memory_to_the_landings_and_nowhere_else():
    landings = [Landing(10, memoryview(bytearray(20))), Landing(40, memoryview(bytearray(20)))]
    memory = memoryview(bytearray(DATA[:64]))

    Scatter(0, memory, landings).deliver(20, 50)

    assert bytes(landings[0].memory) == bytes(10) + DATA[20:30]
    assert bytes(landings[1].memory) == DATA[40:50] + bytes(10)
    assert memory == DATA[:64]


def test_overwrite_puts_bytes_over_the_edges_of_targets():
    targets = [memoryview(bytearray(size)) for size in (3, 4, 5)]

    overwrite(targets, 2, memoryview(b"abcdefg"))

    assert b"".join(targets) == b"\0\0abcdefg\0\0\0"
