"""The memory of one reading thread, and the copies out of it: to host tensors at once, to a GPU behind the next read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch

from dckpt.blocks.buffer import whole_pages
from dckpt.blocks.read import ReadMemory
from dckpt.dcp.chunks import tensor_from_bytes
from dckpt.dcp.spans import FILL_BYTES_MAX, SPAN_BYTES_MAX, Fill, Span
from dckpt.format.checksum import BLOCK_BYTES
from dckpt.state.naming import DTYPE_NAMES

TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

LANE_BYTES = SPAN_BYTES_MAX + FILL_BYTES_MAX + BLOCK_BYTES
"""The longest span."""

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
        return self._memory.take(LANE_BYTES)[: whole_pages(span.max_bytes)]

    def copy(self, span: Span, memory: memoryview) -> None:
        with torch.no_grad():
            for fill in span.fills:
                fill.target.copy_(_source(span, fill, memory))


class DeviceStreams:
    """A side stream for each device, for copies from pinned memory behind all that the caller's stream did to the targets.

    Made and finished by the thread that asked for the load; the others enqueue.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        for device in devices:
            stream = self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(device))

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Begins a copy to a device; one to host memory is done on return."""
        stream = self._streams.get(target.device)
        with torch.no_grad():
            if stream is None:
                target.copy_(source)
                return
            # A thread begins on device 0, where each rank would make itself a context.
            with torch.cuda.device(target.device), torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)

    def record(self) -> list[torch.cuda.Event]:
        """Events that come when all copies that were begun so far are done."""
        events = []
        for device, stream in self._streams.items():
            with torch.cuda.device(device):
                events.append(stream.record_event())
        return events

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
        return self._slots[-1].take()[: whole_pages(span.max_bytes)]

    def copy(self, span: Span, memory: memoryview) -> None:
        for fill in span.fills:
            self._streams.copy(fill.target, _source(span, fill, memory))
        self._slots[-1].copies = self._streams.record()


class _Slot:
    """Memory that CUDA allocates: page-aligned, and no fork copies its pages."""

    def __init__(self) -> None:
        self._held: torch.Tensor | None = None
        self.copies: list[torch.cuda.Event] = []

    def take(self) -> memoryview:
        for event in self.copies:
            event.synchronize()
        if self._held is None:
            self._held = torch.empty(LANE_BYTES, dtype=torch.uint8, pin_memory=True)
        return self._held.numpy().data


def _source(span: Span, fill: Fill, memory: memoryview) -> torch.Tensor:
    part = memory[fill.begin - span.begin : fill.end - span.begin]
    return tensor_from_bytes(part, TORCH_DTYPES[fill.dtype], fill.shape)[fill.inner]
