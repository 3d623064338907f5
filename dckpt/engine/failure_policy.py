"""What becomes of a save that failed: told once, raised when it must be or when too many followed each other."""

from __future__ import annotations

import logging

from dckpt.engine.pending import PendingSave
from dckpt.errors import CommitConflictError, CoordinationTimeoutError, DckptError, PeerFailedError
from dckpt.ranks.topology import Topology

log = logging.getLogger(__name__)


class FailurePolicy:
    """Judges saves that have ended, in their order. A failed one must not end the training unless that was asked for."""

    def __init__(self, topology: Topology, *, raises: bool, give_up_after: int) -> None:
        self._topology = topology
        self._raises = raises
        self._give_up_after = give_up_after
        self._failures = 0

    def judge(self, pending: PendingSave) -> None:
        """Raises the save's error if the policy says so, if `give_up_after` failed in a row, or if no later save can mend it."""
        if pending.outcome == "committed":
            self._failures = 0
            return
        error = pending.error
        assert error is not None
        self._failures += 1
        # The same error is on every rank and said once, by rank 0; unless rank 0 is what was lost.
        is_told_here = self._topology.is_coordinator or pending.outcome == "unknown" or blames_coordinator(error)
        told = logging.ERROR if is_told_here else logging.DEBUG
        what = "failed" if pending.outcome == "failed" else "has an unknown outcome"
        log.log(told, "save of step %d %s (%d in a row): %s", pending.step, what, self._failures, error)
        if self._raises or isinstance(error, CommitConflictError) or self._failures >= self._give_up_after:
            raise error


def blames_coordinator(error: DckptError) -> bool:
    """Whether the error says that rank 0 is the one that is missing."""
    if isinstance(error, PeerFailedError):
        return error.rank == 0
    return isinstance(error, CoordinationTimeoutError) and 0 in error.ranks
