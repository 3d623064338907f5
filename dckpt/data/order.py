"""The order of an epoch as a function: position -> index, in constant time and memory however large the data set is.

Order version 1. The domain is the numbers of b bits, b the smallest with 2**b >= size. A number is cut into a high part of
b // 2 bits and a low part; 10 times (32 times for b < 8), in turn, one part is XORed with the lowest bits of mix(other part
+ key of the round), which can be undone, so that no two numbers meet. A result outside of [0, size) goes through the same
again until it is inside. The keys are SHAKE-256 of the UTF-8 text

    dckpt-order-v1|<seed>|<epoch>|<size>

read as little-endian 64-bit numbers. mix is splitmix64's: x ^= x >> 30, x *= C1, x ^= x >> 27, x *= C2, x ^= x >> 31, modulo
2**64. Without shuffling the order is the identity.
"""

from __future__ import annotations

import hashlib
from typing import TypeAlias

import numpy as np

ORDER_VERSION = 1
"""Pins the algorithm. Another one gets another number, and a position is never carried over between two of them."""
ROUNDS = 10
ROUNDS_SMALL = 32
"""With fewer than SMALL_BITS bits the parts are too small for ten rounds to make all permutations equally likely."""
SMALL_BITS = 8
SIZE_MAX = 2**62

Indices: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
Words: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.uint64]]

_C1 = np.uint64(0xBF58476D1CE4E5B9)
_C2 = np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31 = np.uint64(27), np.uint64(30), np.uint64(31)


def mix(words: Words) -> Words:
    """64-bit numbers, scrambled one to one; a new array of the same shape."""
    mixed = words ^ (words >> _S30)
    mixed *= _C1
    mixed ^= mixed >> _S27
    mixed *= _C2
    mixed ^= mixed >> _S31
    return mixed


def derive_words(text: str, count: int) -> Words:
    """`count` independent 64-bit numbers from a text; shape (count,)."""
    return np.frombuffer(hashlib.shake_256(text.encode()).digest(8 * count), "<u8").astype(np.uint64)


class EpochOrder:
    """One epoch's order of `size` samples: each index once. Equal arguments give equal orders, everywhere and always."""

    def __init__(self, seed: int, epoch: int, size: int, *, shuffle: bool = True) -> None:
        assert 0 < size <= SIZE_MAX, size
        self._size = size
        self._shuffle = shuffle
        bits = (size - 1).bit_length()
        rounds = ROUNDS_SMALL if bits < SMALL_BITS else ROUNDS
        self._keys = derive_words(f"dckpt-order-v{ORDER_VERSION}|{seed}|{epoch}|{size}", rounds)
        self._low_bits = np.uint64(bits - bits // 2)
        self._low_mask = np.uint64((1 << (bits - bits // 2)) - 1)
        self._high_mask = np.uint64((1 << (bits // 2)) - 1)

    def indices(self, positions: Indices) -> Indices:
        """The indices at these positions of the epoch, each in [0, size); int64 of the same shape."""
        if not self._shuffle or self._size == 1:
            return positions.astype(np.int64)
        found = self._permute(positions.astype(np.uint64).reshape(-1))
        while (outside := np.flatnonzero(found >= self._size)).size:
            found[outside] = self._permute(found[outside])
        return found.astype(np.int64).reshape(positions.shape)

    def _permute(self, numbers: Words) -> Words:
        high, low = numbers >> self._low_bits, numbers & self._low_mask
        for number, key in enumerate(self._keys):
            if number % 2:
                low ^= mix(high + key) & self._low_mask
            else:
                high ^= mix(low + key) & self._high_mask
        return (high << self._low_bits) | low
