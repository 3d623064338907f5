"""Random streams for people's own loops: kept and put back as one object, or keyed by what is computed inside."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from dckpt.errors import ConfigError
from dckpt.format.streams import CUDA_STATE, MT_WORDS, mt_words, slot_key, torch_cpu_state
from dckpt.format.values import JsonValue
from dckpt.state.rng import capture_rng, restore_rng


@dataclass(frozen=True, slots=True)
class RngState:
    """Where the random streams of this process stand: Python, NumPy, torch CPU, every used CUDA device, own generators.

    `streams`: stream -> state, plain JSON without code. DTensor's random operations draw from the device's stream, which is
    among them. `TrainState` captures all of this by itself; this is for loops and tests without one.
    """

    streams: Mapping[str, JsonValue]

    @classmethod
    def capture(cls, generators: Mapping[str, Any] | None = None) -> RngState:
        """The streams as they stand; none moves. `generators`: named torch or numpy generators."""
        return cls(capture_rng(generators))

    def restore(self, generators: Mapping[str, Any] | None = None) -> None:
        """Put every stream back. `ConfigError`, before any is touched, if this process lacks one of them."""
        restore_rng(self.streams, generators)


class SlotProgress(Protocol):
    """What `rng_slot` asks a `TrainProgress`."""

    step: int
    micro_step: int
    batch: Any


@contextmanager
def rng_slot(
    progress: SlotProgress, *, seed: int, micro_batch: int | None = None, name: str = "train"
) -> Iterator[None]:
    """Inside, the global random streams depend on the micro-batch that is computed, not on who computes it or what ran before.

    They begin at a key of (seed, step, `micro_batch`, name), and afterwards stand where they stood before. `micro_batch`
    is the number of the micro-batch in the step over all ranks; left out, `micro_step x ranks + rank`, which fits a loop in
    which rank r takes the micro-batches r, r + ranks, ... of a step. So with one micro-batch size its dropout masks and its
    augmentation are the same on any number of ranks. Put the forward inside; two slots of one micro-batch need two names.
    """
    if type(seed) is not int or seed < 0:
        raise ConfigError(f"rng_slot(seed={seed!r}): expected a whole number of at least 0, the same on every rank")
    number = _micro_batch_of(progress) if micro_batch is None else micro_batch
    if type(number) is not int or number < 0:
        raise ConfigError(f"rng_slot(micro_batch={micro_batch!r}): expected a whole number of at least 0")
    held = _Streams.held()
    _Streams.of_slot(name, seed=seed, step=progress.step, micro_batch=number, like=held).set()
    try:
        yield
    finally:
        held.set()


def _micro_batch_of(progress: SlotProgress) -> int:
    is_group = dist.is_available() and dist.is_initialized()
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if is_group else (1, 0)
    batch = progress.batch
    if batch is not None and batch.data_parallel != ranks:
        raise ConfigError(
            f"rng_slot: expected micro_batch=, for {ranks} ranks share {batch.data_parallel} data-parallel places. Pass "
            "micro_step x data_parallel + this rank's data-parallel place."
        )
    return progress.micro_step * ranks + rank


@dataclass(frozen=True, slots=True)
class _Streams:
    """The global streams as their libraries give and take them: a slot is entered once a micro-batch, JSON would be slow."""

    python: Any
    numpy: Any
    torch_cpu: torch.Tensor
    torch_cuda: torch.Tensor | None

    @classmethod
    def held(cls) -> _Streams:
        is_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        cuda = torch.cuda.get_rng_state() if is_cuda else None
        return cls(random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state(), cuda)

    @classmethod
    def of_slot(cls, name: str, *, seed: int, step: int, micro_batch: int, like: _Streams) -> _Streams:
        def key(stream: str) -> bytes:
            return slot_key(f"{name}.{stream}", seed=seed, step=step, micro_batch=micro_batch)

        def number(stream: str) -> int:
            return int.from_bytes(key(stream), "big")

        numpy = {"key": mt_words(number("numpy")), "pos": MT_WORDS}
        cpu = torch_cpu_state(mt_words(number("torch")), seed=int.from_bytes(key("torch")[:8], "little"))
        cuda = CUDA_STATE.pack(int.from_bytes(key("cuda")[:8], "little"), 0)
        return cls(
            random.Random(number("python")).getstate(),
            {"bit_generator": "MT19937", "state": numpy, "has_gauss": 0, "gauss": 0.0},
            torch.frombuffer(bytearray(cpu), dtype=torch.uint8),
            None if like.torch_cuda is None else torch.frombuffer(bytearray(cuda), dtype=torch.uint8),
        )

    def set(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch_cpu)
        if self.torch_cuda is not None:
            torch.cuda.set_rng_state(self.torch_cuda)
