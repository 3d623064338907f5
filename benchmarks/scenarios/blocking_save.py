"""How long training stands still when it waits for a durable checkpoint: a few large tensors, on disk and in tmpfs."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from benchmarks import fio, states
from benchmarks.contenders import saves, torch_checkpointing
from benchmarks.contenders.dckpt_run import DckptRun, blocking_save
from benchmarks.contenders.tc_contenders import tc_save
from benchmarks.figures import Line, Value
from benchmarks.lab import Lab, Scenario
from benchmarks.machine import file_system
from benchmarks.raw import RawFile, takes_direct
from benchmarks.series import Series
from benchmarks.setup import Setup
from benchmarks.turns import entrants, take_turns
from benchmarks.world import World

OWN = Value("dckpt", "save_s")
DIRECT, BUFFERED = "raw O_DIRECT", "raw pwrite"


def run(lab: Lab) -> list[dict[str, Any]]:
    """One series on the medium of `--directory`, one in memory."""
    found = [lab.run(lab.ranks, job, lab.setup.within("blocking-save"), "disk")]
    if lab.memory is not None and lab.setup.storage is None:
        found.append(lab.run(lab.ranks, job, lab.in_memory("blocking-save"), "tmpfs"))
    return found


def job(world: World, setup: Setup, medium: str) -> dict[str, Any]:
    """Every contender saves the same state; seconds until the slowest rank's bytes are durable."""
    directory = setup.directory
    world.on_rank_0(lambda: directory.mkdir(parents=True, exist_ok=True))
    is_direct = medium == "disk" and takes_direct(directory)
    limit = DIRECT if is_direct else BUFFERED
    skipped: dict[str, str] = {}
    with ExitStack() as stack:
        state = states.few_large(world, setup.megabytes)
        raw = stack.enter_context(
            RawFile(directory / "raw" / str(world.rank), state.local_bytes, is_direct=is_direct)
        )
        run_of_ours = DckptRun(world, setup.root("dckpt"), state)
        stack.callback(run_of_ours.close)
        contenders = [
            saves.raw_write(world, state, raw, limit),
            blocking_save(world, run_of_ours, state),
            saves.dcp_save(world, state, directory, threads=1),
            saves.dcp_save(world, state, directory, threads=2),
            saves.torch_save(world, state, directory),
            saves.safetensors_save(world, state, directory),
        ]
        if not is_direct:
            skipped["fio"] = "measures O_DIRECT, which is not this medium's limit"
        elif fio.version() is None:
            skipped["fio"] = "fio is not installed"
        else:
            contenders.append(saves.fio_write(world, state, directory))
        if torch_checkpointing.is_installed():
            contenders.append(stack.enter_context(tc_save(world, state, directory)))
        else:
            skipped[torch_checkpointing.NAME] = torch_checkpointing.MISSING
        rounds = take_turns(world, contenders, setup.rounds)
        total = state.unique_bytes(world)
    return Series(
        name=medium,
        title=f"Blocking save, {'on disk' if medium == 'disk' else 'in tmpfs'}",
        conditions={
            "ranks": world.size,
            "bytes": total,
            "tensors": len(state.named_local_tensors()),
            "file_system": file_system(directory),
            "limit": f"{limit} by our own writer" + (f", and {fio.version()}" if is_direct and fio.version() else ""),
        },
        entrants=entrants(contenders),
        rounds=tuple(rounds),
        lines=_lines(medium, limit),
        skipped=skipped,
    ).to_json()


def _lines(medium: str, limit: str) -> tuple[Line, ...]:
    if medium == "tmpfs":
        return (
            Line("speed / dcp.save, 1 thread", "at least", 1.2, Value("dcp.save, 1 thread", "save_s"), OWN),
            Line("speed / dcp.save, 2 threads", "at least", 1.2, Value("dcp.save, 2 threads", "save_s"), OWN),
        )
    return (
        Line(f"speed / {limit}", "at least", 0.90, Value(limit, "save_s"), OWN),
        Line("speed / fio", "at least", 0.90, Value("fio", "save_s"), OWN),
        Line("speed / dcp.save, 1 thread", "at least", 1.3, Value("dcp.save, 1 thread", "save_s"), OWN),
        Line("speed / dcp.save, 2 threads", "at least", 1.3, Value("dcp.save, 2 threads", "save_s"), OWN),
    )


SCENARIO = Scenario("blocking-save", "Blocking save of a few large tensors", run)
