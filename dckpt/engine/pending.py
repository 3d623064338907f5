"""The handle of a save that may still be under way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Literal

from dckpt.errors import DckptError, SaveNotFinishedError

Outcome = Literal["committed", "failed", "unknown"]


LOOK_EVERY_S = 0.5


def _slice_s(limit: float | None) -> float:
    return LOOK_EVERY_S if limit is None else max(0.0, min(LOOK_EVERY_S, limit - time.monotonic()))


class PendingSave:
    """One save. `staged` and `outcome` can be read at any time from any thread.

    step: the optimizer step that is saved. checkpoint: its name in the run once known, else None.
    """

    def __init__(self, step: int, micro_step: int = 0) -> None:
        self.step = step
        self.micro_step = micro_step
        self.checkpoint: str | None = None
        self.seconds_stalled = 0.0
        self.seconds_to_durable: float | None = None
        self._staged = False
        self._outcome: Outcome | None = None
        self._error: DckptError | None = None
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._look: Callable[[], None] = lambda: None

    @property
    def staged(self) -> bool:
        """True once the state may change again: everything to be saved has been copied."""
        return self._staged

    @property
    def outcome(self) -> Outcome | None:
        """None while under way. `committed`: durable. `failed`: no trace of it will load. `unknown`: it may exist."""
        return self._outcome

    @property
    def error(self) -> DckptError | None:
        """Why it failed or is unknown; the same sentence on every rank."""
        return self._error

    @property
    def done(self) -> bool:
        """True once `outcome` is known."""
        return self._done.is_set()

    def wait(self, timeout_s: float | None = None) -> Outcome:
        """Blocks until the outcome is known and returns it; a failed save does not raise here, `error` says why.

        Raises `SaveNotFinishedError` after `timeout_s` seconds. Without a time-out the wait still ends: every agreement
        has its deadline, and a writer that is stuck in the kernel is given up after it, with its memory.
        """
        limit = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._done.wait(_slice_s(limit)):
            self._look()
            if limit is not None and time.monotonic() >= limit and not self._done.is_set():
                raise SaveNotFinishedError(
                    f"Save of step {self.step}: not finished after {timeout_s:g} s. It goes on in the background; wait "
                    "longer, or raise the deadline.",
                    step=self.step,
                )
        assert self._outcome is not None
        return self._outcome

    def mark_staged(self) -> None:
        """The engine's: the source may change again."""
        self._staged = True

    def add_stall(self, seconds: float) -> None:
        """The engine's, on the training thread: a step waited for copies of this save."""
        self.seconds_stalled += seconds

    def look_with(self, look: Callable[[], None]) -> None:
        """The engine's: `look` is called now and then while somebody waits; it gives up a writer that is stuck."""
        self._look = look

    def conclude(self, outcome: Outcome, error: DckptError | None = None) -> bool:
        """The engine's: sets the outcome; False if it was set before, by whoever gave this save up, and stays."""
        with self._lock:
            if self._outcome is not None:
                return False
            self._staged = True
            self._error = error
            self._outcome = outcome
            self._look = lambda: None
        self._done.set()
        return True

    def __repr__(self) -> str:
        state = self._outcome or ("staged" if self._staged else "staging")
        return f"PendingSave(step={self.step}, {state})"
