"""torch_checkpointing as a contender."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.contenders.torch_checkpointing import FSYNC, NAME, NOTE, Manager
from benchmarks.series import Entrant
from benchmarks.states import State
from benchmarks.system import remove
from benchmarks.turns import Contender
from benchmarks.world import World


@contextmanager
def tc_save(world: World, state: State, directory: Path) -> Iterator[Contender]:
    """Its synchronous save; the path's parent must exist, the path must not."""
    manager, path = Manager(world, state, is_async=False), directory / "torch-checkpointing"

    def work() -> dict[str, float]:
        state.advance()
        seconds = world.timed(lambda: manager.save(path))
        remove(world, path)
        return {"save_s": seconds}

    try:
        yield Contender(Entrant(NAME, "peer", FSYNC, NOTE), work)
    finally:
        manager.close()
