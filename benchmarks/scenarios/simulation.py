"""Thousands of ranks by simulation: the plans of a large job on one machine, by `benchmarks.scale`."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from benchmarks.figures import Line, Value
from benchmarks.lab import Lab, Scenario
from benchmarks.launch import NotHereError
from benchmarks.series import Entrant, Series

MODULE = "benchmarks.scale"
QUICK: dict[str, Any] = {"ranks": 16, "rounds": 1, "layouts": ("fsdp",), "layers": 2}
NO_PAYLOAD = "simulated ranks write files of the right size without contents"


def run(lab: Lab) -> list[dict[str, Any]]:
    """A series for each layout of the model."""
    if importlib.util.find_spec(MODULE) is None:
        raise NotHereError(f"this version has no {MODULE}")
    if not lab.worlds.is_told:
        return []
    options = QUICK if lab.setup.quick else {}
    record = importlib.import_module(MODULE).run(directory=str(lab.setup.directory), **options)
    return [as_series(record, layout) for layout in record["layouts"]]


def as_series(record: dict[str, Any], layout: dict[str, Any]) -> dict[str, Any]:
    """What was asked of one layout as judged lines; the simulation's own record of it is among the conditions."""
    asked = layout["asked_for"]
    return Series(
        name=layout["layout"],
        title=f"{layout['layout']} on {record['ranks']:,} ranks, by simulation",
        conditions={"ranks": record["ranks"], "layers": record["layers"], "saves": record["rounds"], "record": layout},
        entrants=(Entrant("dckpt", "dckpt", NO_PAYLOAD, "medians over its saves"),),
        rounds=({"dckpt": {one["what"]: float(one["found"]) for one in asked}},),
        lines=tuple(Line(one["what"], "at most", one["limit"], Value("dckpt", one["what"]), 1.0) for one in asked),
    ).to_json()


SCENARIO = Scenario("scale", "4,096 ranks by simulation", run)
