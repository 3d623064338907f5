"""Fingerprints of tensors: 128 bits that do not depend on how a tensor is cut (FORMAT.md, section 4.3).

A fingerprint is linear: the XOR of those of any pieces that make up the tensor, cut along any dimensions or anywhere in the
stream of its bytes. So every writer fingerprints what passes by, and loaders with another layout compare.

Seen for certain: any change inside one word of 8 bytes, and any change of which no two words fall into one class. Not seen:
words that change places within a window of 4 MiB at a distance of a multiple of 1,021 words; with a chance of 2^-12, two
single words that change places; by chance of 2^-128, anything else. It is no checksum against an adversary.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dckpt.format.layout import FINGERPRINT_BYTES

__all__ = [
    "FINGERPRINT_BYTES",
    "BoxRuns",
    "box_runs",
    "decode_fingerprint",
    "encode_fingerprint",
    "fold_box",
    "fold_run",
    "joined",
    "rotations",
]

Bytes: TypeAlias = npt.NDArray[np.uint8]
Words: TypeAlias = npt.NDArray[np.uint64]

WORD_BYTES = 8
WINDOW_BYTES = 4 * 2**20
CLASSES = 1021  # a prime: rows, shards and pages are never a multiple of it apart
LINE_BYTES = CLASSES * WORD_BYTES

_MASK = 2**64 - 1
_WORD = np.dtype("<u8")
_ROW_BYTES_MAX = 128 * 1024  # longer rows are folded one by one: their own work hides the calls
_BATCH_BYTES = 2**20  # of rows laid out together: they stay in the processor's second-level cache
_WINDOW_SALT = 2**32


def encode_fingerprint(value: int) -> bytes:
    """The 16 bytes of a fingerprint: lane 0, then lane 1, little-endian."""
    return value.to_bytes(FINGERPRINT_BYTES, "little")


def decode_fingerprint(data: bytes | memoryview) -> int:
    """The inverse of `encode_fingerprint`."""
    return int.from_bytes(data, "little")


def _mix(number: int) -> int:
    """The finaliser of splitmix64: well-mixed 64 bits."""
    z = (number + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _rotations() -> tuple[Words, Words]:
    """u64[2, 2 x CLASSES]: how far each class is rotated left in each lane, twice in a row, and the rest to 64."""
    mixed = [_mix(number) for number in range(CLASSES)] * 2
    left = np.array([[z & 63 for z in mixed], [z >> 6 & 63 for z in mixed]], dtype=_WORD)
    return left, (np.uint64(64) - left) & np.uint64(63)


_LEFT, _RIGHT = _rotations()


@lru_cache(maxsize=4096)
def _window(number: int) -> tuple[int, int, int]:
    """By how much classes shift in this window of a tensor, and how far its lanes are rotated."""
    z = _mix(_WINDOW_SALT + number)
    return (z >> 12) % CLASSES, z & 63, z >> 6 & 63


def _rotl(word: int, by: int) -> int:
    return (word << by | word >> (64 - by)) & _MASK


def joined(lane0: int, lane1: int, number: int) -> int:
    """Both lanes of words of window `number`, rotated by class already, as a fingerprint."""
    _, by0, by1 = _window(number)
    return _rotl(lane0, by0) | _rotl(lane1, by1) << 64


def rotations(number: int, place: int, count: int) -> Words:
    """u64[2, count]: how far each of `count` words is rotated left in each lane, the first at byte `place` of a window.

    At most a line of words; the rotation of the window's lanes (`joined`) comes on top.
    """
    first = (place // WORD_BYTES + _window(number)[0]) % CLASSES
    return _LEFT[:, first : first + count]


def fold_run(data: memoryview | Bytes, begin: int) -> int:
    """The fingerprint of `data` as bytes `begin` and following of a tensor's row-major bytes, all others taken as zero."""
    size = len(data)
    if begin % WORD_BYTES + size <= WORD_BYTES:
        return _fold_word(int.from_bytes(data, "little") << 8 * (begin % WORD_BYTES), begin)
    array = data if isinstance(data, np.ndarray) else np.frombuffer(data, dtype=np.uint8)
    value = at = 0
    while at < size:
        number, place = divmod(begin + at, WINDOW_BYTES)
        stop = min(size, at + WINDOW_BYTES - place)
        value ^= _fold_in_window(array[at:stop], number, place)
        at = stop
    return value


