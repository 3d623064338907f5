"""A frozen model with a small trained adapter: what the second save writes of what did not change."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp

from benchmarks import states
from benchmarks.contenders.dckpt_run import DckptRun
from benchmarks.contenders.policies import ALL_SYNCED, COMMITTED, FILES_SYNCED
from benchmarks.figures import Line, Value
from benchmarks.lab import Lab, Scenario
from benchmarks.launch import NotHereError
from benchmarks.machine import file_system
from benchmarks.series import Entrant, Series
from benchmarks.setup import Setup
from benchmarks.states import State
from benchmarks.system import counters, files_of, remove
from benchmarks.turns import Contender, entrants, take_turns
from benchmarks.world import World


def run(lab: Lab) -> list[dict[str, Any]]:
    """One series."""
    if lab.setup.storage is not None:
        raise NotHereError("counts files on a file system")
    return [lab.run(lab.ranks, job, lab.setup.within("lora"))]


def job(world: World, setup: Setup) -> dict[str, Any]:
    """Every save follows one of the same run; between two of them the adapters change. The first save is discarded."""
    directory = setup.directory
    world.on_rank_0(lambda: directory.mkdir(parents=True, exist_ok=True))
    with ExitStack() as stack:
        state = states.adapters(world, setup.megabytes)
        ours = DckptRun(world, setup.root("dckpt"), state)
        stack.callback(ours.close)
        contenders = [_dckpt(world, ours, state, directory / "dckpt"), _dcp(world, state, directory / "dcp")]
        rounds = take_turns(world, contenders, setup.rounds)
        total, changed = state.unique_bytes(world), state.unique_trained_bytes(world)
    return Series(
        name="second-save",
        title="Later saves of a frozen model with a trained adapter",
        conditions={
            "ranks": world.size,
            "bytes": total,
            "changed_bytes": changed,
            "file_system": file_system(directory),
            "counted": "sizes of files that did not exist before the save, by inode; device writes by the kernel",
        },
        entrants=entrants(contenders),
        rounds=tuple(rounds),
        lines=(Line("bytes written / bytes changed", "at most", 1.03, Value("dckpt", "file_bytes"), float(changed)),),
    ).to_json()


def _dckpt(world: World, ours: DckptRun, state: State, root: Path) -> Contender:
    def work() -> dict[str, float]:
        state.advance()
        known = world.on_rank_0(lambda: set(_inodes(root)))
        before = counters().written_bytes
        seconds = world.timed(ours.save)
        device_bytes = world.total(counters().written_bytes - before)
        new = world.on_rank_0(lambda: sum(size for inode, size in _inodes(root).items() if inode not in known))
        return {"save_s": seconds, "file_bytes": float(new), "device_bytes": device_bytes}

    return Contender(Entrant("dckpt", "dckpt", ALL_SYNCED, COMMITTED), work)


def _dcp(world: World, state: State, path: Path) -> Contender:
    held = state.state_dict()

    def work() -> dict[str, float]:
        state.advance()
        before = counters().written_bytes
        seconds = world.timed(lambda: dcp.save(held, checkpoint_id=path))
        device_bytes = world.total(counters().written_bytes - before)
        new = world.on_rank_0(lambda: sum(_inodes(path).values()))
        remove(world, path)
        return {"save_s": seconds, "file_bytes": float(new), "device_bytes": device_bytes}

    return Contender(Entrant("dcp.save", "peer", FILES_SYNCED, "writes everything each time"), work)


def _inodes(root: Path) -> dict[int, int]:
    """inode -> bytes of each file below; a file with several names counts once."""
    return {status.st_ino: status.st_size for status in (path.stat() for path in files_of(root))}


SCENARIO = Scenario("lora", "Second save of a LoRA-like state", run)
