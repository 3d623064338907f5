"""The one background thread of a Checkpointer: takes one save at a time and can always be waited for with a deadline."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable


class SaveThread:
    """Runs submitted work in order. A daemon: a writer stuck in the kernel must not hold the interpreter's exit."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._work: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=1)
        # Started here and not by the first save: an interrupt of the trainer must not meet it half started, and a save at
        # the end of the process could not start it any more.
        self._thread = self._start()

    def _start(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        thread.start()
        return thread

    def submit(self, work: Callable[[], None]) -> None:
        """Hands over `work`, which must not raise. The queue holds one; the caller waits for the save in flight first."""
        if not self._thread.is_alive():
            self._thread = self._start()
        self._work.put(work, timeout=60)

    def _run(self) -> None:
        while True:
            work = self._work.get()
            if work is None:
                return
            work()
            # An idle thread keeps nothing of the last save alive.
            del work

    def stop(self, timeout_s: float) -> bool:
        """Ends the thread after what it is doing; False if it did not end in time (it then ends with the process)."""
        try:
            self._work.put(None, timeout=timeout_s)
        except queue.Full:
            return False
        self._thread.join(timeout_s)
        return not self._thread.is_alive()
