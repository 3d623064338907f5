"""Asynchronous saves: how long each call keeps the training loop, and how long until the bytes are durable.

`stall_s` ends when the state may change again; `durable_s` when the slowest rank knows its save to be finished.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from benchmarks.contenders.dckpt_run import DckptRun, ensure_committed
from benchmarks.contenders.policies import ALL_SYNCED, COMMITTED, FILES_SYNCED, FILES_SYNCED_BY_US, NOTHING_WRITTEN
from benchmarks.contenders.torch_checkpointing import NAME, NOTE, Manager
from benchmarks.series import Entrant
from benchmarks.states import State
from benchmarks.system import remove
from benchmarks.turns import Contender
from benchmarks.world import World

Variant = Literal["thread", "process", "thread, reused staging", "thread, pinned staging"]

NOTES: dict[Variant, str] = {
    "thread": "as it comes: new staging memory for each save",
    "process": "writes in a process of its own; new staging memory for each save",
    "thread, reused staging": "one DefaultStager for all saves, so that its memory is warm",
    "thread, pinned staging": "one DefaultStager for all saves, pinned memory, non-blocking copies",
}


def stalled(world: World, start: Callable[[], Any], finish: Callable[[Any], object]) -> dict[str, float]:
    """Times `start` (until the state may change) and `finish` (until durable), each for the slowest rank."""
    world.barrier()
    begin = time.perf_counter()
    handle = start()
    if world.device.type == "cuda":
        torch.cuda.current_stream(world.device).synchronize()
    stall_s = time.perf_counter() - begin
    finish(handle)
    durable_s = time.perf_counter() - begin
    return {"stall_s": world.slowest(stall_s), "durable_s": world.slowest(durable_s)}


def plain_copy(world: World, state: State) -> Contender:
    """The limit: the same bytes copied, tensor by tensor, into memory that was touched (and on GPUs pinned) before."""
    is_cuda = world.device.type == "cuda"
    pairs = [
        (torch.zeros(tensor.shape, dtype=tensor.dtype, pin_memory=is_cuda), tensor)
        for tensor in state.named_local_tensors().values()
    ]

    def copy() -> None:
        for target, source in pairs:
            target.copy_(source, non_blocking=is_cuda)

    def work() -> dict[str, float]:
        state.advance()
        return {"stall_s": world.timed(copy)}

    return Contender(Entrant("copy into warm memory", "limit", NOTHING_WRITTEN, "tensor by tensor, one thread"), work)


def dckpt_async(world: World, run: DckptRun, state: State) -> Contender:
    """`checkpointer.save(state)`."""

    def work() -> dict[str, float]:
        state.advance()
        found = stalled(world, run.start_save, ensure_committed)
        run.keep_newest()
        return found

    return Contender(Entrant("dckpt", "dckpt", ALL_SYNCED, COMMITTED), work)


def dcp_async(world: World, state: State, directory: Path, variant: Variant, stack: ExitStack) -> Contender:
    """`dcp.async_save` of a state dict that was made beforehand."""
    path, held = directory / f"dcp-{variant.replace(', ', '-').replace(' ', '-')}", state.state_dict()
    options: dict[str, Any] = {"process_group": dist.new_group(backend="gloo")}
    if variant == "process":
        options = {"async_checkpointer_type": AsyncCheckpointerType.PROCESS}
    elif variant != "thread":
        stager = reused_stager(is_pinned=variant == "thread, pinned staging")
        stack.callback(stager.close)
        options["async_stager"] = stager
    entrant = Entrant(f"dcp.async_save, {variant}", "peer", FILES_SYNCED, NOTES[variant])

    def start() -> Future[Any]:
        found = dcp.async_save(held, checkpoint_id=path, **options)
        assert isinstance(found, Future)  # none of these stagers stages in the background
        return found

    return _peer(world, state, entrant, path, start)


def torch_checkpointing_async(world: World, state: State, directory: Path, manager: Manager) -> Contender:
    """Its asynchronous save, staged before the call returns."""
    path = directory / "torch-checkpointing"
    entrant = Entrant(NAME, "peer", FILES_SYNCED_BY_US, f"writes in a process of its own, shared memory; {NOTE}")
    return _peer(world, state, entrant, path, lambda: manager.save(path))


def _peer(world: World, state: State, entrant: Entrant, path: Path, start: Callable[[], Future[Any]]) -> Contender:
    def work() -> dict[str, float]:
        state.advance()
        found = stalled(world, start, lambda future: future.result())
        remove(world, path)
        return found

    return Contender(entrant, work)


def reused_stager(*, is_pinned: bool) -> DefaultStager:
    """A stager that keeps its memory from save to save."""
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=is_pinned,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=is_pinned,
        )
    )
