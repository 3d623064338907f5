"""The memory of one reading thread, and the copies out of it: to host tensors at once, to a GPU behind the next read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch

from dckpt.blocks.buffer import whole_pages
from dckpt.blocks.read import ReadMemory
from dckpt.dcp.chunks import tensor_from_bytes
from dckpt.dcp.spans import Fill, Span
from dckpt.state.naming import DTYPE_NAMES

TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

SLOTS = 2
"""Pieces of pinned memory a thread: one is read into while the other is on its way to the device."""


class Lane(Protocol):
    """What one reading thread uses, one span after the other."""

    def take(self, span: Span) -> memoryview:
        """Page-aligned memory for a span; what earlier spans left there is overwritten."""
        ...

    def copy(self, span: Span, memory: memoryview) -> None:
        """Copies the fills of a span, whose verified bytes lie in `memory`, to their targets."""
        ...


class HostLane:
    """Memory that is used again at once: its copies are done when `copy` returns."""

    def __init__(self) -> None:
        self._memory = ReadMemory()

    def take(self, span: Span) -> memoryview:
        return self._memory.take(whole_pages(span.max_bytes))

    def copy(self, span: Span, memory: memoryview) -> None:
        with torch.no_grad():
            for fill in span.fills:
                fill.target.copy_(_source(span, fill, memory))


class DeviceStreams:
    """Side streams for the copies to each device, behind what the caller's stream has done to the targets.

    Made and finished by the thread that asked for the load.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        for device in devices:
            stream = self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(device))

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> torch.cuda.Event | None:
        """Begins a copy and returns the event of its end; None for a target in host memory, where it is done."""
        stream = self._streams.get(target.device)
        with torch.no_grad():
            if stream is None:
                target.copy_(source)
                return None
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)
                event: torch.cuda.Event = stream.record_event()
                return event

    def finish(self) -> None:
        """Waits until all copies are done."""
        for stream in self._streams.values():
            stream.synchronize()


class PinnedLane:
    """Pinned memory in `SLOTS` pieces by turns; a piece is given out again when the copies out of it are done."""

    def __init__(self, streams: DeviceStreams) -> None:
        self._streams = streams
        self._slots = [_Slot() for _ in range(SLOTS)]

    def take(self, span: Span) -> memoryview:
        self._slots.append(self._slots.pop(0))
        return self._slots[-1].take(whole_pages(span.max_bytes))

    def copy(self, span: Span, memory: memoryview) -> None:
        copies = (self._streams.copy(fill.target, _source(span, fill, memory)) for fill in span.fills)
        self._slots[-1].copies = [event for event in copies if event is not None]


class _Slot:
    def __init__(self) -> None:
        self._held = torch.empty(0, dtype=torch.uint8)
        self.copies: list[torch.cuda.Event] = []

    def take(self, size: int) -> memoryview:
        for event in self.copies:
            event.synchronize()
        self.copies = []
        if self._held.numel() < size:
            self._held = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return self._held.numpy().data[:size]


def _source(span: Span, fill: Fill, memory: memoryview) -> torch.Tensor:
    part = memory[fill.begin - span.begin : fill.end - span.begin]
    return tensor_from_bytes(part, TORCH_DTYPES[fill.dtype], fill.shape)[fill.inner]
