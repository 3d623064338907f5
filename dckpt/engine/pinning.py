"""Page-locked host memory for copies from a GPU: the only kind that a copy can fill while the host does something else."""

from __future__ import annotations

import ctypes
import logging
import mmap
from collections.abc import Callable
from typing import Any

import torch

log = logging.getLogger(__name__)

_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every device


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


class HostPinner:
    """Page-locks mappings for this process's GPU; does nothing in a process that uses none.

    Mappings are registered, not allocated by CUDA, so that they stay shared over a fork of the trainer.
    """

    def __init__(self) -> None:
        self._device: int | None = None

    def note_device(self) -> None:
        """Called on the training thread. Threads begin on device 0, where each rank would make itself a context."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            self._device = torch.cuda.current_device()

    def pin(self, memory: mmap.mmap) -> Callable[[], None] | None:
        """Page-locks all of `memory`; returns what undoes it, None if it was left pageable (then copies are slower)."""
        if self._device is None:
            return None
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        with torch.cuda.device(self._device):
            code = int(_runtime().cudaHostRegister(address, len(memory), _PORTABLE))
        if code:
            log.warning(
                "%d MiB of host memory could not be page-locked (CUDA error %d): copies from the GPU are slower. "
                "Raise `ulimit -l`, or leave more host memory free.",
                len(memory) >> 20,
                code,
            )
            return None
        device = self._device
        return lambda: _unpin(address, device)


def _unpin(address: int, device: int) -> None:
    with torch.cuda.device(device):
        code = int(_runtime().cudaHostUnregister(address))
    if code:
        log.warning("host memory could not be released from page-locking (CUDA error %d)", code)
