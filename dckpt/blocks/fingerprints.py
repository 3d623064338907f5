"""Fingerprints of the tensors of one shard file, from its bytes as they pass by."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import TYPE_CHECKING

from dckpt.blocks.source import ranges_of_piece
from dckpt.format.fingerprint import BoxRuns, box_runs, fold_box
from dckpt.format.shard_file import DTYPES

if TYPE_CHECKING:
    from dckpt.format.shard_file import ShardFilePlan

# The layers of a model are cut alike, and every save asks again.
_known_runs = lru_cache(maxsize=16_384)(box_runs)


class StreamFingerprints:
    """Takes every byte of a shard file once, in pieces in any order and from several threads.

    Knows nothing, and costs nothing, if the plan does not say where each chunk lies in its tensor.
    """

    def __init__(self, plan: ShardFilePlan | None) -> None:
        self._plan = plan if plan is not None and all(t.global_shape is not None for t in plan.tensors) else None
        self._lock = threading.Lock()
        self._values = [0] * (0 if self._plan is None else len(self._plan.tensors))

    def add(self, begin: int, piece: memoryview) -> None:
        """The bytes of the file from `begin` on."""
        if self._plan is None:
            return
        found = [
            (number, fold_box(piece[first:last], offset, self._runs(number)))
            for number, offset, first, last in ranges_of_piece(self._plan, begin, begin + len(piece))
        ]
        with self._lock:
            for number, value in found:
                self._values[number] ^= value

    def _runs(self, number: int) -> BoxRuns:
        assert self._plan is not None
        tensor = self._plan.tensors[number]
        assert tensor.global_shape is not None
        return _known_runs(tensor.global_shape, tensor.offsets, tensor.shape, DTYPES[tensor.dtype])

    def values(self) -> tuple[int, ...]:
        """One for each tensor of the file, in its order; none without a plan."""
        return tuple(self._values)
