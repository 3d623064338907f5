"""Loading on another number of ranks: how often each byte is read, and how long it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import transfer
from benchmarks.lab import Lab, Scenario
from benchmarks.system import remove_tree
from benchmarks.transfer import Layout

MOVES: Sequence[tuple[Layout, Sequence[Layout]]] = (
    (Layout("fsdp", 2), (Layout("fsdp", 3), Layout("fsdp", 8))),
    (Layout("fsdp", 4), (Layout("fsdp", 2),)),
    (Layout("fsdp", 8), (Layout("fsdp", 3),)),
    (Layout("columns", 2), (Layout("fsdp", 3), Layout("columns", 4))),
)
QUICK_MOVES: Sequence[tuple[Layout, Sequence[Layout]]] = (
    (Layout("fsdp", 2), (Layout("fsdp", 3),)),
    (Layout("columns", 2), (Layout("fsdp", 3),)),
)
SPEED_TARGET, SPEED_MOVE = 3.0, ("fsdp", 2, 8)


def run(lab: Lab) -> list[dict[str, Any]]:
    """A series for each pair of layouts."""
    found = []
    for source, targets in QUICK_MOVES if lab.setup.quick else MOVES:
        setup = lab.setup.within(f"reshard-{source.kind}-{source.ranks}")
        saved = transfer.save(lab, source, setup)
        for target in targets:
            lines = [transfer.read_once(saved)]
            if (source.kind, source.ranks, target.ranks) == SPEED_MOVE:
                lines.append(transfer.faster_than_dcp(SPEED_TARGET))
            found.append(
                transfer.load(
                    lab,
                    saved,
                    target,
                    name=f"{source.kind}-{source.ranks}-to-{target.kind}-{target.ranks}",
                    title=f"{source} → {target}",
                    lines=tuple(lines),
                )
            )
        remove_tree(setup.directory)
    return found


SCENARIO = Scenario("reshard", "Load on another number of ranks", run)
