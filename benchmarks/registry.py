"""All scenarios, in the order in which they run."""

from __future__ import annotations

import importlib

from benchmarks.lab import Scenario

MODULES = {
    "blocking-save": "blocking_save",
    "many-small": "many_small",
    "async-stall": "async_stall",
    "overlap": "overlap",
    "load": "load",
    "reshard": "reshard",
    "replicas": "replicas",
    "matched-layout": "matched",
    "host-memory": "host_memory",
    "lora": "lora",
    "scale": "simulation",
}
"""Name on the command line -> module of `benchmarks.scenarios`; names are known without importing torch."""


def scenario(name: str) -> Scenario:
    """The scenario of this name."""
    found: Scenario = importlib.import_module(f"benchmarks.scenarios.{MODULES[name]}").SCENARIO
    assert found.name == name
    return found
