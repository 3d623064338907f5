"""Names and sizes of what is kept per rank."""

from __future__ import annotations

RNG = "rng"
RECORD_BYTES_MAX = 64 * 2**20  # a rank's values of one component, as FORMAT.md limits them

_STEP_BYTES = 512


def record_name(rank: int, name: str) -> str:
    """The stored name of what is kept per rank."""
    return f"rank.{rank}.{name}"


def values_record_name(rank: int, component: str) -> str:
    """The stored name of a rank's own values of `component`: a U8 tensor of tagged JSON."""
    return record_name(rank, f"values.{component}")


def record_capacity(size: int) -> int:
    """Bytes laid out for a record of `size` bytes: its text grows and shrinks a little from save to save, its place must not."""
    grown = size + size // 32 + 64
    return min(RECORD_BYTES_MAX, -(-grown // _STEP_BYTES) * _STEP_BYTES)
