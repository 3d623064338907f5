"""Times named parts of dckpt while the real code runs: the functions are wrapped, nothing is replaced."""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class Stopwatch:
    """Seconds by name since the last `take`. One thread at a time is watched: the one that calls the parts."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    def add(self, name: str, seconds: float) -> None:
        """Adds to what `name` took."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the time of the body to `name`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - begin)

    def take(self) -> dict[str, float]:
        """Everything so far, and starts anew."""
        found, self._seconds = self._seconds, {}
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
