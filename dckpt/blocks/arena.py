"""Memory in slots that the other processes of this host can map: a piece is read once and copied out by each of them."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable


class Slot:
    """One piece of the arena's memory, free again when everybody who held it has released it."""

    def __init__(self, number: int, memory: memoryview, give_back: Callable[[Slot], None]) -> None:
        self.number = number
        self._memory = memory
        self._give_back = give_back
        self._holders = 0
        self._lock = threading.Lock()

    def take(self, size: int) -> memoryview:
        """A view of its first `size` bytes, page-aligned."""
        assert size <= len(self._memory), (size, len(self._memory))
        return self._memory[:size]

    def hold(self) -> None:
        """One more who needs what lies in it."""
        with self._lock:
            self._holders += 1

    def release(self) -> None:
        """One fewer; the last one frees it."""
        with self._lock:
            self._holders -= 1
            is_free = self._holders == 0
        if is_free:
            self._give_back(self)


class Arena:
    """`num_slots` slots of `slot_bytes` (whole pages). Pages are touched when a slot is first used."""

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        assert slot_bytes % mmap.PAGESIZE == 0
        self.slot_bytes = slot_bytes
        self.nbytes = num_slots * slot_bytes
        self.descriptor: int | None = None
        """What another process maps; None where the kernel has no anonymous files."""
        try:
            self.descriptor = os.memfd_create("dckpt", os.MFD_CLOEXEC)
            os.ftruncate(self.descriptor, self.nbytes)
            self._map = mmap.mmap(self.descriptor, self.nbytes)
        except (AttributeError, OSError):
            self._close_descriptor()
            # Shared, not private: pages that a fork would copy while a device writes into them would be torn.
            self._map = mmap.mmap(-1, self.nbytes)
        whole = memoryview(self._map)
        self._changed = threading.Condition()
        self._free = [
            Slot(number, whole[number * slot_bytes : (number + 1) * slot_bytes], self._take_back)
            for number in range(num_slots)
        ]

    def take(self, within_s: float) -> Slot | None:
        """A free slot, held once; None if there is none within the time."""
        with self._changed:
            if not self._changed.wait_for(lambda: bool(self._free), within_s):
                return None
            slot = self._free.pop()
        slot.hold()
        return slot

    def _take_back(self, slot: Slot) -> None:
        with self._changed:
            self._free.append(slot)
            self._changed.notify()

    def close(self) -> None:
        """Closes the descriptor; the memory goes with the last view of it."""
        self._close_descriptor()

    def _close_descriptor(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


def map_arena(descriptor: int, nbytes: int) -> memoryview:
    """Another process's arena, read-only; closes the descriptor. Raises `OSError` or `ValueError` if it is none of that size."""
    try:
        return memoryview(mmap.mmap(descriptor, nbytes, prot=mmap.PROT_READ))
    finally:
        os.close(descriptor)
