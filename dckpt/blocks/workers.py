"""A few threads for checksums and I/O, kept for as long as their owner lives."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence

Task = Callable[[], None]


class ByteWorkers:
    """Runs batches of independent tasks on daemon threads that are started once.

    Daemons, and started early: a thread stuck in the kernel must not hold the interpreter's exit, and a save that is
    finished by an exit handler cannot start threads any more. One batch at a time; `run` is called from one thread.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._tasks: queue.SimpleQueue[tuple[_Batch, Task] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Starts the threads, if they do not run yet."""
        while len(self._threads) < self._count:
            name = f"dckpt-bytes-{len(self._threads)}"
            thread = threading.Thread(target=self._serve, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    def run(self, tasks: Sequence[Task]) -> None:
        """Returns when all tasks are done. After the first error the rest is skipped and that error raised.

        Waits for every task that has begun, however it ends: no thread touches the caller's memory afterwards.
        """
        if not tasks:
            return
        self.start()
        batch = _Batch(len(tasks))
        for task in tasks:
            self._tasks.put((batch, task))
        batch.wait()

    def stop(self, timeout_s: float = 1.0) -> None:
        """The threads end when they are idle; those that are not within `timeout_s` end with the process."""
        for _ in self._threads:
            self._tasks.put(None)
        end = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        self._threads.clear()

    def _serve(self) -> None:
        while True:
            item = self._tasks.get()
            if item is None:
                return
            batch, task = item
            batch.run(task)


class _Batch:
    def __init__(self, count: int) -> None:
        self._left = count
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._done = threading.Event()

    def run(self, task: Task) -> None:
        error: BaseException | None = None
        try:
            if self._error is None:
                task()
        except BaseException as found:  # noqa: BLE001 - raised by `wait` in the thread that asked for the work
            error = found
        with self._lock:
            self._error = self._error or error
            self._left -= 1
            if self._left == 0:
                self._done.set()

    def wait(self) -> None:
        # Bounded by the agreement: a rank whose bytes stand still is given up by the others at their deadline.
        self._done.wait()
        if self._error is not None:
            raise self._error
