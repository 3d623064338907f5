"""A record as Markdown: first what was aimed at and what was found, then every series with its contenders."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.contenders.policies import NOTHING_WRITTEN
from benchmarks.figures import Value, ratios

MEASURES = {
    "save_s": "save",
    "stall_s": "training stalled",
    "durable_s": "until durable",
    "cold_s": "cold cache",
    "warm_s": "warm cache",
    "plain_step_s": "step without a save",
    "step_during_s": "step while one runs",
    "stall_percent": "stall in a step",
    "steps_during": "steps until durable",
    "file_bytes": "bytes in files",
    "read_bytes": "bytes read (warm)",
    "device_bytes": "bytes from or to the device",
    "extra_bytes": "extra memory",
}
"""Measure -> column heading. A measure without a heading stands under its own name."""

SPEEDS = ("save_s", "cold_s", "warm_s")
"""These are also shown as GB/s of the state, where it is large enough for that to mean something."""

SPEED_BYTES = 50_000_000


def render(record: dict[str, Any], pictures: Mapping[str, str] | None = None) -> str:
    """The whole text; headings begin at the third level. pictures: scenario -> a picture to show under its heading."""
    shown = pictures or {}
    parts = [_machine(record), "### Targets", _targets(record)]
    for scenario in record["scenarios"]:
        parts.append(f"### {scenario['title']}")
        if scenario["name"] in shown:
            parts.append(f"![{scenario['title']}]({shown[scenario['name']]})")
        if scenario["skipped"]:
            parts.append(f"Not measured: {scenario['skipped']}.")
        if scenario["failed"]:
            parts.append(f"Failed: {scenario['failed'].strip().splitlines()[-1]}")
        for series in scenario["series"]:
            parts += [_heading(series), *_table(series, _contenders(series))]
            parts += [f"Not measured: {name} ({reason})." for name, reason in series["skipped"].items()]
    return "\n\n".join(parts) + "\n"


def _machine(record: dict[str, Any]) -> str:
    machine, versions = record["machine"], record["machine"]["versions"]
    gpus = f", {len(machine['gpus'])} x {machine['gpus'][0]}" if machine["gpus"] else ", no GPU"
    software = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return (
        f"{machine['cores']} cores ({machine['processor']}){gpus}, {machine['memory_bytes'] / 2**30:.0f} GiB of memory, "
        f"{machine['file_system']}, Linux {machine['kernel']}; {software}. "
        f"{record['megabytes']:,} MB of state over {record['ranks']} ranks unless said otherwise; medians of "
        f"{record['rounds']} rounds, {record['began'].partition('T')[0]}."
        + (" **A quick run: tiny sizes, the figures mean nothing.**" if record["quick"] else "")
    )


def _targets(record: dict[str, Any]) -> str:
    rows = [["what", "ratio", "target", "found", "rounds", ""]]
    for scenario in record["scenarios"]:
        for series in scenario["series"]:
            rows += [[series["title"], *_judged(line)] for line in series["lines"]]
    return _markdown(rows, right=(2, 3, 4)) if len(rows) > 1 else "No line was judged."


def _judged(line: dict[str, Any]) -> list[str]:
    target = f"{'≥' if line['sense'] == 'at least' else '≤'} {line['target']:g}"
    if line["value"] is None:
        return [line["text"], target, "", "", "not measured"]
    spread = f"{_short(min(line['ratios']))} to {_short(max(line['ratios']))}"
    worst = " (worst round)" if line["reduce"] == "worst" else ""
    return [line["text"], target, _short(line["value"]) + worst, spread, "holds" if line["passed"] else "**missed**"]


def _heading(series: dict[str, Any]) -> str:
    conditions = series["conditions"]
    said = []
    if "bytes" in conditions:
        said.append(f"{conditions['bytes'] / 1e6:,.0f} MB")
    if "tensors" in conditions:
        said.append(f"{conditions['tensors']:,} tensors a rank")
    said.append(f"{conditions['ranks']} rank{'s' if conditions['ranks'] > 1 else ''}")
    if "file_system" in conditions:
        said.append(conditions["file_system"])
    said += [f"{name}: {conditions[name]}" for name in ("fio", "cold", "counted", "stall") if name in conditions]
    return f"**{series['title']}** ({'; '.join(said)})"


def _contenders(series: dict[str, Any]) -> list[str]:
    """Limits first, then ours, then peers."""
    order = {"limit": 0, "dckpt": 1, "peer": 2}
    return sorted(series["contenders"], key=lambda name: order[series["contenders"][name]["role"]])


def _table(series: dict[str, Any], names: Sequence[str]) -> list[str]:
    """The table, or nothing where only lines were judged."""
    medians = series["medians"]
    measures = [key for key in MEASURES if any(key in medians.get(name, {}) for name in names)]
    if not measures:
        return []
    timed = [key for key in measures if key.endswith("_s") and key != "plain_step_s"]
    ours = next(name for name in names if series["contenders"][name]["role"] == "dckpt")
    writes = any(contender["fsync"] != NOTHING_WRITTEN for contender in series["contenders"].values())
    heads = ["", *(MEASURES[key] for key in measures), *(f"{MEASURES[key]} / {ours}" for key in timed)]
    rows = [[*heads, "fsynced"] if writes else heads]
    for name in names:
        found = medians.get(name, {})
        shown = f"**{name}**" if series["contenders"][name]["role"] == "dckpt" else name
        cells = [_cell(found.get(key), key, series["conditions"]) for key in measures]
        times = [_times(series, Value(name, key), Value(ours, key)) for key in timed]
        rows.append([shown, *cells, *times, *([series["contenders"][name]["fsync"]] if writes else [])])
    return [_markdown(rows, right=range(1, len(heads)))]


def _times(series: dict[str, Any], theirs: Value, ours: Value) -> str:
    """How many times our seconds they take: the median of the rounds' ratios."""
    found = ratios(series["rounds"], theirs, ours)
    return "" if found is None else _short(statistics.median(found))


def _cell(value: float | None, measure: str, conditions: dict[str, Any]) -> str:
    if value is None:
        return ""
    if measure.endswith("_bytes"):
        return f"{value / 1e6:,.1f} MB"
    if measure.endswith("_percent"):
        return f"{value:.1f} %"
    if not measure.endswith("_s"):
        return f"{value:.0f}"
    shown = f"{_short(value)} s" if value >= 0.1 else f"{_short(value * 1000)} ms"
    if measure in SPEEDS and conditions.get("bytes", 0) >= SPEED_BYTES:
        shown += f", {conditions['bytes'] / 1e9 / value:.2f} GB/s"
    return shown


def _short(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _markdown(rows: Sequence[Sequence[str]], right: Sequence[int] | range) -> str:
    head, *body = rows
    rule = ["---:" if column in right else "---" for column in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body))
