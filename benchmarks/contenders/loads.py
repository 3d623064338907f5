"""Loads: dckpt, its peers and the limits. Each turn loads twice, first with nothing in the page cache, then with everything.

What is loaded was saved by the same contender before the rounds, and loaded once into zeroed tensors to see that it comes
back whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

from benchmarks import fio
from benchmarks.contenders.dckpt_run import DckptRun
from benchmarks.contenders.policies import NOTHING_WRITTEN
from benchmarks.contenders.torch_checkpointing import NAME, NOTE, Manager
from benchmarks.raw import RawFile
from benchmarks.series import Entrant
from benchmarks.states import State
from benchmarks.system import Counted, counted, forget, remember
from benchmarks.turns import Contender
from benchmarks.world import World

Load = Callable[[], Counted]


def cold_and_warm(world: World, directory: Path, load: Load, *, is_counted: bool = True) -> dict[str, float]:
    """Seconds of both loads; bytes that the job read in the warm one, and from the device in the cold one.

    is_counted: reads go through calls that are counted; those of mapped files do not.
    """
    forget(world, directory)
    moved: list[Counted] = []
    cold_s = world.timed(lambda: moved.append(load()))
    remember(world, directory)
    warm_s = world.timed(lambda: moved.append(load()))
    found = {"cold_s": cold_s, "warm_s": warm_s, "device_bytes": world.total(moved[0].device_bytes)}
    return found | ({"read_bytes": world.total(moved[1].read_bytes)} if is_counted else {})


def ensure_whole(world: World, state: State, load: Callable[[], object], expected: int, name: str) -> None:
    """Loads into zeroed tensors; an error if another state comes back than was saved."""
    state.clear()
    load()
    found = state.fingerprint(world)
    if found != expected:
        raise RuntimeError(f"{name} loaded another state than was saved: fingerprint {found}, expected {expected}")


def dckpt_load(world: World, run: DckptRun, directory: Path, name: str = "dckpt") -> Contender:
    """`checkpointer.load(state)` of the newest checkpoint of the run that lies in `directory`."""
    return Contender(
        Entrant(name, "dckpt", NOTHING_WRITTEN, "verifies every byte"),
        lambda: cold_and_warm(world, directory, run.counted_load),
    )


def dcp_load(world: World, state: State, path: Path) -> Contender:
    """`dcp.load` straight into the live tensors; the state dict is made beforehand and costs it nothing."""
    held = state.state_dict()

    def load() -> None:
        dcp.load(held, checkpoint_id=path)

    return Contender(
        Entrant("dcp.load", "peer", NOTHING_WRITTEN, "verifies nothing"),
        lambda: cold_and_warm(world, path, lambda: counted(load)),
    )


def torch_checkpointing_load(world: World, manager: Manager, path: Path) -> Contender:
    """torch_checkpointing into the live tensors."""
    return Contender(
        Entrant(NAME, "peer", NOTHING_WRITTEN, NOTE),
        lambda: cold_and_warm(world, path, lambda: counted(lambda: manager.load(path)), is_counted=False),
    )


def save_files(world: World, state: State, directory: Path) -> None:
    """What `dcp_load`, `torch_load` and `safetensors_load` read."""
    dcp.save(state.state_dict(), checkpoint_id=directory / "dcp")
    tensors = state.named_local_tensors()
    for path in (directory / "torch", directory / "safetensors"):
        os.makedirs(path, exist_ok=True)  # on every rank: whoever comes first makes it
    torch.save(tensors, directory / "torch" / str(world.rank))
    safetensors.torch.save_file(tensors, directory / "safetensors" / str(world.rank))
    world.barrier()


def torch_load(world: World, state: State, directory: Path) -> Contender:
    """`torch.load` of each rank's own file, and a copy into the live tensors."""
    path = directory / "torch"

    def load() -> None:
        found = torch.load(path / str(world.rank), weights_only=True, map_location="cpu")
        _copy(found, state)

    return Contender(
        Entrant("torch.load", "peer", NOTHING_WRITTEN, "same number of ranks only; verifies nothing"),
        lambda: cold_and_warm(world, path, lambda: counted(load)),
    )


def safetensors_load(world: World, state: State, directory: Path) -> Contender:
    """`safetensors.torch.load_file` of each rank's own file, and a copy into the live tensors."""
    path = directory / "safetensors"

    def load() -> None:
        _copy(safetensors.torch.load_file(path / str(world.rank)), state)

    return Contender(
        Entrant("safetensors", "peer", NOTHING_WRITTEN, "same number of ranks only; maps its file; verifies nothing"),
        lambda: cold_and_warm(world, path, lambda: counted(load), is_counted=False),
    )


def _copy(found: dict[str, torch.Tensor], state: State) -> None:
    with torch.no_grad():
        for name, tensor in state.named_local_tensors().items():
            tensor.copy_(found[name])


def raw_cold_read(world: World, raw: RawFile) -> Contender:
    """The cold limit by our own reader: each rank reads as many bytes as it needs, past the page cache."""

    def work() -> dict[str, float]:
        forget(world, raw.path.parent)
        return {"cold_s": world.timed(lambda: raw.read(is_direct=True))}

    return Contender(
        Entrant("raw O_DIRECT read", "limit", NOTHING_WRITTEN, "own reader, 8 MiB blocks, 4 in flight a rank"), work
    )


def raw_warm_read(world: World, raw: RawFile) -> Contender:
    """The warm limit: each rank copies as many bytes as it needs from the page cache into warm memory."""

    def work() -> dict[str, float]:
        raw.read(is_direct=False)
        return {"warm_s": world.timed(lambda: raw.read(is_direct=False))}

    return Contender(Entrant("raw pread", "limit", NOTHING_WRITTEN, "from the page cache into warm memory"), work)


def fio_read(world: World, state: State, directory: Path) -> Contender:
    """The cold limit by fio, whose files are written here, once."""
    path = directory / "fio"
    world.on_rank_0(lambda: os.makedirs(path, exist_ok=True))
    world.on_rank_0(lambda: fio.seconds(path, world.size, state.local_bytes, "write"))

    def work() -> dict[str, float]:
        forget(world, path)
        seconds: float = world.on_rank_0(lambda: fio.seconds(path, world.size, state.local_bytes, "read"))
        return {"cold_s": seconds}

    return Contender(Entrant("fio", "limit", NOTHING_WRITTEN, "direct=1, libaio, the same blocks"), work)
