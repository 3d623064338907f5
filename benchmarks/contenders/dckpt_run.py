"""One dckpt run as a contender: saves, loads, and what it moved."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import dckpt
from benchmarks.contenders.policies import ALL_SYNCED, COMMITTED
from benchmarks.series import Entrant
from benchmarks.states import State
from benchmarks.system import Counted, counted
from benchmarks.turns import Contender
from benchmarks.world import World

CLI_DEADLINE_S = 600


def command() -> str:
    """The installed `dckpt` program, that of this Python first."""
    beside = Path(sys.executable).with_name("dckpt")
    found = str(beside) if beside.exists() else shutil.which("dckpt")
    if found is None:
        raise RuntimeError("the command `dckpt` is not installed; pip install -e . makes it")
    return found


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `dckpt` and raises with its own words if it fails."""
    # Alone, also where this process is one of several that torchrun started.
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    ended = subprocess.run(
        [command(), *arguments], env=environment, capture_output=True, text=True, check=False, timeout=CLI_DEADLINE_S
    )
    if ended.returncode not in (0, 1):
        raise RuntimeError(f"dckpt {' '.join(arguments)} ended with {ended.returncode}: {ended.stderr or ended.stdout}")
    return ended


def has_command(name: str) -> bool:
    """Whether this version of the program has the subcommand."""
    ended = subprocess.run([command(), name, "--help"], capture_output=True, check=False, timeout=CLI_DEADLINE_S)
    return ended.returncode == 0


class DckptRun:
    """Saves and loads one state in one run; each save is another step."""

    def __init__(self, world: World, root: str, state: State, **options: Any) -> None:
        self._world, self._root = world, root
        self.checkpointer = dckpt.Checkpointer(root, signals=(), on_save_error="raise", **options)
        self._state = state.train_state()
        self._step = 0

    def start_save(self) -> dckpt.PendingSave:
        """Returns when the state may change again."""
        self._step += 1
        return self.checkpointer.save(self._state, step=self._step)

    def save(self) -> None:
        """Returns when the checkpoint is durable on every rank."""
        self._step += 1
        pending = self.checkpointer.save(self._state, step=self._step, blocking=True)
        ensure_committed(pending)

    def load(self) -> dckpt.LoadResult:
        """Loads the newest checkpoint into the state."""
        return self.checkpointer.load(self._state)

    def counted_load(self) -> Counted:
        """Loads, and says what this rank read: by dckpt's own count where it has one, else by the kernel's."""
        held: list[dckpt.LoadResult] = []
        moved = counted(lambda: held.append(self.load()))
        own = getattr(held[0], "bytes_read", None)
        return moved if own is None else Counted(int(own), moved.device_bytes, moved.written_bytes)

    def keep_newest(self) -> None:
        """Removes all checkpoints but the newest; not part of anyone's time."""
        self._world.barrier()
        if self._world.rank == 0:
            run_command("prune", self._root, "--last", "1", "--yes")
        self._world.barrier()

    def close(self) -> None:
        """Ends the run on this rank."""
        self.checkpointer.close()


def ensure_committed(pending: dckpt.PendingSave) -> None:
    """Waits; a save that did not commit is no measurement."""
    outcome = pending.wait()
    if outcome != "committed":
        raise RuntimeError(f"dckpt's save ended as {outcome}: {pending.error}")


def blocking_save(world: World, run: DckptRun, state: State) -> Contender:
    """`checkpointer.save(state, blocking=True)`."""

    def work() -> dict[str, float]:
        state.advance()
        seconds = world.timed(run.save)
        run.keep_newest()
        return {"save_s": seconds}

    return Contender(Entrant("dckpt", "dckpt", ALL_SYNCED, COMMITTED), work)
