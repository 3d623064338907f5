"""Jobs for loads that ranks share: a state in any layout, what each rank reads of the shard files, and ranks that fall away."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement, _StridedShard

import dckpt
from dckpt.errors import DckptError
from dckpt.storage.posix import Posix
from tests.support.damage_jobs import reads_through

# A few megabytes, uneven ones, small ones, and one with rows longer than a block of checksums.
SHAPES = ((1024, 1024), (515, 1030), (3, 5, 1001), (24, 65_536), (1_000_003,), (7,))
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def state_bytes() -> int:
    return sum(full_tensor(number, 0).nbytes for number in range(len(SHAPES)))


def full_tensor(number: int, seed: int) -> torch.Tensor:
    """The same on every rank: any bits, also those of NaNs."""
    dtype = DTYPES[number % len(DTYPES)]
    count = torch.Size(SHAPES[number]).numel() * dtype.itemsize
    data = torch.randint(
        0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(97 * seed + number)
    )
    return data.view(dtype).view(SHAPES[number])


def layout_of(layout: str, world_size: int) -> tuple[DeviceMesh | None, list[Placement]]:
    half = world_size // 2
    if layout == "replicas":
        return None, []
    if layout in ("rows", "columns"):
        return init_device_mesh("cpu", (world_size,)), [Shard(0 if layout == "rows" else 1)]
    mesh = init_device_mesh("cpu", (4, world_size // 4) if layout == "four replicas of rows" else (half, 2))
    return mesh, {
        "four replicas of rows": [Replicate(), Shard(0)],
        "rows and columns": [Shard(0), Shard(1)],
        "strided": [_StridedShard(0, split_factor=2), Shard(0)],
    }[layout]


def local_part(full: torch.Tensor, mesh: DeviceMesh, placements: list[Placement]) -> torch.Tensor:
    sizes, offsets = compute_local_shape_and_global_offset(full.shape, mesh, placements)
    return full[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]


def make_tensors(layout: str, world_size: int, seed: int) -> dict[str, torch.Tensor]:
    mesh, placements = layout_of(layout, world_size)
    found = {}
    for number in range(len(SHAPES)):
        full = full_tensor(number, seed)
        if mesh is None:
            found[f"t{number}"] = full
            continue
        fitting = [Shard(0) if p.is_shard() and p.dim >= full.dim() else p for p in placements]
        part = local_part(full, mesh, fitting).clone()
        found[f"t{number}"] = DTensor.from_local(
            part, mesh, fitting, run_check=False, shape=full.shape, stride=full.stride()
        )
    return found


def bits(tensor: torch.Tensor) -> torch.Tensor:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.contiguous().view(-1).view(torch.uint8)


def state_of(tensors: dict[str, torch.Tensor]) -> dckpt.TrainState:
    return dckpt.TrainState(model=nn.Module(), extra={"tensors": tensors})


@dataclass
class CountedReads(Posix):
    """Counts the bytes read of shard files; at the read number `strike_at` of them this process gets `signal_number`."""

    strike_at: int = 0
    signal_number: int = 0
    nbytes: int = 0
    reads: int = 0
    _shards: set[int] = field(default_factory=set)

    def open(self, path: str, flags: int, *, dir_fd: int | None = None) -> int:
        fd = super().open(path, flags, dir_fd=dir_fd)
        if path.endswith(".safetensors"):
            self._shards.add(fd)
        return fd

    def close(self, fd: int) -> None:
        self._shards.discard(fd)
        super().close(fd)

    def pread_into(self, fd: int, target: memoryview, offset: int) -> int:
        return self._count(fd, super().pread_into(fd, target, offset))

    def preadv(self, fd: int, targets: Sequence[memoryview], offset: int, *, flags: int = 0) -> int:
        return self._count(fd, super().preadv(fd, targets, offset, flags=flags))

    def _count(self, fd: int, count: int) -> int:
        if fd in self._shards:
            self.reads += 1
            self.nbytes += count
            if self.reads == self.strike_at:
                os.kill(os.getpid(), self.signal_number)
        return count


@contextmanager
def kernel_without_anonymous_files() -> Iterator[None]:
    """Pieces then travel by TCP, as between hosts."""

    def refuse(*_: Any) -> int:
        raise OSError(38, os.strerror(38))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "memfd_create", refuse)
        yield


@dataclass(frozen=True)
class Loaded:
    """What one rank saw of a load."""

    is_equal: bool = False
    bytes_read: int = 0
    step: int | None = None
    error: str = ""
    seconds: float = 0.0


def save_tensors(rank: int, world_size: int, root: str, layout: str, steps: int = 1) -> None:
    """Saves steps 1 to `steps`, each with the numbers of its own seed."""
    tensors = make_tensors(layout, world_size, 0)
    state = state_of(tensors)
    with dckpt.Checkpointer(root, deadline_s=30, signals=()) as checkpointer:
        checkpointer.resume(state)
        for step in range(1, steps + 1):
            for name, tensor in make_tensors(layout, world_size, step).items():
                bits(tensors[name]).copy_(bits(tensor))
            pending = checkpointer.save(state, step=step, blocking=True)
            assert pending.outcome == "committed", pending.error


def load_tensors(rank: int, world_size: int, root: str, layout: str, by_tcp: bool = False) -> Loaded:
    """Resumes into a state of other numbers; whether every bit is as saved."""
    posix = CountedReads()
    tensors = make_tensors(layout, world_size, 99)
    if by_tcp:
        with kernel_without_anonymous_files():
            return _resume(root, layout, world_size, tensors, posix, deadline_s=30)
    return _resume(root, layout, world_size, tensors, posix, deadline_s=30)


def load_and_fall(
    rank: int, world_size: int, root: str, victim: int, signal_name: str, signals: str, deadline_s: float, by_tcp: bool
) -> Loaded:
    """Replicas load; the victim is struck in the middle of its reads. Every other rank leaves a mark when it is done."""
    posix = CountedReads(strike_at=2 if rank == victim else 0, signal_number=getattr(signal, signal_name))
    tensors = make_tensors("replicas", world_size, 99)
    dist.barrier()  # the short deadline is not for the start of processes
    try:
        if by_tcp:
            with kernel_without_anonymous_files():
                return _resume(root, "replicas", world_size, tensors, posix, deadline_s=deadline_s)
        return _resume(root, "replicas", world_size, tensors, posix, deadline_s=deadline_s)
    finally:
        Path(signals, str(rank)).touch()


def _resume(
    root: str, layout: str, world_size: int, tensors: dict[str, torch.Tensor], posix: CountedReads, *, deadline_s: float
) -> Loaded:
    with reads_through(posix):
        checkpointer = dckpt.Checkpointer(root, deadline_s=deadline_s, signals=())
    started_s = time.monotonic()
    try:
        report = checkpointer.resume(state_of(tensors))
    except DckptError as error:
        text = f"{type(error).__name__}: {error}"
        return Loaded(error=text, bytes_read=posix.nbytes, seconds=time.monotonic() - started_s)
    finally:
        checkpointer.close()
    assert report is not None
    expected = make_tensors(layout, world_size, report.step or 0)
    is_equal = all(torch.equal(bits(tensors[name]), bits(tensor)) for name, tensor in expected.items())
    return Loaded(is_equal, posix.nbytes, report.step)
