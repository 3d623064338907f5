"""Training and validation items by seed: the same at every start, and still the same when data is appended."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from dckpt.data.order import Indices, Words, derive_words, mix
from dckpt.errors import ConfigError

SPLIT_VERSION = 1
"""Pins the rule. Version 1: an item's number is mix(mix(index + key 0) + key 1) as in `dckpt.data.order`, the keys from
`dckpt-split-v1|<seed>`; with keys of its own, the first 8 bytes (little-endian) of BLAKE2b-64 of that text, a NUL and the key.
"""

Key: TypeAlias = str | bytes | int


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Two disjoint, ascending int64 arrays that together hold each of 0 .. size - 1 once."""

    train: Indices
    validation: Indices
    seed: int
    asked: float | int
    """What was asked for: a fraction or a count."""

    @property
    def size(self) -> int:
        """How many items were split."""
        return len(self.train) + len(self.validation)

    @property
    def fingerprint(self) -> str:
        """32 hex digits: equal for equal splits, different if a single item changed sides."""
        return _digest(f"{self.size}".encode(), self.validation.astype("<i8").tobytes())

    def facts(self) -> dict[str, Any]:
        """What a resume compares: `TrainState(facts={"split": split.facts()})`."""
        return {
            "version": SPLIT_VERSION,
            "seed": self.seed,
            "asked": self.asked,
            "size": self.size,
            "train": len(self.train),
            "validation": len(self.validation),
            "train_fingerprint": _digest(self.train.astype("<i8").tobytes()),
            "validation_fingerprint": _digest(self.validation.astype("<i8").tobytes()),
            "fingerprint": self.fingerprint,
        }


def split_indices(
    items: int | Sequence[Key], *, validation: float | int = 0.1, seed: int, among: int | None = None
) -> Split:
    """Splits items into training and validation; a function of the arguments alone, on every rank and at every start.

    items: how many there are; or one key each (a file name, an id: str, bytes or int), if their order may change. Items with
        the same key are on the same side.
    validation: a fraction below 1, or a count. With a fraction each item is judged by itself, by (seed, index) or (seed, key):
        the sizes are approximate (0.1 of 1,000 takes 100, give or take 10 or so), and items that are appended
        later change nothing for those before. A count is met exactly, by the items with the smallest numbers; appended items
        would push others out, so keep `among` then.
    among: choose only among the first so many, the size when the split was first made; what came later is for training.

    `ConfigError` for a wrong argument, and if one side would be empty.
    """
    size = items if isinstance(items, int) else len(items)
    for name, value, least in (("items", size, 2), ("seed", seed, 0), ("among", size if among is None else among, 1)):
        if type(value) is not int or value < least:
            raise ConfigError(f"split_indices({name}={value!r:.80}): expected a whole number of at least {least}")
    candidates = size if among is None else min(among, size)
    numbers = _index_numbers(seed, candidates) if isinstance(items, int) else _key_numbers(seed, items[:candidates])
    chosen = np.zeros(size, bool)
    if isinstance(validation, float) and 0 < validation < 1:
        chosen[:candidates] = numbers < np.uint64(int(validation * 2**64))
    elif type(validation) is int and validation > 0:
        if not isinstance(items, int) and len(np.unique(numbers)) < candidates:
            raise ConfigError(
                f"split_indices(validation={validation}): a count could part items that have the same key. Pass a fraction"
            )
        chosen[np.argsort(numbers, kind="stable")[:validation]] = True
    else:
        raise ConfigError(
            f"split_indices(validation={validation!r:.80}): expected a fraction between 0 and 1, or a count of at least 1"
        )
    taken = int(chosen.sum())
    if not 0 < taken < size:
        raise ConfigError(
            f"split_indices(validation={validation!r}): expected items on both sides, found {taken} of {size} for validation. "
            "Pass a count, or another fraction"
        )
    return Split(np.flatnonzero(~chosen), np.flatnonzero(chosen), seed, validation)


def _index_numbers(seed: int, size: int) -> Words:
    first, second = derive_words(f"dckpt-split-v{SPLIT_VERSION}|{seed}", 2)
    return mix(mix(np.arange(size, dtype=np.uint64) + first) + second)


def _key_numbers(seed: int, keys: Sequence[Any]) -> Words:
    start = hashlib.blake2b(f"dckpt-split-v{SPLIT_VERSION}|{seed}\0".encode(), digest_size=8)
    numbers = bytearray()
    for position, key in enumerate(keys):
        if not isinstance(key, (str, bytes, int)) or isinstance(key, bool):
            raise ConfigError(
                f"split_indices: key {position}: expected str, bytes or int, found {type(key).__name__}. Pass names or ids"
            )
        hasher = start.copy()
        hasher.update(key if isinstance(key, bytes) else str(key).encode())
        numbers += hasher.digest()
    return np.frombuffer(bytes(numbers), "<u8").astype(np.uint64)


def _digest(*parts: bytes) -> str:
    hasher = hashlib.blake2b(digest_size=16)
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.hexdigest()
