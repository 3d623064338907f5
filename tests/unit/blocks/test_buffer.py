"""The staging memory: aligned, kept, and warmed behind the trainer's back without touching what it holds."""

from __future__ import annotations

import ctypes
import mmap
import time

from dckpt.blocks.buffer import ImageBuffer


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def test_views_are_page_aligned_and_do_not_overlap():
    views = ImageBuffer().take([1, 5000, 4096])

    for number, view in enumerate(views):
        view[:] = bytes([number + 1]) * len(view)
    assert [len(view) for view in views] == [1, 5000, 4096]
    assert all(_address(view) % mmap.PAGESIZE == 0 for view in views)
    assert [set(view) for view in views] == [{1}, {2}, {3}]


def test_memory_is_kept_while_it_is_large_enough():
    buffer = ImageBuffer()
    (first,) = buffer.take([100_000])
    (second,) = buffer.take([50_000])
    (third,) = buffer.take([200_000])

    assert _address(first) == _address(second)
    assert _address(third) != _address(first)
    assert buffer.nbytes >= 200_000


def test_warmed_memory_is_the_memory_that_is_taken():
    buffer = ImageBuffer()
    buffer.warm(8 * 2**20)
    before = buffer.nbytes
    (view,) = buffer.take([8 * 2**20])

    assert buffer.nbytes == before == len(view)


def test_warming_ends_when_the_memory_is_taken_and_never_writes_afterwards():
    buffer = ImageBuffer()
    buffer.warm(512 * 2**20)
    (view,) = buffer.take([512 * 2**20])
    view[: 2**20] = b"\xff" * 2**20
    view[-(2**20) :] = b"\xff" * 2**20
    time.sleep(0.2)

    assert bytes(view[: 2**20]) == b"\xff" * 2**20
    assert bytes(view[-(2**20) :]) == b"\xff" * 2**20
