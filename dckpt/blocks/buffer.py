"""The host memory in which a shard file is put together before it is written."""

from __future__ import annotations

import mmap


class ImageBuffer:
    """Page-aligned memory that is kept between saves, because first touch costs many times the copy.

    The mapping is shared, not private: a fork of the trainer (DataLoader workers) then neither copies its pages on write
    nor disturbs a write that is under way. One save owns the buffer at a time; `take` hands out views of it.
    """

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None
        self._taken = 0

    def take(self, sizes: list[int]) -> list[memoryview]:
        """Writable views of `sizes` bytes each, every one page-aligned. What earlier views held is overwritten."""
        starts, end = [], 0
        for size in sizes:
            starts.append(end)
            end += -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        if end > self._taken or self._memory is None:
            # Views of an older, smaller mapping keep it alive on their own; it is never resized under them.
            self._memory = mmap.mmap(-1, max(end, mmap.PAGESIZE))
            self._taken = end
        whole = memoryview(self._memory)
        return [whole[start : start + size] for start, size in zip(starts, sizes, strict=True)]

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return self._taken
