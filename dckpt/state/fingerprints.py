"""Fingerprints of what this rank holds of a run's tensors: who counts which part, and which ranks hold the same one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import xxhash

_LANES = 2**128 - 1


@dataclass(frozen=True, slots=True)
class LiveFingerprint:
    """Of the part of one tensor that this rank holds.

    value: 128 bits of the part, in its place in the whole tensor (FORMAT.md, section 4.3). dtype: as in a checkpoint.
    group: 0 for plain tensors, else the number of the tensor's device mesh on this rank, from 1. claim: the lowest rank that
    may count the part: the rank itself for a plain tensor, the lowest rank of the mesh for another. is_first: no rank of the
    mesh comes before this one on the axes along which the tensor is replicated. place: where the part lies; ranks with equal
    places hold the same part.
    """

    value: int
    dtype: str
    group: int
    claim: int
    is_first: bool
    place: str


def turned(value: int, name: str) -> int:
    """`value`, rotated by an amount that depends on the name: equal differences in two tensors do not cancel in a sum."""
    by = xxhash.xxh3_64_intdigest(name.encode()) >> 57
    return (value << by | value >> (128 - by)) & _LANES


def replica_digests(live: Mapping[str, LiveFingerprint], *, without: Collection[str] = ()) -> dict[str, int]:
    """Part and place -> 64 bits of all tensors there: equal on all ranks with that place, unless replicas drifted apart.

    without: names of tensors that may differ between ranks.
    """
    found: dict[str, int] = {}
    for name, item in live.items():
        if name not in without:
            key = replica_key(name, item)
            found[key] = found.get(key, 0) ^ replica_digest(name, item)
    return found


def replica_key(name: str, item: LiveFingerprint) -> str:
    """Part and place of a tensor."""
    return f"{name.partition('.')[0]} at {item.place}"


def replica_digest(name: str, item: LiveFingerprint) -> int:
    """64 bits of what this rank holds of a tensor."""
    return xxhash.xxh3_64_intdigest(item.value.to_bytes(16, "little") + name.encode())
