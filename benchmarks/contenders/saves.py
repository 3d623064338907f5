"""The peers of a blocking save, and its limits. Each turn saves into a new directory and removes it afterwards, untimed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

from benchmarks import fio
from benchmarks.contenders.policies import FILES_SYNCED, FILES_SYNCED_BY_US, NOT_ATOMIC, RAW_SYNCED
from benchmarks.contenders.torch_checkpointing import NAME, NOTE, Manager
from benchmarks.raw import RawFile
from benchmarks.series import Entrant
from benchmarks.states import State
from benchmarks.system import remove, sync_file
from benchmarks.turns import Contender
from benchmarks.world import World


def _into_new_directory(world: World, state: State, path: Path, save: Callable[[], object]) -> dict[str, float]:
    state.advance()
    world.on_rank_0(lambda: path.mkdir(parents=True))
    seconds = world.timed(save)
    remove(world, path)
    return {"save_s": seconds}


def dcp_save(world: World, state: State, directory: Path, threads: int) -> Contender:
    """`dcp.save`, with its default of fsyncing each file. The state dict is made beforehand and costs it nothing."""
    path, held = directory / f"dcp-{threads}", state.state_dict()

    def save() -> None:
        dcp.save(held, storage_writer=dcp.FileSystemWriter(path, thread_count=threads))

    name = f"dcp.save, {threads} thread{'s' if threads > 1 else ''}"
    note = f"{NOT_ATOMIC}; plans anew each time"
    return Contender(Entrant(name, "peer", FILES_SYNCED, note), lambda: _into_new_directory(world, state, path, save))


def torch_save(world: World, state: State, directory: Path) -> Contender:
    """`torch.save` of each rank's own tensors into a file of its own."""
    path, tensors = directory / "torch-save", state.tensors_to_write(world)

    def save() -> None:
        with open(path / f"{world.rank}.pt", "wb") as file:
            torch.save(tensors, file)
            file.flush()
            os.fsync(file.fileno())

    return Contender(
        Entrant("torch.save", "peer", FILES_SYNCED_BY_US, f"a file per rank; cannot reshard; {NOT_ATOMIC}"),
        lambda: _into_new_directory(world, state, path, save),
    )


def safetensors_save(world: World, state: State, directory: Path) -> Contender:
    """`safetensors.torch.save_file` of each rank's own tensors into a file of its own."""
    path, tensors = directory / "safetensors", state.tensors_to_write(world)

    def save() -> None:
        target = path / f"{world.rank}.safetensors"
        safetensors.torch.save_file(tensors, target)
        sync_file(target)

    return Contender(
        Entrant("safetensors", "peer", FILES_SYNCED_BY_US, f"a file per rank; cannot reshard; {NOT_ATOMIC}"),
        lambda: _into_new_directory(world, state, path, save),
    )


def torch_checkpointing_save(world: World, state: State, directory: Path, manager: Manager) -> Contender:
    """Its synchronous save, which renames its own temporary directory to the path."""
    path = directory / "torch-checkpointing"

    def work() -> dict[str, float]:
        state.advance()
        seconds = world.timed(lambda: manager.save(path))
        remove(world, path)
        return {"save_s": seconds}

    return Contender(Entrant(NAME, "peer", FILES_SYNCED_BY_US, NOTE), work)


def raw_write(world: World, state: State, raw: RawFile, name: str) -> Contender:
    """The limit by our own writer: each rank writes as many bytes as it holds into a new file, and fsyncs it."""
    path = raw.path.parent
    return Contender(
        Entrant(name, "limit", RAW_SYNCED, "own writer, 8 MiB blocks, 4 in flight a rank"),
        lambda: _into_new_directory(world, state, path, raw.write),
    )


def fio_write(world: World, state: State, directory: Path) -> Contender:
    """The limit by fio, of as many jobs and bytes as there are ranks."""
    path = directory / "fio"

    def work() -> dict[str, float]:
        path.mkdir(exist_ok=True)
        return {"save_s": fio.seconds(path, world.size, state.local_bytes, "write")}

    def turn() -> dict[str, float]:
        found: dict[str, float] = world.on_rank_0(work)
        remove(world, path)
        return found

    return Contender(Entrant("fio", "limit", RAW_SYNCED, "direct=1, libaio, the same blocks"), turn)
