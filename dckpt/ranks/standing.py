"""Waiting for other ranks outside an exchange: with an eye on the verdict, on who still moves, and on who is cut off."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from typing import NoReturn, Protocol

from dckpt.errors import DckptError
from dckpt.ranks.client import ContactLostError, NoAnswerError
from dckpt.ranks.messages import coordinator_lost, peers_failed
from dckpt.ranks.progress import StallWatch
from dckpt.ranks.session import Session, slice_s
from dckpt.ranks.topology import Topology

REASON_GRACE_S = 1.0  # a rank that ends its connections says why, a moment later


class Work(Protocol):
    """What a rank does that others wait for, and what it waits for itself."""

    def progress(self) -> int:
        """A number that changes with every piece that moves."""
        ...

    def is_busy(self) -> bool:
        """Whether it waits for something that is no rank, such as its storage: then only progress is a sign of life."""
        ...

    def awaited(self) -> Collection[int]:
        """Ranks that have yet to give or take something."""
        ...

    def untaken(self) -> Mapping[int, float]:
        """Ranks that have yet to take something, with the `time.monotonic()` at which they last took anything."""
        ...

    def lost(self) -> tuple[int, str] | None:
        """A rank whose connection failed while something was due, and how."""
        ...


def stand_by(session: Session, topology: Topology, work: Work, is_done: Callable[[float], bool]) -> None:
    """Returns when `is_done(seconds)`, which waits at most that long, is true.

    Raises the error in force once any rank aborted the session. Aborts it, with an error that names them, when awaited
    ranks show no sign of life for the session's deadline, take nothing for as long, or their connection failed. Ranks
    that wait for each other show signs of life; so each of them finds the one that does not.
    """
    deadline_s = session.deadline_s
    pause_s = slice_s(topology, deadline_s)
    stalls = StallWatch(range(topology.world_size), time.monotonic(), deadline_s)
    while not is_done(pause_s):
        now = time.monotonic()
        session.raise_if_aborted()
        lost = work.lost()
        if lost is not None:
            _await_reason(session, min(REASON_GRACE_S, deadline_s / 3))
            _abort(session, _peer_lost(session, *lost))
        if work.is_busy():
            session.beat(work.progress())
        else:
            session.tick(now)
        awaited = sorted(work.awaited())
        if not awaited:
            continue
        stalls.observe(_ticks(session, awaited), now)
        late = {*stalls.stalled(awaited, now), *(r for r, at in work.untaken().items() if now - at >= deadline_s)}
        if late:
            _abort(session, session.late_error(sorted(late)))


def _ticks(session: Session, ranks: list[int]) -> dict[int, int]:
    try:
        return session.read_ticks(ranks)
    except (ContactLostError, NoAnswerError):
        session.raise_if_aborted()  # says in the session's words that the coordinator is lost or silent
        return {}


def _peer_lost(session: Session, rank: int, reason: str) -> DckptError:
    if rank == 0:
        # In the words of those who lose its store, so that all have the same.
        return coordinator_lost(session.what, session.phase, session.consequence)
    return peers_failed(session.what, session.phase, {rank: ("ConnectionLost", reason)}, session.consequence)


def _await_reason(session: Session, seconds: float) -> None:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        session.raise_if_aborted()
        time.sleep(0.05)


def _abort(session: Session, error: DckptError) -> NoReturn:
    session.abort(error)
    raise session.error or error
