"""Times named parts of dckpt while the real code runs: the functions are wrapped, nothing is replaced."""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class Stopwatch:
    """Seconds by name since the last `take`: of the clock, and of the processor (the calling thread's).

    One thread at a time is watched: the one that calls the parts. Where other programs share the machine, the processor's
    seconds say what the work is, and the clock's how long it took that day.
    """

    def __init__(self) -> None:
        self._clock: dict[str, float] = {}
        self._cpu: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the time of the body to `name`."""
        clock, cpu = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            self._clock[name] = self._clock.get(name, 0.0) + time.perf_counter() - clock
            self._cpu[name] = self._cpu.get(name, 0.0) + time.thread_time() - cpu

    def take(self) -> tuple[dict[str, float], dict[str, float]]:
        """(clock, processor) so far, and starts anew."""
        found = self._clock, self._cpu
        self._clock, self._cpu = {}, {}
        return found

    @contextmanager
    def watching(self, parts: Sequence[tuple[str, str, str]]) -> Iterator[None]:
        """While the body runs, each of `parts` (name, module or module:Class, function) is timed under its name.

        A part that does not exist any more is an error, so that no figure silently becomes zero.
        """
        undo: list[tuple[Any, str, Any]] = []
        try:
            for name, where, function in parts:
                module, _, owner_name = where.partition(":")
                owner: Any = importlib.import_module(module)
                owner = getattr(owner, owner_name) if owner_name else owner
                original = owner.__dict__[function]
                undo.append((owner, function, original))
                setattr(owner, function, self._wrapped(name, original))
            yield
        finally:
            for owner, function, original in reversed(undo):
                setattr(owner, function, original)

    def _wrapped(self, name: str, original: Any) -> Any:
        is_classmethod = isinstance(original, classmethod)
        inner: Callable[..., Any] = original.__func__ if is_classmethod else original

        @functools.wraps(inner)
        def timed(*args: Any, **options: Any) -> Any:
            with self.timed(name):
                return inner(*args, **options)

        return classmethod(timed) if is_classmethod else timed
