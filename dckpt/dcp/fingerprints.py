"""Fingerprints of live tensors, on any device: read only, in bounded memory, by a few threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dckpt.blocks.workers import ByteWorkers, Task
from dckpt.dcp.chunks import LocalChunk, copy_range_to_bytes, local_chunks, view_of_bytes
from dckpt.format.fingerprint import BoxRuns, box_runs, fold_box
from dckpt.ranks.topology import Topology
from dckpt.state.fingerprints import LiveFingerprint
from dckpt.state.naming import DTYPE_NAMES
from dckpt.state.records import NamedTensor

THREADS = 4
TASK_BYTES = 16 * 2**20
"""Bytes that a thread takes at a time. What does not lie in host memory as it is copied there first, into as much memory a
thread, page-locked for a GPU."""
PIECE_BYTES = 2**20  # folded at a time, from the processor's cache

PLAIN = 0


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes `begin` to `end` of the row-major image of a box; `number`: of its tensor."""

    number: int
    tensor: torch.Tensor
    runs: BoxRuns
    begin: int
    end: int


def live_fingerprints(
    tensors: Sequence[NamedTensor], topology: Topology, on_bytes: Callable[[int], None] = lambda _: None
) -> dict[str, LiveFingerprint]:
    """Of each tensor what this rank holds, by name. Changes nothing and talks to nobody; `on_bytes` hears of the progress.

    Raises `ConfigError` for a tensor whose box on this rank cannot be said (`local_chunks`).
    """
    chunks = [local_chunks(item.name, item.tensor) for item in tensors]
    values = _Folding(tensors, chunks, on_bytes).run()
    meshes: dict[DeviceMesh, int] = {}
    return {
        item.name: _placed(item.tensor, value, meshes, topology) for item, value in zip(tensors, values, strict=True)
    }


def _placed(tensor: torch.Tensor, value: int, meshes: dict[DeviceMesh, int], topology: Topology) -> LiveFingerprint:
    dtype = DTYPE_NAMES[tensor.dtype]
    if not isinstance(tensor, DTensor):
        return LiveFingerprint(value, dtype, PLAIN, topology.rank, is_first=True, place="every rank")
    mesh = tensor.device_mesh
    group = meshes.setdefault(mesh, len(meshes) + 1)
    at = mesh.get_coordinate()
    if at is None:  # a tensor of other ranks
        return LiveFingerprint(0, dtype, group, topology.world_size, is_first=False, place="nowhere")
    axes = list(zip(at, tensor.placements, strict=True))
    place = ",".join(str(where) for where, placement in axes if not placement.is_replicate())
    is_first = all(where == 0 for where, placement in axes if placement.is_replicate())
    return LiveFingerprint(value, dtype, group, int(mesh.mesh.min()), is_first, f"mesh {group}: {place or 'all'}")


class _Folding:
    """Folds all boxes, TASK_BYTES a task; small tensors share a task."""

    def __init__(
        self,
        tensors: Sequence[NamedTensor],
        chunks: Sequence[Sequence[LocalChunk]],
        on_bytes: Callable[[int], None],
    ) -> None:
        self._tensors = tensors
        self._chunks = chunks
        self._on_bytes = on_bytes
        self._values = [0] * len(tensors)
        self._lock = threading.Lock()
        self._own = threading.local()

    def run(self) -> list[int]:
        """One value a tensor."""
        devices = {chunk.tensor.device for held in self._chunks for chunk in held if chunk.tensor.is_cuda}
        for device in devices:
            # The threads copy beside the stream of this one, and know nothing of what is queued there.
            torch.cuda.current_stream(device).synchronize()
        workers = ByteWorkers(THREADS)
        try:
            workers.run(list(self._tasks()))
        finally:
            workers.stop()
        return self._values

    def _tasks(self) -> Iterator[Task]:
        batch: list[_Piece] = []
        size = 0
        for piece in self._pieces():
            batch.append(piece)
            size += piece.end - piece.begin
            if size >= TASK_BYTES:
                yield self._task(batch)
                batch, size = [], 0
        if batch:
            yield self._task(batch)

    def _pieces(self) -> Iterator[_Piece]:
        for number, (item, held) in enumerate(zip(self._tensors, self._chunks, strict=True)):
            for chunk in held:
                width = chunk.tensor.element_size()
                runs = box_runs(item.tensor.shape, chunk.offsets, chunk.sizes, width)
                size = chunk.tensor.numel() * width
                for begin in range(0, size, TASK_BYTES):
                    yield _Piece(number, chunk.tensor, runs, begin, min(size, begin + TASK_BYTES))

    def _task(self, pieces: list[_Piece]) -> Task:
        def fold() -> None:
            found = [(piece.number, self._fold(piece)) for piece in pieces]
            with self._lock:
                for number, value in found:
                    self._values[number] ^= value
                self._on_bytes(sum(piece.end - piece.begin for piece in pieces))

        return fold

    def _fold(self, piece: _Piece) -> int:
        size = piece.end - piece.begin
        view = view_of_bytes(piece.tensor, piece.begin, size)
        if view is None:
            view = self._copied(piece)
        value = 0
        for begin in range(0, size, PIECE_BYTES):
            value ^= fold_box(view[begin : begin + PIECE_BYTES], piece.begin + begin, piece.runs)
        return value

    def _copied(self, piece: _Piece) -> memoryview:
        """The piece in this thread's own host memory."""
        size = piece.end - piece.begin
        if not piece.tensor.is_cuda:
            memory = self._memory(is_pinned=False)[:size]
            copy_range_to_bytes(piece.tensor, piece.begin, memory)
            return memory
        # A thread begins on device 0, where each rank would make itself a context.
        with torch.cuda.device(piece.tensor.device):
            memory = self._memory(is_pinned=True)[:size]
            copy_range_to_bytes(piece.tensor, piece.begin, memory)
        return memory

    def _memory(self, *, is_pinned: bool) -> memoryview:
        name = "pinned" if is_pinned else "plain"
        if not hasattr(self._own, name):
            setattr(self._own, name, torch.empty(TASK_BYTES, dtype=torch.uint8, pin_memory=is_pinned))
        return memoryview(getattr(self._own, name).numpy().data)
