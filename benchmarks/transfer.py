"""Saves a state on some ranks and loads it on others: the two jobs that several scenarios are made of."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed.checkpoint as dcp

from benchmarks import states
from benchmarks.contenders import loads
from benchmarks.contenders.dckpt_run import DckptRun
from benchmarks.contenders.peers import ELSEWHERE
from benchmarks.figures import Line, Value
from benchmarks.lab import Lab
from benchmarks.machine import file_system
from benchmarks.raw import RawFile, takes_direct
from benchmarks.series import Series
from benchmarks.setup import Setup
from benchmarks.states import State
from benchmarks.turns import entrants, take_turns
from benchmarks.world import World

Kind = Literal["fsdp", "ddp", "hsdp", "columns"]

LAYOUTS: dict[Kind, str] = {
    "fsdp": "FSDP2",
    "ddp": "DDP",
    "hsdp": "HSDP",
    "columns": "columns (tensor parallel)",
}
HSDP_SHARDS = 2  # ranks of each replica


@dataclass(frozen=True, slots=True)
class Layout:
    """How a state lies over ranks."""

    kind: Kind
    ranks: int

    def __str__(self) -> str:
        replicas = f" ({self.ranks // HSDP_SHARDS} replicas)" if self.kind == "hsdp" else ""
        return f"{LAYOUTS[self.kind]} on {self.ranks} ranks{replicas}"


@dataclass(frozen=True, slots=True)
class Saved:
    """What was saved: needed_bytes is the state counted once."""

    layout: Layout
    setup: Setup
    needed_bytes: int
    fingerprint: int
    tensors: int


def build(kind: Kind, world: World, megabytes: int) -> State:
    """The same values whatever the layout."""
    if kind == "fsdp":
        return states.few_large(world, megabytes)
    if kind == "ddp":
        return states.replicated(world, megabytes)
    if kind == "hsdp":
        return states.hybrid(world, megabytes, replicas=world.size // HSDP_SHARDS)
    return states.columns(world, megabytes, world_dim=1)


def save(lab: Lab, layout: Layout, setup: Setup) -> Saved:
    """Saves with dckpt and with dcp.save."""
    needed, fingerprint, tensors = lab.run(layout.ranks, save_job, layout.kind, setup)
    return Saved(layout, setup, needed, fingerprint, tensors)


def save_job(world: World, kind: Kind, setup: Setup) -> tuple[int, int, int]:
    """(bytes, fingerprint, number of tensors) of what both saved."""
    world.on_rank_0(lambda: setup.directory.mkdir(parents=True, exist_ok=True))
    state = build(kind, world, setup.megabytes)
    run = DckptRun(world, setup.root("dckpt"), state)
    run.save()
    run.close()
    if setup.storage is None:
        dcp.save(state.state_dict(), checkpoint_id=setup.directory / "dcp")
    return state.unique_bytes(world), state.fingerprint(world), len(state.named_local_tensors())


def load(lab: Lab, saved: Saved, layout: Layout, *, name: str, title: str, lines: tuple[Line, ...]) -> dict[str, Any]:
    """The series of loading what was saved into another layout."""
    record: dict[str, Any] = lab.run(layout.ranks, load_job, saved, layout.kind, (name, title, lines))
    return record


def load_job(world: World, saved: Saved, kind: Kind, told: tuple[str, str, tuple[Line, ...]]) -> dict[str, Any]:
    """dckpt, dcp.load and the raw limit load in turns; what they read is counted over the whole job."""
    name, title, lines = told
    setup, directory = saved.setup, saved.setup.directory
    skipped: dict[str, str] = {}
    with ExitStack() as stack:
        state = build(kind, world, setup.megabytes)
        ours = DckptRun(world, setup.root("dckpt"), state)
        stack.callback(ours.close)
        contenders = [loads.dckpt_load(world, ours, directory / "dckpt")]
        if setup.storage is None:
            contenders.append(loads.dcp_load(world, state, directory / "dcp"))
        else:
            skipped["dcp.load"] = ELSEWHERE
        for contender in contenders:
            loads.ensure_whole(world, state, contender.work, saved.fingerprint, contender.entrant.name)
        if setup.storage is not None:
            skipped["raw O_DIRECT read"] = ELSEWHERE
        elif takes_direct(directory):
            path = directory / f"raw-{world.size}"
            world.on_rank_0(lambda: path.mkdir(exist_ok=True))
            raw = RawFile(path / str(world.rank), saved.needed_bytes // world.size, is_direct=True)
            stack.enter_context(raw).write()
            contenders.append(loads.raw_cold_read(world, raw))
        else:
            skipped["raw O_DIRECT read"] = "this file system takes no O_DIRECT"
        rounds = take_turns(world, contenders, setup.rounds)
    return Series(
        name=name,
        title=title,
        conditions={
            "saved": str(saved.layout),
            "loaded": str(Layout(kind, world.size)),
            "ranks": world.size,
            "bytes": saved.needed_bytes,
            "tensors": saved.tensors,
            "file_system": file_system(directory),
            "counted": "dckpt by LoadResult.bytes_read where it exists, else and for peers by the kernel (rchar)",
        },
        entrants=entrants(contenders),
        rounds=tuple(rounds),
        lines=lines,
        skipped=skipped,
    ).to_json()


def read_once(saved: Saved) -> Line:
    """The line on what the whole job reads."""
    needed = float(saved.needed_bytes)
    return Line("bytes read by the job / bytes needed", "at most", 1.05, Value("dckpt", "read_bytes"), needed)


def faster_than_dcp(target: float) -> Line:
    """The line on the warm load beside `dcp.load`."""
    return Line("warm speed / dcp.load", "at least", target, Value("dcp.load", "warm_s"), Value("dckpt", "warm_s"))
