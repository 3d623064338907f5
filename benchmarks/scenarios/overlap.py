"""What a save costs real training steps: with a core to spare for the writer, and with every core busy.

Each rank's training thread is pinned to one core. `save()` itself is called unpinned, because threads that it makes are
born with its cores.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from benchmarks import states
from benchmarks.contenders.dckpt_run import DckptRun, ensure_committed
from benchmarks.contenders.peers import ELSEWHERE
from benchmarks.contenders.policies import ALL_SYNCED, COMMITTED, FILES_SYNCED
from benchmarks.contenders.stalls import reused_stager
from benchmarks.figures import Line, Value
from benchmarks.lab import Lab, Scenario
from benchmarks.launch import NotHereError
from benchmarks.machine import cores, file_system
from benchmarks.series import Entrant, Series
from benchmarks.setup import Setup
from benchmarks.states import State
from benchmarks.system import remove
from benchmarks.training import Trainer, on_core
from benchmarks.turns import Contender, entrants, take_turns
from benchmarks.world import World

Cores = Literal["free", "busy"]
MOST_MEGABYTES = 600
STEP_S, QUICK_STEP_S = 0.7, 0.03
PLAIN_STEPS = 3
MOST_STEPS = 200
OVERLAP, PLAIN = "dckpt, overlap=True", "dckpt"


@dataclass(frozen=True, slots=True)
class Bench:
    """What trains, and on which core."""

    world: World
    state: State
    trainer: Trainer
    core: int


@dataclass(frozen=True, slots=True)
class Saving:
    """How one contender saves: start returns a handle, done looks at it, finish waits, clean makes room, untimed."""

    start: Callable[[], Any]
    done: Callable[[Any], bool]
    finish: Callable[[Any], object]
    clean: Callable[[], object]


def run(lab: Lab) -> list[dict[str, Any]]:
    """One rank beside a free core, and as many ranks as usual on as many cores."""
    found = []
    for name, ranks in (("free", 1), ("busy", lab.ranks)):
        if name == "free" and len(cores()) < 2:
            lab.told("  overlap, cores free: skipped: there is one core")
            continue
        try:
            found.append(lab.run(ranks, job, lab.setup.within(f"overlap-{name}"), name))
        except NotHereError as reason:
            lab.told(f"  overlap, cores {name}: skipped: {reason}")
    if not found:
        raise NotHereError("needs one rank, or all of them with a core each")
    return found


def job(world: World, setup: Setup, name: Cores) -> dict[str, Any]:
    """Each turn trains without a save, then with one until it is durable."""
    own_cores = cores()
    directory, skipped = setup.directory, {}
    world.on_rank_0(lambda: directory.mkdir(parents=True, exist_ok=True))
    with ExitStack() as stack:
        state = states.trainable(world, min(MOST_MEGABYTES, setup.megabytes))
        trainer = Trainer(world, state)
        core = own_cores[world.local_rank % len(own_cores)]
        with on_core(core):
            trainer.fit(QUICK_STEP_S if setup.quick else STEP_S)
        bench = Bench(world, state, trainer, core)
        contenders = [_ours(bench, setup, stack, is_overlapped=is_overlapped) for is_overlapped in (True, False)]
        if setup.storage is None:
            contenders += [_theirs(bench, setup, stack, is_reused=is_reused) for is_reused in (False, True)]
        else:
            skipped["peers"] = ELSEWHERE
        rounds = take_turns(world, contenders, setup.rounds)
        total = state.unique_bytes(world)
    return Series(
        name=name,
        title="Training steps and a save: one rank on one core, the other cores free"
        if name == "free"
        else f"Training steps and a save: {world.size} ranks on {len(own_cores)} cores",
        conditions={
            "ranks": world.size,
            "bytes": total,
            "cores": len(own_cores),
            "file_system": file_system(directory),
            "stall": "seconds in save() and in what keeps the next optimizer.step() waiting",
        },
        entrants=entrants(contenders),
        rounds=tuple(rounds),
        lines=_lines() if name == "free" else (),
        skipped=skipped,
    ).to_json()


def _lines() -> tuple[Line, ...]:
    during, plain = Value(OVERLAP, "step_during_s"), Value(OVERLAP, "plain_step_s")
    return (
        Line("stall in % of a step", "at most", 2.0, Value(OVERLAP, "stall_percent"), 1.0),
        Line("step while a save runs / step without", "at most", 1.10, during, plain),
    )


def _ours(bench: Bench, setup: Setup, stack: ExitStack, *, is_overlapped: bool) -> Contender:
    options = {"overlap": True} if is_overlapped else {}
    ours = DckptRun(bench.world, setup.root("overlapped" if is_overlapped else "dckpt"), bench.state, **options)
    stack.callback(ours.close)
    saving = Saving(ours.start_save, lambda pending: pending.done, ensure_committed, ours.keep_newest)
    entrant = Entrant(OVERLAP if is_overlapped else PLAIN, "dckpt", ALL_SYNCED, COMMITTED)
    return Contender(entrant, lambda: _measure(bench, saving))


def _theirs(bench: Bench, setup: Setup, stack: ExitStack, *, is_reused: bool) -> Contender:
    path, held = setup.directory / ("dcp-reused" if is_reused else "dcp"), bench.state.state_dict()
    options: dict[str, Any] = {"process_group": dist.new_group(backend="gloo")}
    if is_reused:
        stager = reused_stager(is_pinned=bench.world.device.type == "cuda")
        stack.callback(stager.close)
        options["async_stager"] = stager
    saving = Saving(
        lambda: dcp.async_save(held, checkpoint_id=path, **options),
        lambda future: future.done(),
        lambda future: future.result(),
        lambda: remove(bench.world, path),
    )
    name = "dcp.async_save, thread" + (", reused staging" if is_reused else "")
    return Contender(Entrant(name, "peer", FILES_SYNCED), lambda: _measure(bench, saving))


def _measure(bench: Bench, saving: Saving) -> dict[str, float]:
    world, trainer = bench.world, bench.trainer
    with on_core(bench.core):
        trainer.step()  # whatever the last turn left in the caches is not this contender's
        plain_s = statistics.median(trainer.step()[0] for _ in range(PLAIN_STEPS))
    world.barrier()
    handle, call_s = _timed_call(saving.start)
    trainer.watch_gate()
    steps: list[tuple[float, float]] = []
    with on_core(bench.core):
        # All ranks take the same number of steps: a step communicates.
        while not steps or (len(steps) < MOST_STEPS and world.total(not saving.done(handle))):
            steps.append(trainer.step())
    saving.finish(handle)
    saving.clean()
    stall_s = world.slowest(call_s + steps[0][1])
    plain_s = world.slowest(plain_s)
    return {
        "plain_step_s": plain_s,
        "step_during_s": world.slowest(statistics.fmean(seconds for seconds, _ in steps)),
        "stall_s": stall_s,
        "stall_percent": 100 * stall_s / plain_s,
        "steps_during": float(len(steps)),
    }


def _timed_call(work: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.perf_counter()
    result = work()
    return result, time.perf_counter() - begin


SCENARIO = Scenario("overlap", "Training while a save runs", run)
