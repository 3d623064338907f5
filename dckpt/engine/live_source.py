"""A shard file's bytes straight from live tensors, piece by piece: what a blocking save writes without an image."""

from __future__ import annotations

from collections.abc import Sequence

from dckpt.blocks.source import IN_PLACE_VIEWS_MAX, PieceMemory, parts_of_piece, ranges_of_piece
from dckpt.dcp.chunks import copy_range_to_bytes, view_of_bytes
from dckpt.engine.local_state import LocalState
from dckpt.format.shard_file import ShardFilePlan
from dckpt.planning.files import WriteItem


class LiveSource:
    """A `FileSource` over tensors that do not change while it is used: the caller of the save waits for its end."""

    def __init__(self, plan: ShardFilePlan, items: Sequence[WriteItem], local: LocalState) -> None:
        self.plan = plan
        self._items = items
        self._local = local

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.plan.size

    def piece(self, begin: int, end: int, memory: PieceMemory) -> memoryview:
        """Copies what lies in the range into `memory`."""
        piece = memory.take(end - begin)
        for number, offset, target in parts_of_piece(self.plan, begin, piece):
            self._copy(self._items[number], offset, target)
        return piece

    def in_place(self, begin: int, end: int) -> Sequence[memoryview] | None:
        """Views of the tensors' own memory."""
        header = memoryview(self.plan.header)[begin:end]
        found = [header] if len(header) else []
        for number, offset, first, last in ranges_of_piece(self.plan, begin, end):
            view = self._view(self._items[number], offset, last - first)
            if view is None or len(found) == IN_PLACE_VIEWS_MAX:
                return None
            found.append(view)
        return found

    def _view(self, item: WriteItem, offset: int, nbytes: int) -> memoryview | None:
        if isinstance(item.source, str):
            record = self._local.records[item.source].ljust(item.shard_tensor.nbytes)
            return memoryview(record)[offset : offset + nbytes]
        tensor, box = item.source
        return view_of_bytes(self._local.chunks[tensor][box].tensor, offset, nbytes)

    def _copy(self, item: WriteItem, offset: int, target: memoryview) -> None:
        if isinstance(item.source, str):
            record = self._local.records[item.source].ljust(item.shard_tensor.nbytes)
            target[:] = record[offset : offset + len(target)]
        else:
            tensor, box = item.source
            copy_range_to_bytes(self._local.chunks[tensor][box].tensor, offset, target)
