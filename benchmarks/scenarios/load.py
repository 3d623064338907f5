"""How long a restart waits for its state on the same number of ranks, with a cold and with a warm page cache."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch.distributed.checkpoint as dcp

from benchmarks import fio, states
from benchmarks.contenders import loads, torch_checkpointing
from benchmarks.contenders.dckpt_run import DckptRun
from benchmarks.figures import Line, Value
from benchmarks.lab import Lab, Scenario
from benchmarks.machine import file_system
from benchmarks.raw import RawFile, takes_direct
from benchmarks.series import Series
from benchmarks.setup import Setup
from benchmarks.states import State
from benchmarks.turns import Contender, entrants, take_turns
from benchmarks.world import World

COLD, WARM = Value("dckpt", "cold_s"), Value("dckpt", "warm_s")


def run(lab: Lab) -> list[dict[str, Any]]:
    """One series."""
    return [lab.run(lab.ranks, job, lab.setup.within("load"))]


def job(world: World, setup: Setup) -> dict[str, Any]:
    """Every contender saves once, then loads in turns."""
    directory = setup.directory
    world.on_rank_0(lambda: directory.mkdir(parents=True, exist_ok=True))
    skipped: dict[str, str] = {}
    with ExitStack() as stack:
        state = states.few_large(world, setup.megabytes)
        contenders = [
            *_limits(world, state, setup, stack, skipped),
            *_loaders(world, state, setup, stack, skipped),
        ]
        rounds = take_turns(world, contenders, setup.rounds)
        total = state.unique_bytes(world)
    return Series(
        name="same-ranks",
        title=f"Load on the same {world.size} ranks",
        conditions={
            "ranks": world.size,
            "bytes": total,
            "tensors": len(state.named_local_tensors()),
            "file_system": file_system(directory),
            "cold": "each file fsynced, then dropped from the page cache with posix_fadvise",
        },
        entrants=entrants(contenders),
        rounds=tuple(rounds),
        lines=(
            Line("cold speed / raw O_DIRECT read", "at least", 0.90, Value("raw O_DIRECT read", "cold_s"), COLD),
            Line("cold speed / fio", "at least", 0.90, Value("fio", "cold_s"), COLD),
            Line("warm speed / dcp.load", "at least", 3, Value("dcp.load", "warm_s"), WARM),
        ),
        skipped=skipped,
    ).to_json()


def _limits(
    world: World, state: State, setup: Setup, stack: ExitStack, skipped: dict[str, str]
) -> list[Contender]:
    path = setup.directory / "raw"
    world.on_rank_0(lambda: path.mkdir(exist_ok=True))
    raw = stack.enter_context(RawFile(path / str(world.rank), state.local_bytes, is_direct=False))
    raw.write()
    found = [loads.raw_warm_read(world, raw)]
    if not takes_direct(setup.directory):
        reason = "this file system takes no O_DIRECT"
        return found + _note(skipped, {"raw O_DIRECT read": reason, "fio": reason})
    found.append(loads.raw_cold_read(world, raw))
    if fio.version() is None:
        return found + _note(skipped, {"fio": "fio is not installed"})
    return [*found, loads.fio_read(world, state, setup.directory)]


def _loaders(
    world: World, state: State, setup: Setup, stack: ExitStack, skipped: dict[str, str]
) -> list[Contender]:
    directory, expected = setup.directory, state.fingerprint(world)
    ours = DckptRun(world, setup.root("dckpt"), state)
    stack.callback(ours.close)
    ours.save()
    loads.ensure_whole(world, state, ours.load, expected, "dckpt")
    dcp.save(state.state_dict(), checkpoint_id=directory / "dcp")
    loads.save_files(world, state, directory)
    found = [
        loads.dckpt_load(world, ours, directory / "dckpt"),
        loads.dcp_load(world, state, directory / "dcp"),
        loads.torch_load(world, state, directory),
        loads.safetensors_load(world, state, directory),
    ]
    if torch_checkpointing.is_installed():
        manager = torch_checkpointing.Manager(world, state, is_async=False)
        stack.callback(manager.close)
        manager.save(directory / "torch-checkpointing")
        found.append(loads.tc_load(world, manager, directory / "torch-checkpointing"))
    else:
        skipped[torch_checkpointing.NAME] = torch_checkpointing.MISSING
    for contender in found[1:]:
        loads.ensure_whole(world, state, contender.work, expected, contender.entrant.name)
    return found


def _note(skipped: dict[str, str], reasons: dict[str, str]) -> list[Contender]:
    skipped.update(reasons)
    return []


SCENARIO = Scenario("load", "Load on the same ranks", run)
