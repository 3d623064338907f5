"""How long an asynchronous save keeps the training loop, and how long until it is durable."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from benchmarks import states
from benchmarks.contenders import peers, stalls
from benchmarks.contenders.dckpt_run import DckptRun
from benchmarks.figures import Line, Value
from benchmarks.lab import Lab, Scenario
from benchmarks.machine import file_system
from benchmarks.series import Series
from benchmarks.setup import Setup
from benchmarks.turns import entrants, take_turns
from benchmarks.world import World

STALL = Value("dckpt", "stall_s")


def run(lab: Lab) -> list[dict[str, Any]]:
    """One series."""
    return [lab.run(lab.ranks, job, lab.setup.within("async-stall"))]


def job(world: World, setup: Setup) -> dict[str, Any]:
    """Every contender saves asynchronously and is waited for before the next begins."""
    directory = setup.directory
    world.on_rank_0(lambda: directory.mkdir(parents=True, exist_ok=True))
    skipped: dict[str, str] = {}
    with ExitStack() as stack:
        state = states.few_large(world, setup.megabytes)
        ours = DckptRun(world, setup.root("dckpt"), state)
        stack.callback(ours.close)
        contenders = [
            stalls.plain_copy(world, state),
            stalls.dckpt_async(world, ours, state),
            *peers.async_peers(world, state, setup, stack, skipped),
        ]
        rounds = take_turns(world, contenders, setup.rounds)
        total = state.unique_bytes(world)
    peer = "dcp.async_save, thread"
    return Series(
        name="stall",
        title="Asynchronous save",
        conditions={
            "ranks": world.size,
            "bytes": total,
            "tensors": len(state.named_local_tensors()),
            "file_system": file_system(directory),
        },
        entrants=entrants(contenders),
        rounds=tuple(rounds),
        lines=(
            Line("stall / copy into warm memory", "at most", 1.2, STALL, Value("copy into warm memory", "stall_s")),
            Line(f"stall / {peer}", "at most", 0.25, STALL, Value(peer, "stall_s")),
        ),
        skipped=skipped,
    ).to_json()


SCENARIO = Scenario("async-stall", "Stall of an asynchronous save", run)
