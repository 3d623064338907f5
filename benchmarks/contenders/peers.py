"""Which peers take part in a comparison, and why the others do not."""

from __future__ import annotations

from contextlib import ExitStack

from benchmarks.contenders import loads, saves, stalls, torch_checkpointing
from benchmarks.setup import Setup
from benchmarks.states import State
from benchmarks.turns import Contender
from benchmarks.world import World

ELSEWHERE = "measured on file systems only; --storage names another place"
NO_GPU = "pinned memory needs a GPU"
THREADS = (1, 2)


def save_peers(world: World, state: State, setup: Setup, stack: ExitStack, skipped: dict[str, str]) -> list[Contender]:
    """All that save and wait. What cannot is noted in `skipped`; what must be closed is on the stack."""
    if setup.storage is not None:
        skipped["peers"] = ELSEWHERE
        return []
    found = [saves.dcp_save(world, state, setup.directory, threads) for threads in THREADS]
    found += [saves.torch_save(world, state, setup.directory), saves.safetensors_save(world, state, setup.directory)]
    if torch_checkpointing.is_installed():
        manager = torch_checkpointing.Manager(world, state, is_async=False)
        stack.callback(manager.close)
        found.append(saves.torch_checkpointing_save(world, state, setup.directory, manager))
    else:
        skipped[torch_checkpointing.NAME] = torch_checkpointing.MISSING
    return found


def async_peers(world: World, state: State, setup: Setup, stack: ExitStack, skipped: dict[str, str]) -> list[Contender]:
    """All that save in the background."""
    if setup.storage is not None:
        skipped["peers"] = ELSEWHERE
        return []
    variants: list[stalls.Variant] = ["thread", "thread, reused staging", "process"]
    if world.device.type == "cuda":
        variants.append("thread, pinned staging")
    else:
        skipped["dcp.async_save, thread, pinned staging"] = NO_GPU
    found = [stalls.dcp_async(world, state, setup.directory, variant, stack) for variant in variants]
    if torch_checkpointing.is_installed():
        manager = torch_checkpointing.Manager(world, state, is_async=True)
        stack.callback(manager.close)
        found.append(stalls.torch_checkpointing_async(world, state, setup.directory, manager))
    else:
        skipped[torch_checkpointing.NAME] = torch_checkpointing.MISSING
    return found


def load_peers(world: World, state: State, setup: Setup, stack: ExitStack, skipped: dict[str, str]) -> list[Contender]:
    """All that load on the same ranks; each saves the state as it is now."""
    if setup.storage is not None:
        skipped["peers"] = ELSEWHERE
        return []
    loads.save_files(world, state, setup.directory)
    found = [
        loads.dcp_load(world, state, setup.directory / "dcp"),
        loads.torch_load(world, state, setup.directory),
        loads.safetensors_load(world, state, setup.directory),
    ]
    if torch_checkpointing.is_installed():
        path = setup.directory / "torch-checkpointing"
        manager = torch_checkpointing.Manager(world, state, is_async=False)
        stack.callback(manager.close)
        manager.save(path)
        found.append(loads.torch_checkpointing_load(world, manager, path))
    else:
        skipped[torch_checkpointing.NAME] = torch_checkpointing.MISSING
    return found
