"""The record of a run: one JSON document that tables, pictures and pages are made from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.setup import Setup

FORMAT = "dckpt benchmark record, version 1"


def skipped_scenario(name: str, title: str, reason: str) -> dict[str, Any]:
    """A scenario that could not run here."""
    return {"name": name, "title": title, "skipped": reason, "failed": None, "seconds": 0.0, "series": []}


def failed_scenario(name: str, title: str, error: str) -> dict[str, Any]:
    """A scenario that went wrong; the error is every rank's own text."""
    return {"name": name, "title": title, "skipped": None, "failed": error, "seconds": 0.0, "series": []}


def measured_scenario(name: str, title: str, series: Sequence[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """A scenario that ran, in so many seconds altogether."""
    return {
        "name": name,
        "title": title,
        "skipped": None,
        "failed": None,
        "seconds": seconds,
        "series": list(series),
    }


def record_of(
    machine: dict[str, Any], setup: Setup, ranks: int, scenarios: Sequence[dict[str, Any]], began_unix_s: float
) -> dict[str, Any]:
    """The whole record. Places are left out: they say nothing about the figures."""
    return {
        "format": FORMAT,
        "began": datetime.fromtimestamp(began_unix_s, timezone.utc).isoformat(timespec="seconds"),
        "machine": machine,
        "ranks": ranks,
        "megabytes": setup.megabytes,
        "rounds": setup.rounds,
        "quick": setup.quick,
        "storage": None if setup.storage is None else _scheme(setup.storage),
        "scenarios": list(scenarios),
    }


def _scheme(url: str) -> str:
    scheme, separator, _ = url.partition("://")
    return scheme if separator else "file"


def write_record(record: dict[str, Any], path: Path) -> None:
    """Writes the record; NaN and infinities are refused."""
    path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_record(path: Path) -> dict[str, Any]:
    """Reads a record; an error if it is none, or one of another version."""
    document: Any = json.loads(path.read_text(encoding="utf-8"))
    found = document.get("format") if isinstance(document, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path}: expected a {FORMAT}, found {found!r}")
    record: dict[str, Any] = document
    return record


def all_series(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every series of every scenario."""
    for scenario in record["scenarios"]:
        yield from scenario["series"]


def count_lines(record: dict[str, Any]) -> tuple[int, int, int]:
    """(lines that hold, lines that are missed, lines that were not measured)."""
    verdicts = [line["passed"] for series in all_series(record) for line in series["lines"]]
    return verdicts.count(True), verdicts.count(False), verdicts.count(None)


def wrong_figures(record: dict[str, Any]) -> list[str]:
    """Every figure that is not a finite number above zero, by its place; an empty list is a good record."""
    found = []
    for series in all_series(record):
        for number, one in enumerate(series["rounds"]):
            for contender in series["contenders"]:
                measures = one.get(contender) or {"nothing": math.nan}
                for measure, value in measures.items():
                    if not (math.isfinite(value) and value > 0):
                        found.append(f"{series['title']}, round {number}: {contender}, {measure}: {value}")
    return found
