"""Where not bytes but tensors cost: 5,000 of them of 1 KB, whole on every rank, and sharded with 1 KB on every rank."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from benchmarks import states
from benchmarks.contenders import peers
from benchmarks.contenders.dckpt_run import DckptRun, blocking_save
from benchmarks.figures import Line, Value
from benchmarks.lab import Lab, Scenario
from benchmarks.machine import file_system
from benchmarks.series import Series
from benchmarks.setup import Setup
from benchmarks.system import files_of
from benchmarks.turns import Contender, entrants, take_turns
from benchmarks.world import World

Kind = Literal["whole", "sharded"]
KINDS: dict[Kind, str] = {"whole": "whole on every rank (DDP)", "sharded": "a shard of 1 KB on every rank (FSDP2)"}
COUNT, QUICK_COUNT = 5000, 100
TENSOR_BYTES = 1024
OWN = Value("dckpt", "save_s")


def run(lab: Lab) -> list[dict[str, Any]]:
    """A series for whole tensors and one for shards."""
    return [lab.run(lab.ranks, job, lab.setup.within(f"many-small-{kind}"), kind) for kind in KINDS]


def job(world: World, setup: Setup, kind: Kind) -> dict[str, Any]:
    """Seconds of each save, and the bytes that a checkpoint takes."""
    directory = setup.directory
    world.on_rank_0(lambda: directory.mkdir(parents=True, exist_ok=True))
    skipped: dict[str, str] = {}
    with ExitStack() as stack:
        build = states.many_whole if kind == "whole" else states.many_sharded
        state = build(world, QUICK_COUNT if setup.quick else COUNT, TENSOR_BYTES)
        ours = DckptRun(world, setup.root("dckpt"), state)
        stack.callback(ours.close)
        contenders = [
            _with_size(world, blocking_save(world, ours, state), directory / "dckpt", setup),
            *peers.save_peers(world, state, setup, stack, skipped),
        ]
        rounds = take_turns(world, contenders, setup.rounds)
        total = state.unique_bytes(world)
    return Series(
        name=kind,
        title=f"Blocking save of {len(state.named_local_tensors()):,} tensors of 1 KB, {KINDS[kind]}",
        conditions={
            "ranks": world.size,
            "bytes": total,
            "tensors": len(state.named_local_tensors()),
            "file_system": file_system(directory),
        },
        entrants=entrants(contenders),
        rounds=tuple(rounds),
        lines=(
            Line("speed / dcp.save, 1 thread", "at least", 5, Value("dcp.save, 1 thread", "save_s"), OWN),
            Line("speed / dcp.save, 2 threads", "at least", 5, Value("dcp.save, 2 threads", "save_s"), OWN),
            Line("bytes of all files / bytes of tensors", "at most", 1.1, Value("dckpt", "file_bytes"), total),
        ),
        skipped=skipped,
    ).to_json()


def _with_size(world: World, contender: Contender, root: Path, setup: Setup) -> Contender:
    """The same contender, which also says how large the one checkpoint is that its turn leaves."""
    if setup.storage is not None:
        return contender  # only what lies on a file system can be listed here

    def work() -> dict[str, float]:
        found = contender.work()
        checkpoint = world.on_rank_0(lambda: sum(path.stat().st_size for path in files_of(_only_step(root))))
        return found | {"file_bytes": float(checkpoint)}

    return Contender(contender.entrant, work)


def _only_step(root: Path) -> Path:
    (step,) = root.glob("step-*")
    return step


SCENARIO = Scenario("many-small", "Blocking save of 5,000 small tensors", run)
