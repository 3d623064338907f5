"""Fingerprints of many chunks that lie one behind the other in a file: small ones of equal size together."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from dckpt.format.fingerprint import WINDOW_BYTES, WORD_BYTES, BoxRuns, fold_box, joined, rotations

SMALL_BYTES = 4096  # of a chunk: above it, its own work hides the calls
TOGETHER_MIN = 4  # fewer of one kind are folded one by one

_ALONE = -1

Found: TypeAlias = list[tuple[int, int]]
Places: TypeAlias = npt.NDArray[np.int64]


class ChunkTable:
    """Chunks by number: `begins[i]` is where number i lies in the file, ascending, `runs[i]` where it lies in its tensor."""

    def __init__(self, begins: Sequence[int], sizes: Sequence[int], runs: Sequence[BoxRuns]) -> None:
        self._begins = list(begins)
        self._ends = [begin + size for begin, size in zip(begins, sizes, strict=True)]
        self._runs = runs
        self._kinds: list[
            tuple[int, int, int]
        ] = []  # bytes of a unit, bytes of the chunk, its first byte in the tensor
        numbers: dict[tuple[int, int, int], int] = {}
        kind_of = [self._kind(number, numbers) for number in range(len(runs))]
        self._kinds = list(numbers)
        self._kind_of = np.array(kind_of, dtype=np.int64)
        self._places = np.array(self._begins, dtype=np.int64)

    def _kind(self, number: int, numbers: dict[tuple[int, int, int], int]) -> int:
        begin, runs = self._begins[number], self._runs[number]
        size = self._ends[number] - begin
        if runs.steps or size > SMALL_BYTES or runs.base % WINDOW_BYTES + size > WINDOW_BYTES:
            return _ALONE
        alignment = begin | size | runs.base | WORD_BYTES
        return numbers.setdefault((alignment & -alignment, size, runs.base), len(numbers))

    def fold(self, begin: int, data: memoryview) -> Found:
        """(number, fingerprint) of what lies in `data`, the bytes of the file from `begin` on; a number may come twice."""
        end = begin + len(data)
        # The first and the last chunk may lie in it partly.
        first = bisect_right(self._ends, begin)
        stop = bisect_left(self._begins, end)
        whole_first = first + (first < stop and self._begins[first] < begin)
        whole_stop = max(whole_first, stop - (first < stop and self._ends[stop - 1] > end))
        found = self._together(begin, data, whole_first, whole_stop) if whole_stop - whole_first >= TOGETHER_MIN else []
        done = {number for number, _ in found}
        for number in range(first, stop):
            if number not in done:
                low, high = max(begin, self._begins[number]), min(end, self._ends[number])
                part = data[low - begin : high - begin]
                found.append((number, fold_box(part, low - self._begins[number], self._runs[number])))
        return found

    def _together(self, begin: int, data: memoryview, first: int, stop: int) -> Found:
        """Of the kinds of which there are enough among chunks `first` to `stop`, all wholly inside."""
        found: Found = []
        if begin % WORD_BYTES:  # units would not lie at multiples of their size
            return found
        kinds = self._kind_of[first:stop]
        for kind, count in zip(*np.unique(kinds, return_counts=True), strict=True):
            if kind == _ALONE or count < TOGETHER_MIN:
                continue
            numbers = np.flatnonzero(kinds == kind) + first
            found += self._fold_kind(self._kinds[kind], data, numbers, self._places[numbers] - begin)
        return found

    def _fold_kind(self, kind: tuple[int, int, int], data: memoryview, numbers: Places, places: Places) -> Found:
        """Chunks `numbers` of one kind, which begin at these bytes of `data`: a row each."""
        unit, size, base = kind
        count = size // unit
        units = np.frombuffer(data, dtype=f"<u{unit}", count=len(data) // unit)
        rows = units[places[:, None] // unit + np.arange(count)].astype(np.uint64)
        number, place = divmod(base, WINDOW_BYTES)
        words = (place % WORD_BYTES + np.arange(count) * unit) // WORD_BYTES
        inside = ((place + np.arange(count) * unit) % WORD_BYTES * 8).astype(np.uint64)
        left = (rotations(number, place, int(words[-1]) + 1)[:, words] + inside) & np.uint64(63)
        lanes = []
        for by in left:
            turned = rows << by
            turned |= rows >> ((np.uint64(64) - by) & np.uint64(63))
            lanes.append(np.bitwise_xor.reduce(turned, axis=1).tolist())
        return [(n, joined(one, two, number)) for n, one, two in zip(numbers.tolist(), *lanes, strict=True)]
