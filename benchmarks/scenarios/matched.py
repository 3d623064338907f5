"""Why one would reshard offline: loading a layout that matches the ranks beside resharding while loading."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from benchmarks import transfer
from benchmarks.contenders import loads
from benchmarks.contenders.dckpt_run import DckptRun, has_command, run_command
from benchmarks.figures import Line, Value
from benchmarks.lab import Lab, Scenario
from benchmarks.launch import NotHereError
from benchmarks.machine import file_system
from benchmarks.series import Series
from benchmarks.setup import Setup
from benchmarks.system import remove_tree
from benchmarks.transfer import Layout, Saved
from benchmarks.turns import entrants, take_turns
from benchmarks.world import World

SAVED, LOADED = Layout("fsdp", 2), Layout("fsdp", 4)
MATCHED, RESHARDING = "dckpt, matched layout", "dckpt, resharding"


def run(lab: Lab) -> list[dict[str, Any]]:
    """One series."""
    if not has_command("reshard"):
        raise NotHereError("this version of dckpt has no command `reshard`")
    setup = lab.setup.within("matched")
    saved = transfer.save(lab, SAVED, setup)
    if lab.worlds.is_told:
        run_command("reshard", setup.root("dckpt"), setup.root("matched"), "--world-size", str(LOADED.ranks))
    found = [lab.run(LOADED.ranks, job, saved, setup)]
    remove_tree(setup.directory)
    return found


def job(world: World, saved: Saved, setup: Setup) -> dict[str, Any]:
    """Both are the same state; only the number of shard files differs."""
    with ExitStack() as stack:
        state = transfer.build(LOADED.kind, world, setup.megabytes)
        contenders = []
        for name, place in ((MATCHED, "matched"), (RESHARDING, "dckpt")):
            ours = DckptRun(world, setup.root(place), state)
            stack.callback(ours.close)
            loads.ensure_whole(world, state, ours.load, saved.fingerprint, name)
            contenders.append(loads.dckpt_load(world, ours, setup.directory / place, name))
        rounds = take_turns(world, contenders, setup.rounds)
    return Series(
        name="matched",
        title=f"{SAVED}, loaded on {LOADED.ranks}, with and without `dckpt reshard` before",
        conditions={
            "ranks": world.size,
            "bytes": saved.needed_bytes,
            "tensors": saved.tensors,
            "file_system": file_system(setup.directory),
        },
        entrants=entrants(contenders),
        rounds=tuple(rounds),
        lines=(
            Line("cold speed / resharding", "at least", 1.0, Value(RESHARDING, "cold_s"), Value(MATCHED, "cold_s")),
        ),
    ).to_json()


SCENARIO = Scenario("matched-layout", "Load of a matched layout beside a resharding load", run)
