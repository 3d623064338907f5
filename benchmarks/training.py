"""Real training steps of a chosen length, and the cores that they run on."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks.states import State
from benchmarks.world import World

PROBES = (32, 256)  # rows of the batches that the length of a step is learned from
MOST_ROWS = 16384


class Trainer:
    """Forward, backward and AdamW over random rows; gradients keep their memory from step to step."""

    def __init__(self, world: World, state: State) -> None:
        assert state.optimizer is not None
        self._world, self._model, self._optimizer = world, state.model, state.optimizer
        self._width = next(iter(state.model.parameters())).shape[-1]
        self._rows = self._new_rows(PROBES[0])
        self._gate_s = 0.0
        self._step_began = 0.0
        self._hook = self._optimizer.register_step_pre_hook(lambda *_: self._note_gate())

    def _new_rows(self, count: int) -> torch.Tensor:
        return torch.randn(count, self._width, device=self._world.device)

    def watch_gate(self) -> None:
        """From now on the wait of hooks that others put before the optimizer's step is seen; call after each of them."""
        self._hook.remove()
        self._hook = self._optimizer.register_step_pre_hook(lambda *_: self._note_gate())

    def _note_gate(self) -> None:
        self._gate_s = time.perf_counter() - self._step_began

    def step(self) -> tuple[float, float]:
        """(seconds of the step, of these seconds that hooks kept the optimizer waiting) on this rank."""
        begin = time.perf_counter()
        self._model(self._rows).square().mean().backward()
        self._step_began = time.perf_counter()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=False)
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)
        return time.perf_counter() - begin, self._gate_s

    def fit(self, seconds: float) -> None:
        """Chooses the batch so that a step takes about so long; the length is taken as linear in the rows."""
        lengths = []
        for rows in PROBES:
            self._rows = self._new_rows(rows)
            self.step()
            lengths.append(self._world.slowest(min(self.step()[0] for _ in range(2))))
        per_row = max(1e-9, (lengths[1] - lengths[0]) / (PROBES[1] - PROBES[0]))
        fitting = PROBES[0] + (seconds - lengths[0]) / per_row
        self._rows = self._new_rows(int(max(PROBES[0], min(MOST_ROWS, fitting))))
        self.step()


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """The calling thread runs on this core alone, and every other thread of the process where it likes.

    A thread is born with its maker's cores, hence the second half.
    """
    everywhere = os.sched_getaffinity(0)
    own = str(os.getpid())  # the main thread's id
    for thread in os.listdir("/proc/self/task"):
        if thread != own:
            _let_run(int(thread), everywhere)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, everywhere)


def _let_run(thread: int, cores: set[int]) -> None:
    try:
        os.sched_setaffinity(thread, cores)
    except ProcessLookupError:
        return  # it ended since it was listed
