"""Thousands of ranks by simulation: no process group, the plans of a large job on one machine."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from benchmarks.lab import Lab, Scenario
from benchmarks.launch import NotHereError

MODULE = "benchmarks.scale"


def run(lab: Lab) -> list[dict[str, Any]]:
    """The series of `benchmarks.scale`, as it gives them."""
    if importlib.util.find_spec(MODULE) is None:
        raise NotHereError(f"this version has no {MODULE}")
    if lab.setup.storage is not None:
        raise NotHereError("stores nothing")
    if lab.setup.quick:
        raise NotHereError("has no small size; it has tests of its own")
    return [importlib.import_module(MODULE).run()] if lab.worlds.is_told else []


SCENARIO = Scenario("scale", "4,096 ranks by simulation", run)
