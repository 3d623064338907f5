"""Fingerprints of the tensors of one shard file, from its bytes as they pass by."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dckpt.format.shard_file import ShardFilePlan


class StreamFingerprints:
    """Takes every byte of a shard file once, in pieces in any order and from several threads.

    Knows nothing, and costs nothing, if the plan does not say where each chunk lies in its tensor.
    """

    def __init__(self, plan: ShardFilePlan | None) -> None:
        self._table = None if plan is None else plan.chunk_table
        self._lock = threading.Lock()
        self._values = [0] * (0 if plan is None or self._table is None else len(plan.tensors))

    def add(self, begin: int, piece: memoryview) -> None:
        """The bytes of the file from `begin` on."""
        if self._table is None:
            return
        found = self._table.fold(begin, piece)
        with self._lock:
            for number, value in found:
                self._values[number] ^= value

    def values(self) -> tuple[int, ...]:
        """One for each tensor of the file, in its order; none without a plan."""
        return tuple(self._values)
