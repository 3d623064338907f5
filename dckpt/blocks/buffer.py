"""The host memory in which shard files are put together before they are written."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from typing import TypeAlias

Pin: TypeAlias = Callable[[mmap.mmap], Callable[[], None] | None]
"""Page-locks a mapping for a device and returns what undoes that, or None if it was not locked."""

_WARM_BYTES = 16 * 2**20  # touched between two looks at whether the memory is wanted


class ImageBuffer:
    """Page-aligned memory that is kept between saves, because first touch costs many times the copy.

    The mapping is shared, not private: a fork of the trainer (DataLoader workers) then neither copies its pages on write
    nor disturbs a write that is under way. One save owns the buffer at a time; `take` hands out views of it.
    """

    def __init__(self, pin: Pin = lambda _: None) -> None:
        self._pin = pin
        self._unpin: Callable[[], None] | None = None
        self._is_prepared = False
        self._memory: mmap.mmap | None = None
        self._nbytes = 0
        self._warming: threading.Thread | None = None
        self._is_wanted = threading.Event()

    def warm(self, nbytes: int) -> None:
        """Has the kernel make the pages for `nbytes` in the background; `take` ends that wherever it stands."""
        if self._memory is not None or nbytes <= 0:
            return
        self._allocate(nbytes)
        self._warming = threading.Thread(target=self._touch, name="dckpt-warm", daemon=True)
        self._warming.start()

    def take(self, sizes: list[int]) -> list[memoryview]:
        """Writable views of `sizes` bytes each, every one page-aligned. What earlier views held is overwritten."""
        self.stop_warming()
        starts, end = [], 0
        for size in sizes:
            starts.append(end)
            end += whole_pages(size)
        if end > self._nbytes or self._memory is None:
            # Views of an older, smaller mapping keep it alive on their own; it is never resized under them.
            self._allocate(end)
        self._prepare()
        assert self._memory is not None
        whole = memoryview(self._memory)
        return [whole[start : start + size] for start, size in zip(starts, sizes, strict=True)]

    def stop_warming(self) -> None:
        """Ends the background thread; it is never more than some milliseconds away from its end."""
        self._is_wanted.set()
        if self._warming is not None:
            self._warming.join()
            self._warming = None

    def _allocate(self, nbytes: int) -> None:
        self.release()
        self._nbytes = whole_pages(max(nbytes, 1))
        self._memory = mmap.mmap(-1, self._nbytes)

    def _prepare(self) -> None:
        """Once for each mapping; after its pages were touched, where there was time for that."""
        if not self._is_prepared:
            assert self._memory is not None
            self._unpin = self._pin(self._memory)
            self._is_prepared = True

    def release(self) -> None:
        """Gives the memory back, once the last view of it is gone. No copy from a device may be under way."""
        unpin, self._unpin, self._is_prepared = self._unpin, None, False
        if unpin is not None:
            unpin()
        self._memory, self._nbytes = None, 0

    def _touch(self) -> None:
        # Imported here: whoever only reads needs no array.
        import numpy as np

        assert self._memory is not None
        pages = np.frombuffer(self._memory, dtype=np.uint8)[:: mmap.PAGESIZE]
        step = _WARM_BYTES // mmap.PAGESIZE
        for begin in range(0, len(pages), step):
            if self._is_wanted.is_set():
                return
            pages[begin : begin + step] = 0
        self._prepare()

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return self._nbytes


def whole_pages(size: int) -> int:
    """`size` bytes rounded up to pages."""
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
