"""What a save or a load takes of the host's memory beyond the state itself, at its peak, by the kernel's own count.

Each contender gets fresh processes: memory that a save keeps for the next one counts as taken.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal

import torch.distributed.checkpoint as dcp

from benchmarks import states
from benchmarks.contenders.dckpt_run import DckptRun, ensure_committed
from benchmarks.contenders.peers import ELSEWHERE
from benchmarks.contenders.policies import ALL_SYNCED, COMMITTED, FILES_SYNCED, NOTHING_WRITTEN
from benchmarks.figures import Line, Round, Value
from benchmarks.lab import Lab, Scenario
from benchmarks.series import Entrant, Series
from benchmarks.setup import Setup
from benchmarks.states import State
from benchmarks.system import give_back_free_memory, peak_bytes, remove, remove_tree, reset_peak, resident_bytes
from benchmarks.world import World

Work = Literal["async save", "blocking save", "load"]
WORKS: tuple[Work, ...] = ("async save", "blocking save", "load")
MIB = float(1 << 20)
ABOVE_THE_STATE_MIB = 512


def run(lab: Lab) -> list[dict[str, Any]]:
    """A series for each kind of work."""
    return [_series(lab, work) for work in WORKS]


def _series(lab: Lab, work: Work) -> dict[str, Any]:
    setup = lab.setup.within(f"host-memory-{work.replace(' ', '-')}")
    whose: dict[str, list[dict[str, float]]] = {}
    shard_bytes = 0
    for name in ("dckpt", "dcp"):
        if name == "dcp" and setup.storage is not None:
            continue
        shard_bytes, whose[name] = lab.run(lab.ranks, job, setup, name, work)
    remove_tree(setup.directory)
    peer = "dcp." + {"async save": "async_save", "blocking save": "save", "load": "load"}[work]
    rounds: list[Round] = [{} for _ in range(setup.rounds)]
    for name, measured in whose.items():
        for one, found in zip(rounds, measured, strict=True):
            one["dckpt" if name == "dckpt" else peer] = found
    reads = work == "load"
    return Series(
        name=work.replace(" ", "-"),
        title=f"Extra host memory at the peak of {'an' if work == 'async save' else 'a'} {work}",
        conditions={"ranks": lab.ranks, "rank_bytes": shard_bytes, "counted": "VmHWM above VmRSS before the first one"},
        entrants=(
            Entrant("dckpt", "dckpt", NOTHING_WRITTEN if reads else ALL_SYNCED, COMMITTED),
            *((Entrant(peer, "peer", NOTHING_WRITTEN if reads else FILES_SYNCED),) if "dcp" in whose else ()),
        ),
        rounds=tuple(rounds),
        lines=(_line(work, shard_bytes),),
        skipped={} if "dcp" in whose else {peer: ELSEWHERE},
    ).to_json()


def _line(work: Work, shard_bytes: int) -> Line:
    extra = Value("dckpt", "extra_bytes")
    if work == "async save":
        return Line("extra memory / the rank's shard", "at most", 1.05, extra, float(shard_bytes), "worst")
    return Line("extra memory in MiB", "at most", ABOVE_THE_STATE_MIB, extra, MIB, "worst")


def job(world: World, setup: Setup, name: str, work: Work) -> tuple[int, list[dict[str, float]]]:
    """(bytes of a rank's shard, the largest extra of any rank in each round)."""
    world.on_rank_0(lambda: setup.directory.mkdir(parents=True, exist_ok=True))
    with ExitStack() as stack:
        state = states.few_large(world, setup.megabytes)
        if work == "load":
            _save_for(world, setup, name, state)
        give_back_free_memory()
        before = resident_bytes()
        act, clean = _dckpt(world, setup, state, work, stack) if name == "dckpt" else _dcp(world, setup, state, work)
        found = []
        for _ in range(setup.rounds):
            state.advance()
            reset_peak()
            act()
            found.append({"extra_bytes": world.slowest(float(max(1, peak_bytes() - before)))})
            clean()
        return state.local_bytes, found


def _save_for(world: World, setup: Setup, name: str, state: State) -> None:
    if name == "dckpt":
        run_of_ours = DckptRun(world, setup.root("dckpt"), state)
        run_of_ours.save()
        run_of_ours.close()
    else:
        dcp.save(state.state_dict(), checkpoint_id=setup.directory / "dcp")


def _dckpt(
    world: World, setup: Setup, state: State, work: Work, stack: ExitStack
) -> tuple[Callable[[], object], Callable[[], object]]:
    ours = DckptRun(world, setup.root("dckpt"), state)
    stack.callback(ours.close)
    if work == "load":
        return ours.load, world.barrier
    if work == "blocking save":
        return ours.save, ours.keep_newest
    return lambda: ensure_committed(ours.start_save()), ours.keep_newest


def _dcp(world: World, setup: Setup, state: State, work: Work) -> tuple[Callable[[], object], Callable[[], object]]:
    path, held = setup.directory / "dcp", state.state_dict()
    if work == "load":
        return lambda: dcp.load(held, checkpoint_id=path), world.barrier
    if work == "blocking save":
        return lambda: dcp.save(held, checkpoint_id=path), lambda: remove(world, path)
    return lambda: _wait(dcp.async_save(held, checkpoint_id=path)), lambda: remove(world, path)


def _wait(response: Any) -> None:
    response.result()


SCENARIO = Scenario("host-memory", "Extra host memory", run)
