"""A record as pictures: one a scenario, SVG and PNG, bars of medians with the rounds' range."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.table import MEASURES

COLORS = {"limit": "#9aa0a6", "dckpt": "#1a73e8", "peer": "#f29900"}
DRAWN = (
    "save_s",
    "stall_s",
    "durable_s",
    "cold_s",
    "warm_s",
    "stall_percent",
    "step_during_s",
    "read_bytes",
    "extra_bytes",
)
MOST_PANELS = 3  # beside each other; what comes later in DRAWN is left to the table
BAR_INCHES, PANEL_INCHES, TITLE_INCHES = 0.32, 4.6, 0.9


def draw(record: dict[str, Any], directory: Path) -> list[Path]:
    """Writes the pictures and returns their paths; needs matplotlib (`pip install dckpt[report]`)."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "dckpt"  # equal records give equal files
    written = []
    for scenario in record["scenarios"]:
        if not scenario["series"]:
            continue
        figure = _figure(scenario)
        for ending in ("svg", "png"):
            path = directory / f"{scenario['name']}.{ending}"
            figure.savefig(path, dpi=110, metadata={"Date": None} if ending == "svg" else None)
            written.append(path)
    return written


def _figure(scenario: dict[str, Any]) -> Any:
    """A row a series, a panel a measure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [(series, _drawn(series)) for series in scenario["series"]]
    columns = max(1, max(len(measures) for _, measures in rows))
    heights = [TITLE_INCHES + BAR_INCHES * len(series["contenders"]) for series, _ in rows]
    figure = Figure(figsize=(PANEL_INCHES * columns + 1.5, sum(heights) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(scenario["title"], fontweight="bold")
    axes = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for line, (series, measures) in zip(axes, rows, strict=True):
        for column, panel in enumerate(line):
            if column < len(measures):
                _panel(panel, series, measures[column], is_first=column == 0)
            else:
                panel.set_visible(False)
    return figure


def _drawn(series: dict[str, Any]) -> list[str]:
    return [key for key in DRAWN if any(key in found for found in series["medians"].values())][:MOST_PANELS]


def _panel(panel: Any, series: dict[str, Any], measure: str, *, is_first: bool) -> None:
    scale, unit = _unit(measure)
    names = [name for name in series["contenders"] if measure in series["medians"].get(name, {})]
    names.sort(key=lambda name: series["medians"][name][measure], reverse=True)
    medians = [series["medians"][name][measure] * scale for name in names]
    values = [[one[name][measure] * scale for one in series["rounds"]] for name in names]
    below = [median - min(found) for median, found in zip(medians, values, strict=True)]
    above = [max(found) - median for median, found in zip(medians, values, strict=True)]
    colors = [COLORS[series["contenders"][name]["role"]] for name in names]
    panel.barh(names, medians, color=colors, xerr=(below, above), error_kw={"elinewidth": 0.8, "ecolor": "#3c4043"})
    panel.set_xlabel(f"{MEASURES[measure]}, {unit}")
    panel.set_xlim(left=0)
    panel.spines[["top", "right"]].set_visible(False)
    if is_first:
        panel.set_title(series["title"], loc="left", fontsize="medium")


def _unit(measure: str) -> tuple[float, str]:
    if measure.endswith("_bytes"):
        return 1e-6, "MB"
    return (1.0, "%") if measure.endswith("_percent") else (1.0, "s")
