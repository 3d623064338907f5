"""Consecutive bytes of a file that lie in several pieces of memory: where they go, their checksums, copies of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from dckpt.format.checksum import BLOCK_BYTES, Checksums, block_checksums


@dataclass(frozen=True, slots=True)
class Landing:
    """Bytes of a file, from `begin` on, that are read straight into `memory`."""

    begin: int
    memory: memoryview

    @property
    def end(self) -> int:
        """One past its last byte in the file."""
        return self.begin + len(self.memory)


class Scatter:
    """The memory for a range of a file: landings for parts of it, and for the rest `memory`, which mirrors the range.

    landings: ascending, disjoint, inside the range; it begins at `begin` and is at most as long as `memory`.
    """

    def __init__(self, begin: int, memory: memoryview, landings: Sequence[Landing]) -> None:
        self.begin = begin
        self._memory = memory
        self._landings = landings
        self._begins = [landing.begin for landing in landings]

    def mirror(self, begin: int, end: int) -> memoryview:
        """The part of `memory` that stands for this range."""
        return self._memory[begin - self.begin : end - self.begin]

    def targets(self, begin: int, end: int) -> list[memoryview]:
        """Where the bytes of this range go, in the order of the file."""
        return [
            self.mirror(first, stop)
            if landing is None
            else landing.memory[first - landing.begin : stop - landing.begin]
            for first, stop, landing in self._parts(begin, end)
        ]

    def deliver(self, begin: int, end: int) -> None:
        """Copies this range from `memory` to its landings."""
        for first, stop, landing in self._parts(begin, end):
            if landing is not None:
                target = landing.memory[first - landing.begin : stop - landing.begin]
                copy_bytes(target, self.mirror(first, stop))

    def _parts(self, begin: int, end: int) -> Iterator[tuple[int, int, Landing | None]]:
        """The range cut at the edges of landings."""
        place = begin
        for number in range(max(0, bisect_right(self._begins, begin) - 1), len(self._landings)):
            landing = self._landings[number]
            if landing.begin >= end:
                break
            if landing.end <= place:
                continue
            if landing.begin > place:
                yield place, landing.begin, None
                place = landing.begin
            stop = min(landing.end, end)
            yield place, stop, landing
            place = stop
        if place < end:
            yield place, end, None


def copy_bytes(target: memoryview, source: memoryview) -> None:
    """Copies all of `source` to `target`, of the same length. Large copies let other threads run."""
    np.frombuffer(target, dtype=np.uint8)[:] = np.frombuffer(source, dtype=np.uint8)


def overwrite(targets: Sequence[memoryview], skip: int, data: memoryview) -> None:
    """Puts `data` over consecutive bytes that lie in `targets`, from `skip` bytes behind their beginning on."""
    for target in targets:
        count = min(max(0, len(target) - skip), len(data))
        target[skip : skip + count] = data[:count]
        data, skip = data[count:], max(0, skip - len(target))


def checksums_of(targets: Sequence[memoryview]) -> Checksums:
    """The block checksums of consecutive bytes that begin at a block boundary and lie in these pieces of memory."""
    if len(targets) == 1:
        return block_checksums(targets[0])
    found: list[Checksums] = []
    stream, begun = xxhash.xxh3_64(), 0
    for target in targets:
        view = target
        if begun:
            view = target[BLOCK_BYTES - begun :]
            head = target[: BLOCK_BYTES - begun]
            stream.update(head)
            begun = (begun + len(head)) % BLOCK_BYTES
            if begun:
                continue
            found.append(np.array([stream.intdigest()], dtype=np.uint64))
            stream.reset()
        whole = len(view) // BLOCK_BYTES * BLOCK_BYTES
        if whole:
            found.append(block_checksums(view[:whole]))
        stream.update(view[whole:])
        begun = len(view) - whole
    if begun:
        found.append(np.array([stream.intdigest()], dtype=np.uint64))
    return np.concatenate(found)
