"""How often and how soon a request is repeated: with jitter, by a deadline, and slower for all threads after SlowDown."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator

from dckpt.storage.s3_errors import code_of, status_of

_FIRST_PAUSE_S = 0.1
_PAUSE_MAX_S = 10.0
_RETRY_AFTER_MAX_S = 60.0


class Backoff:
    """The pauses of one client. One thread that is told to slow down holds back all of them."""

    def __init__(
        self,
        patience_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._patience_s = patience_s
        self.clock, self.sleep, self.draw = clock, sleep, draw
        self._lock = threading.Lock()
        self._quiet_until = 0.0

    def tries(self) -> Iterator[Try]:
        """Tries without end; each is told of its failure by `Try.wait`, which says whether there is time for another."""
        deadline = self.clock() + self._patience_s
        number = 0
        while True:
            self._keep_quiet(deadline)
            yield Try(self, number, deadline)
            number += 1

    def quieten(self, seconds: float) -> None:
        """No request of any thread begins before `seconds` have passed."""
        with self._lock:
            self._quiet_until = max(self._quiet_until, self.clock() + seconds)

    def _keep_quiet(self, deadline: float) -> None:
        with self._lock:
            until = self._quiet_until
        rest = min(until, deadline) - self.clock()
        if rest > 0:
            self.sleep(rest)


class Try:
    """One try of one call."""

    def __init__(self, backoff: Backoff, number: int, deadline: float) -> None:
        self._backoff, self._number, self._deadline = backoff, number, deadline

    def wait(self, error: BaseException) -> bool:
        """Waits before the next try and returns True; False if there is no time for one."""
        backoff = self._backoff
        # From half to the whole of a pause that doubles, so that ranks do not come back together.
        longest = min(_PAUSE_MAX_S, _FIRST_PAUSE_S * 2.0 ** min(self._number, 16))
        pause = max(longest * (0.5 + backoff.draw() / 2), _retry_after_s(error))
        if backoff.clock() + pause >= self._deadline:
            return False
        if status_of(error) in (429, 503) or code_of(error) == "SlowDown":
            backoff.quieten(pause)
        backoff.sleep(pause)
        return True


def _retry_after_s(error: BaseException) -> float:
    answer = getattr(error, "response", None)
    headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}) if isinstance(answer, dict) else {}
    text = str(headers.get("retry-after", ""))
    return min(float(text), _RETRY_AFTER_MAX_S) if text.isdigit() else 0.0