def _fold_word(word: int, begin: int) -> int:
    """`fold_run` of at most one word, without arrays: counters and scalars are as many as matrices."""
    number, place = divmod(begin, WINDOW_BYTES)
    z = _mix((place // WORD_BYTES + _window(number)[0]) % CLASSES)
    return joined(_rotl(word, z & 63), _rotl(word, z >> 6 & 63), number)


def _fold_in_window(data: Bytes, number: int, place: int) -> int:
    """`fold_run` inside one window; `place`: the byte in it at which the contiguous `data` begins."""
    words = _sum_lines(data, place % WORD_BYTES)
    first = (place // WORD_BYTES + _window(number)[0]) % CLASSES
    columns = slice(first, first + len(words))
    rotated = words << _LEFT[:, columns]
    rotated |= words >> _RIGHT[:, columns]
    lane0, lane1 = np.bitwise_xor.reduce(rotated, axis=1).tolist()
    return joined(lane0, lane1, number)


def _sum_lines(data: Bytes, phase: int) -> Words:
    """The words of `data`, which begins `phase` bytes into a word; those a multiple of CLASSES apart XORed into one."""
    size = len(data)
    lines, rest = divmod(size, LINE_BYTES)
    if lines == 0:
        words = np.zeros(-(-(phase + size) // WORD_BYTES), dtype=_WORD)
        words.view(np.uint8)[phase : phase + size] = data
        return words
    total = np.empty(LINE_BYTES, dtype=np.uint8)
    np.bitwise_xor.reduce(data[: size - rest].reshape(lines, LINE_BYTES), axis=0, out=total)
    if rest:
        total[:rest] ^= data[size - rest :]
    # Bytes, not words, are summed: so data may begin anywhere in memory and anywhere in a word.
    return (np.roll(total, phase) if phase else total).view(_WORD)


# -- boxes -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BoxRuns:
    """Where the row-major bytes of a box lie among those of its tensor: runs of `run` bytes, the first at byte `base`.

    steps: (count, bytes from one to the next) of the repetitions of the run, the innermost last.
    """

    base: int
    run: int
    steps: tuple[tuple[int, int], ...]


def box_runs(shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int], item_bytes: int) -> BoxRuns:
    """How the box lies in a tensor of `shape`; all three equally long, the box not empty and inside."""
    strides = [item_bytes * math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    base = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
    run = item_bytes
    steps: list[tuple[int, int]] = []
    for size, stride in reversed(list(zip(sizes, strides, strict=True))):
        if size == 1:
            continue
        if not steps and stride == run:
            run *= size
        elif steps and stride == steps[-1][0] * steps[-1][1]:
            steps[-1] = (steps[-1][0] * size, steps[-1][1])
        else:
            steps.append((size, stride))
    return BoxRuns(base, run, tuple(reversed(steps)))


def fold_box(data: memoryview | Bytes, begin: int, runs: BoxRuns) -> int:
    """The fingerprint of bytes of a box. `data` are those from byte `begin` of the box's row-major bytes on."""
    if not runs.steps:
        return fold_run(data, runs.base + begin)
    array = data if isinstance(data, np.ndarray) else np.frombuffer(data, dtype=np.uint8)
    run, size = runs.run, len(array)
    value = at = 0
    row, inside = divmod(begin, run)
    if inside:
        at = min(run - inside, size)
        value ^= fold_run(array[:at], _place(runs, row) + inside)
        row += 1
    whole = (size - at) // run
    for first, count in _stretches(runs, row, whole):
        rows = array[at : at + count * run].reshape(count, run)
        value ^= _fold_rows(rows, _place(runs, first), runs.steps[-1][1])
        at += count * run
    if at < size:
        value ^= fold_run(array[at:], _place(runs, row + whole))
    return value


def _place(runs: BoxRuns, row: int) -> int:
    """The tensor's byte at which run number `row` begins."""
    place = runs.base
    for count, step in reversed(runs.steps):
        row, inside = divmod(row, count)
        place += inside * step
    return place


def _stretches(runs: BoxRuns, row: int, count: int) -> Iterator[tuple[int, int]]:
    """(first, number) of runs that follow each other at the innermost step."""
    inner = runs.steps[-1][0]
    while count:
        number = min(count, inner - row % inner)
        yield row, number
        row, count = row + number, count - number


class _Scratch(threading.local):
    """Memory of each thread in which short rows are laid out; kept, because first touch is dear."""

    def __init__(self) -> None:
        self.memory: Any = np.zeros(_BATCH_BYTES + _ROW_BYTES_MAX + 2 * LINE_BYTES, dtype=np.uint8)


_scratch = _Scratch()


def _fold_rows(rows: Bytes, begin: int, step: int) -> int:
    """Rows of equal length, the first at the tensor's byte `begin`, `step` bytes from one to the next."""
    count, run = rows.shape
    value = at = 0
    # Rows closer together than they are in the tensor, and in the same classes.
    pitch = run + (step - run) % LINE_BYTES
    batch = max(1, _BATCH_BYTES // pitch)
    while at < count:
        number, place = divmod(begin + at * step, WINDOW_BYTES)
        fitting = min((WINDOW_BYTES - place - run) // step + 1, count - at, batch)
        if fitting < 2 or run > _ROW_BYTES_MAX:
            value ^= fold_run(rows[at], begin + at * step)
            at += 1
            continue
        phase = place % WORD_BYTES
        laid = _scratch.memory[: phase + fitting * pitch]
        laid[:phase] = 0
        table = laid[phase:].reshape(fitting, pitch)
        table[:, :run] = rows[at : at + fitting]
        table[:, run:] = 0
        value ^= _fold_in_window(laid, number, place - phase)
        at += fitting
    return value
