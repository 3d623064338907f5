"""Notices SIGTERM and SIGUSR1 without acting on them: the training loop stops at a step, on all ranks together."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable
from types import FrameType
from typing import Any


class SignalWatch:
    """Remembers the last signal. Handlers are set in the main thread only, and put back by `restore`."""

    def __init__(self, signals: Iterable[signal.Signals]) -> None:
        self._owner = os.getpid()
        self._previous: dict[signal.Signals, Any] = {}
        self._received: str | None = None
        if threading.current_thread() is not threading.main_thread():
            return
        for number in signals:
            self._previous[number] = signal.signal(number, self._notice)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            # A forked child (a DataLoader worker) inherits the handler; the signal must end it as ever.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._received = signal.Signals(number).name
        previous = self._previous.get(signal.Signals(number))
        if callable(previous):
            previous(number, frame)

    @property
    def received(self) -> str | None:
        """The name of the signal that came last, or None."""
        return self._received

    def restore(self) -> None:
        """Puts the earlier handlers back."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous = {}
