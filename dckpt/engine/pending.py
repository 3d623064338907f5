"""The handle of a save that may still be under way."""

from __future__ import annotations

import threading
from typing import Literal

from dckpt.errors import DckptError, SaveNotFinishedError

Outcome = Literal["committed", "failed", "unknown"]


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

        Raises `SaveNotFinishedError` after `timeout_s` seconds. Without a time-out the wait still ends: every stage of
        a save has its own deadline.
        """
        if not self._done.wait(timeout_s):
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

    def conclude(self, outcome: Outcome, error: DckptError | None = None) -> None:
        """The engine's: sets the outcome once."""
        assert self._outcome is None, f"save of step {self.step} concluded twice"
        self._staged = True
        self._outcome = outcome
        self._error = error
        self._done.set()

    def __repr__(self) -> str:
        state = self._outcome or ("staged" if self._staged else "staging")
        return f"PendingSave(step={self.step}, {state})"
