"""What a session writes into the store: keys, verdict, doors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dckpt.errors import DckptError
from dckpt.ranks.client import PART_BYTES, RawStore, put

Outcome = Literal["committed", "failed", "unknown"]
OUTCOMES: tuple[Outcome, ...] = ("committed", "failed", "unknown")

COMMITTING: Literal["committing"] = "committing"
SEE_VERDICT, RESULT, LARGE, ERROR = b"V", b"R", b"L", b"E"


@dataclass(frozen=True, slots=True)
class Verdict:
    """`error` is set exactly when `state` is "abort"."""

    state: Literal["open", "abort", "committing"]
    error: DckptError | None = None


class AbortedError(Exception):
    """Carries the error in force out of a wait. Never leaves this package."""

    def __init__(self, error: DckptError) -> None:
        super().__init__(error.message)
        self.error = error


class ExchangeKeys:
    """The keys of the n-th exchange of a session."""

    def __init__(self, prefix: str, number: int, phase: str) -> None:
        base = f"{prefix}/{number}.{phase}"
        self.arrived, self.count, self.all = f"{base}/arrived", f"{base}/count", f"{base}/all"
        self.door, self.result = f"{base}/door", f"{base}/result"
        self._payload = f"{base}/payload/"

    def payload(self, rank: int) -> str:
        """Where rank `rank` puts what it contributes."""
        return f"{self._payload}{rank}"


def is_abort(verdict: str) -> bool:
    """Whether the verdict in force, as stored, is the error of an abort."""
    return bool(verdict) and verdict != COMMITTING


def announce(store: RawStore, door: str, large: str, kind: bytes, value: bytes) -> None:
    """Opens `door` with a record; a value too large for the door itself lies in `large`, complete before it opens."""
    if len(value) < PART_BYTES:
        store.set(door, kind + value)
    else:
        put(store, large, value)
        store.set(door, LARGE)
    # A store's `set` does not wait for the server; a question on the same connection does.
    store.check([door])
