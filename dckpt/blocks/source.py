"""Where the bytes of a file come from on their way out: a complete image in memory, or pieces made when they are asked for."""

from __future__ import annotations

import contextlib
import mmap
import queue
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from dckpt.blocks.buffer import Pin
from dckpt.format.shard_file import ShardFilePlan

IN_PLACE_VIEWS_MAX = 64  # more calls of the kernel for a piece cost more than its copy

PIECE_BYTES = 16 * 2**20
"""The largest piece that is asked for: one write call, which the device takes faster than two of half the size."""


class PieceMemory:
    """Memory for one piece at a time, page-aligned so that direct writes take it as it is, and kept: first touch is dear.

    The mapping is shared, so that a fork of the trainer while the device reads from it copies nothing on write.
    """

    def __init__(self, pin: Pin = lambda _: None) -> None:
        self._pin = pin
        self._unpin: Callable[[], None] | None = None
        self._memory: mmap.mmap | None = None

    def take(self, size: int) -> memoryview:
        """Writable bytes; what an earlier piece held is overwritten."""
        assert size <= PIECE_BYTES, size
        if self._memory is None:
            self._memory = mmap.mmap(-1, PIECE_BYTES)
            self._unpin = self._pin(self._memory)
        return memoryview(self._memory)[:size]

    def release(self) -> None:
        """Gives the memory back, once the last view of it is gone."""
        unpin, self._unpin, self._memory = self._unpin, None, None
        if unpin is not None:
            unpin()


class PieceRing:
    """As many piece memories as there are threads that write: all the host memory that a save without an image takes."""

    def __init__(self, count: int, pin: Pin = lambda _: None) -> None:
        self._free: queue.SimpleQueue[PieceMemory] = queue.SimpleQueue()
        for _ in range(count):
            self._free.put(PieceMemory(pin))

    @contextlib.contextmanager
    def borrow(self) -> Iterator[PieceMemory]:
        """One of the memories; there is one for each thread, so nobody waits for long."""
        memory = self._free.get(timeout=60)
        try:
            yield memory
        finally:
            self._free.put(memory)

    def release(self) -> None:
        """Gives the memory back that no thread holds; it is taken anew when it is needed again."""
        for _ in range(self._free.qsize()):
            with contextlib.suppress(queue.Empty):
                memory = self._free.get_nowait()
                memory.release()
                self._free.put(memory)


class FileSource(Protocol):
    """The bytes of one file, in pieces that several threads may ask for at once and in any order."""

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        ...

    @property
    def plan(self) -> ShardFilePlan | None:
        """The shard file's plan; None if the bytes are something else."""
        ...

    def piece(self, begin: int, end: int, memory: PieceMemory) -> memoryview:
        """Bytes `begin` to `end`, at most `PIECE_BYTES`; they may lie in `memory`, and hold until its next use.

        `begin` is a multiple of 4096. The same range gives the same bytes each time.
        """
        ...

    def in_place(self, begin: int, end: int) -> Sequence[memoryview] | None:
        """The same bytes where they lie already, in order; None if some would have to be copied or they lie in many places."""
        ...


def parts_of_piece(plan: ShardFilePlan, begin: int, piece: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """Fills `piece`, which begins at byte `begin` of a shard file, with what of the header lies in it; yields the rest.

    Each part is (number of the tensor in the plan, byte of the tensor's data at which the part begins, the part's place in
    the piece). Pieces begin at multiples of 4096 and every tensor at a multiple of its item size (FORMAT.md, section 5), so
    no element is ever cut in two.
    """
    if begin < len(plan.header):
        part = plan.header[begin : begin + len(piece)]
        piece[: len(part)] = part
    for number, offset, first, last in ranges_of_piece(plan, begin, begin + len(piece)):
        yield number, offset, piece[first:last]


def ranges_of_piece(plan: ShardFilePlan, begin: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """As `parts_of_piece`, the place in the piece as (first, last); ascending, and without gaps after the header."""
    number = max(0, bisect_right(plan.begins, begin) - 1)
    while number < len(plan.begins) and plan.begins[number] < end:
        at = plan.begins[number]
        first, last = max(begin, at), min(end, at + plan.tensors[number].nbytes)
        if first < last:
            yield number, first - at, first - begin, last - begin
        number += 1


class ImageSource:
    """A `FileSource` over the complete image of the file."""

    def __init__(self, image: memoryview, plan: ShardFilePlan | None = None) -> None:
        self._image = image
        self.plan = plan

    @property
    def size(self) -> int:
        """Bytes of the image."""
        return len(self._image)

    def piece(self, begin: int, end: int, memory: PieceMemory) -> memoryview:
        """A view of the image; nothing is copied."""
        del memory
        return self._image[begin:end]

    def in_place(self, begin: int, end: int) -> Sequence[memoryview]:
        """That view."""
        return [self._image[begin:end]]
