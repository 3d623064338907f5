"""The ranks that measure together, as one of them sees them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class World:
    """This rank's place in an initialised process group, and how ranks measure together.

    device: where this rank's state lives. local_rank: its place on its node, of local_size ranks; rank 0 of each node looks
    after its caches.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    def barrier(self) -> None:
        """All ranks are here, and what they gave to their device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        dist.barrier()

    def timed(self, work: Callable[[], object]) -> float:
        """Seconds that the slowest rank takes for `work`, all of them starting together."""
        self.barrier()
        begin = time.perf_counter()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.slowest(time.perf_counter() - begin)

    def slowest(self, value: float) -> float:
        """The largest value of any rank, on every rank."""
        return self._reduced(value, dist.ReduceOp.MAX)

    def total(self, value: float) -> float:
        """The sum over the ranks, on every rank; exact for whole numbers below 2**53."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def _reduced(self, value: float, operation: Any) -> float:
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(tensor, op=operation)
        return float(tensor)

    def shared(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def on_rank_0(self, work: Callable[[], Any]) -> Any:
        """Runs `work` on rank 0 alone, between two barriers; its result is on every rank."""
        self.barrier()
        return self.shared(work() if self.rank == 0 else None)


def device_of(choice: str, local_rank: int) -> torch.device:
    """The device of this rank: its own GPU where there is one and the choice allows it."""
    if choice == "cpu" or not torch.cuda.is_available():
        if choice == "cuda":
            raise SystemExit("--device cuda: torch finds no GPU here")
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def join(rank: int, size: int, local_rank: int, local_size: int, rendezvous: str, choice: str) -> World:
    """Initialises the default process group and returns this rank's world.

    Ranks that share a GPU talk over gloo, which NCCL refuses.
    """
    torch.set_num_threads(1)
    device = device_of(choice, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "gloo"
    if device.type == "cuda":
        backend = "cpu:gloo,cuda:nccl" if local_size <= torch.cuda.device_count() else "cpu:gloo,cuda:gloo"
    dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=size)
    return World(rank, size, local_rank, local_size, device)


def join_given(choice: str) -> World:
    """The world that torchrun describes in the environment."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    rank, size, local_rank, local_size = (int(os.environ[name]) for name in names)
    return join(rank, size, local_rank, local_size, "env://", choice)
