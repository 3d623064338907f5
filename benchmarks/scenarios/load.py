"""How long a restart waits for its state on the same number of ranks, with a cold and with a warm page cache."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from benchmarks import fio, states
from benchmarks.contenders import loads, peers
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

COLD_FILES = "each file fsynced, then dropped from the page cache with posix_fadvise"
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
            "cold": COLD_FILES if setup.storage is None else "as the storage serves it: nothing is dropped",
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


def _limits(world: World, state: State, setup: Setup, stack: ExitStack, skipped: dict[str, str]) -> list[Contender]:
    """What the medium and the page cache give."""
    if setup.storage is not None:
        return _note(skipped, {"limits": peers.ELSEWHERE})
    path = setup.directory / "raw"
    world.on_rank_0(lambda: path.mkdir(exist_ok=True))
    raw = stack.enter_context(RawFile(path / str(world.rank), state.local_bytes, is_direct=False))
    raw.write()
    found = [loads.raw_warm_read(world, raw)]
    if not takes_direct(setup.directory):
        buffered = "this file system takes no O_DIRECT"
        return found + _note(skipped, {"raw O_DIRECT read": buffered, "fio": buffered})
    found.append(loads.raw_cold_read(world, raw))
    reason = fio.why_not(world)
    if reason is not None:
        return found + _note(skipped, {"fio": reason})
    return [*found, loads.fio_read(world, state, setup.directory)]


def _loaders(world: World, state: State, setup: Setup, stack: ExitStack, skipped: dict[str, str]) -> list[Contender]:
    """dckpt and its peers, each of them having shown that it brings the state back."""
    expected = state.fingerprint(world)
    ours = DckptRun(world, setup.root("dckpt"), state)
    stack.callback(ours.close)
    ours.save()
    found = [
        loads.dckpt_load(world, ours, setup.directory / "dckpt"),
        *peers.load_peers(world, state, setup, stack, skipped),
    ]
    for contender in found:
        loads.ensure_whole(world, state, contender.work, expected, contender.entrant.name)
    return found


def _note(skipped: dict[str, str], reasons: dict[str, str]) -> list[Contender]:
    skipped.update(reasons)
    return []


SCENARIO = Scenario("load", "Load on the same ranks", run)
