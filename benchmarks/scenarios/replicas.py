"""Where several ranks hold the same bytes (DDP, HSDP): a load need read them once."""

from __future__ import annotations

from typing import Any

from benchmarks import transfer
from benchmarks.lab import Lab, Scenario
from benchmarks.system import remove_tree
from benchmarks.transfer import HSDP_SHARDS, Layout

REPLICAS, QUICK_REPLICAS = 4, 2


def run(lab: Lab) -> list[dict[str, Any]]:
    """A series for DDP and one for HSDP, four replicas each."""
    found = []
    replicas = QUICK_REPLICAS if lab.setup.quick else REPLICAS
    for layout in (Layout("ddp", replicas), Layout("hsdp", replicas * HSDP_SHARDS)):
        setup = lab.setup.within(f"replicas-{layout.kind}")
        saved = transfer.save(lab, layout, setup)
        found.append(
            transfer.load(
                lab,
                saved,
                layout,
                name=layout.kind,
                title=f"{layout}, loaded on the same",
                lines=(transfer.read_once(saved),),
            )
        )
        remove_tree(setup.directory)
    return found


SCENARIO = Scenario("replicas", "Load where four ranks hold the same bytes", run)
