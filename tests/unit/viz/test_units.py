"""Quantities read as people write them."""

from __future__ import annotations

import pytest

from dckpt.viz.units import format_age, format_bytes, format_count, format_names, format_ranks


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "?"),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.98 KiB"),
        (1024, "1.00 KiB"),
        (10 * 1024, "10.0 KiB"),
        (1024 * 1024 - 1, "1.00 MiB"),
        (137 * 2**30, "137 GiB"),
        (5 * 2**70, "5120 EiB"),
    ],
)
def test_bytes_have_three_significant_digits_and_a_binary_unit(count: int | None, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "just now"), (0.5, "just now"), (59, "59 s ago"), (61, "1 min ago"), (7200, "2 h ago"), (9e4, "1 d ago")],
)
def test_ages_have_one_unit_and_a_clock_that_runs_ahead_is_no_age(seconds: float, text: str) -> None:
    assert format_age(seconds) == text


def test_counts_names_and_ranks_read_as_sentences() -> None:
    assert (format_count(1, "file"), format_count(2000, "file")) == ("1 file", "2,000 files")
    assert format_names(("a", "b")) == "a, b"
    assert format_names([str(n) for n in range(12)], limit=2) == "0, 1 and 10 more"
    assert (format_ranks((3,)), format_ranks((1, 2))) == ("rank 3", "ranks 1, 2")
