"""How long training stands still when it waits for a durable checkpoint: a few large tensors, on disk and in tmpfs."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Literal

from benchmarks import fio, states
from benchmarks.contenders import peers, saves
from benchmarks.contenders.dckpt_run import DckptRun, blocking_save
from benchmarks.figures import Line, Value
from benchmarks.lab import Lab, Scenario
from benchmarks.machine import file_system
from benchmarks.raw import RawFile, takes_direct
from benchmarks.series import Series
from benchmarks.setup import Setup
from benchmarks.states import State
from benchmarks.turns import Contender, entrants, take_turns
from benchmarks.world import World

Medium = Literal["disk", "tmpfs"]
OWN = Value("dckpt", "save_s")
DIRECT, BUFFERED = "raw O_DIRECT", "raw pwrite"


def run(lab: Lab) -> list[dict[str, Any]]:
    """One series on the medium of `--directory`, one in memory."""
    found = [lab.run(lab.ranks, job, lab.setup.within("blocking-save"), "disk")]
    if lab.memory is not None and lab.setup.storage is None:
        found.append(lab.run(lab.ranks, job, lab.in_memory("blocking-save"), "tmpfs"))
    return found


def job(world: World, setup: Setup, medium: Medium) -> dict[str, Any]:
    """Every contender saves the same state; seconds until the slowest rank's bytes are durable."""
    world.on_rank_0(lambda: setup.directory.mkdir(parents=True, exist_ok=True))
    skipped: dict[str, str] = {}
    with ExitStack() as stack:
        state = states.few_large(world, setup.megabytes)
        ours = DckptRun(world, setup.root("dckpt"), state)
        stack.callback(ours.close)
        contenders = [
            *_limits(world, state, setup, medium, stack, skipped),
            blocking_save(world, ours, state),
            *peers.save_peers(world, state, setup, stack, skipped),
        ]
        rounds = take_turns(world, contenders, setup.rounds)
        total = state.unique_bytes(world)
    return Series(
        name=medium,
        title=f"Blocking save, {'on disk' if medium == 'disk' else 'in tmpfs'}",
        conditions={
            "ranks": world.size,
            "bytes": total,
            "tensors": len(state.named_local_tensors()),
            "file_system": file_system(setup.directory),
            "fio": fio.version() or "not installed",
        },
        entrants=entrants(contenders),
        rounds=tuple(rounds),
        lines=_lines(medium),
        skipped=skipped,
    ).to_json()


def _limits(
    world: World, state: State, setup: Setup, medium: Medium, stack: ExitStack, skipped: dict[str, str]
) -> list[Contender]:
    """What the medium takes: O_DIRECT by our own writer and by fio, or plain writes where memory is the medium."""
    if setup.storage is not None:
        skipped["limits"] = peers.ELSEWHERE
        return []
    is_direct = medium == "disk" and takes_direct(setup.directory)
    path = setup.directory / "raw" / str(world.rank)
    raw = stack.enter_context(RawFile(path, state.local_bytes, is_direct=is_direct))
    own = saves.raw_write(world, state, raw, DIRECT if is_direct else BUFFERED)
    if not is_direct:
        skipped["fio"] = "measures O_DIRECT, which is not this medium's limit"
        return [own]
    reason = fio.why_not(world)
    if reason is not None:
        skipped["fio"] = reason
        return [own]
    return [own, saves.fio_write(world, state, setup.directory)]


def _lines(medium: Medium) -> tuple[Line, ...]:
    target = 1.2 if medium == "tmpfs" else 1.3
    beside_dcp = tuple(
        Line(f"speed / {name}", "at least", target, Value(name, "save_s"), OWN)
        for name in ("dcp.save, 1 thread", "dcp.save, 2 threads")
    )
    if medium == "tmpfs":
        return beside_dcp
    beside_limits = tuple(
        Line(f"speed / {name}", "at least", 0.90, Value(name, "save_s"), OWN) for name in (DIRECT, "fio")
    )
    return (*beside_limits, *beside_dcp)


SCENARIO = Scenario("blocking-save", "Blocking save of a few large tensors", run)
