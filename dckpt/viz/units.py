"""Quantities as people read them."""

from __future__ import annotations


def format_bytes(count: int | None) -> str:
    """Three significant digits and a binary unit; `?` when unknown."""
    if count is None:
        return "?"
    size, unit = float(count), 0
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    # 999.5 of a unit would round to four digits, so it already counts as the next one.
    while size >= 999.5 and unit < len(units) - 1:
        size /= 1024
        unit += 1
    digits = 0 if unit == 0 or size >= 99.95 else 1 if size >= 9.995 else 2
    return f"{size:.{digits}f} {units[unit]}"


def format_age(seconds: float) -> str:
    """The largest unit that fits, whole: `3 min ago`. A clock that runs ahead gives `just now`."""
    for name, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= length:
            return f"{int(seconds // length)} {name} ago"
    return "just now"


def format_number(value: float) -> str:
    """Up to six significant digits."""
    return f"{value:.6g}"


def format_count(count: int, singular: str) -> str:
    """`1 file`, `2 files`."""
    return f"{count:,} {singular}" if count == 1 else f"{count:,} {singular}s"


def format_names(names: list[str] | tuple[str, ...], limit: int = 8) -> str:
    """The names, or the first of them and how many more."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit:,} more"


def format_ranks(ranks: list[int] | tuple[int, ...]) -> str:
    """`rank 3` or `ranks 1, 2`."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(str(rank) for rank in ranks)}"
