"""Who still moves: the throttled heartbeat of a working rank, and the watch that counts from its last change."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping

INTERVAL_S = 0.25
RANKS_AT_FULL_RATE = 1024  # above, all ranks together keep the rate that this many have


class Heartbeat:
    """Decides when a beat is worth posting: progress changed since the last posted one, and not too soon after it."""

    def __init__(self, deadline_s: float, world_size: int) -> None:
        slower = max(1.0, world_size / RANKS_AT_FULL_RATE)
        self._interval_s = min(INTERVAL_S * slower, deadline_s / 12)
        self._lock = threading.Lock()
        self._posted: int | None = None
        self._posted_at = float("-inf")

    def due(self, progress: int, now: float) -> bool:
        """True when this beat is to be posted; it then counts as posted. Safe from several threads."""
        with self._lock:
            if progress == self._posted or now - self._posted_at < self._interval_s:
                return False
            self._posted, self._posted_at = progress, now
            return True

    def tick(self, now: float) -> bool:
        """Like `due`, for a coordinator that waits: waiting is its progress."""
        with self._lock:
            if now - self._posted_at < self._interval_s:
                return False
            self._posted_at = now
            return True


class StallWatch:
    """For each rank the time of its last observed change. Ranks start as if they had moved at `now`."""

    def __init__(self, ranks: Iterable[int], now: float, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._moved_at = dict.fromkeys(ranks, now)
        self._seen: dict[int, int] = {}

    def observe(self, ticks: Mapping[int, int], now: float) -> None:
        """Takes the ranks' heartbeat counters as read at `now`. They start at 0."""
        for rank, tick in ticks.items():
            if self._seen.get(rank, 0) != tick:
                self._moved_at[rank] = now
            self._seen[rank] = tick

    def stalled(self, ranks: Collection[int], now: float) -> list[int]:
        """Those of `ranks` that have not moved for the deadline."""
        return sorted(rank for rank in ranks if now - self._moved_at[rank] >= self._deadline_s)

    def left_s(self, rank: int, now: float) -> float:
        """Seconds until `rank` counts as stalled."""
        return max(0.0, self._deadline_s - (now - self._moved_at[rank]))
