"""Two processes that work on one run in a chosen order: one makes a system call when it is its turn, while the other waits."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

from dckpt.storage.posix import Posix

WAIT_S = 30.0


class Turns:
    """Who acts next: mostly the same one again, so that bursts of any length come up. A function of the seed alone."""

    def __init__(self, seed: int, actors: int) -> None:
        self._random = random.Random(seed)
        self._is_done = [False] * actors
        self._next = self._random.randrange(actors)
        self._condition = threading.Condition()
        self._stay = self._random.choice((0.5, 0.9, 0.98))

    def take(self, actor: int) -> None:
        """Waits for the turn, and decides whose the next one is."""
        with self._condition:
            assert self._condition.wait_for(lambda: self._next == actor, WAIT_S), "the other one does not go on"
            self._choose()

    def finish(self, actor: int) -> None:
        """This one makes no more calls."""
        with self._condition:
            self._is_done[actor] = True
            self._choose()

    def _choose(self) -> None:
        left = [number for number, is_done in enumerate(self._is_done) if not is_done]
        if left and (self._next not in left or self._random.random() > self._stay):
            self._next = self._random.choice(left)
        self._condition.notify_all()


def in_turns(posix: Posix, turns: Turns, actor: int) -> Posix:
    """`posix`, whose calls wait for their turn."""

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        def take_turn(*args: Any, **options: Any) -> Any:
            turns.take(actor)
            return call(*args, **options)

        return take_turn

    for name in ("open", "stat", "scandir", "mkdir", "rename", "link", "unlink", "rmdir"):
        setattr(posix, name, wrap(getattr(posix, name)))
    return posix


def interleave(seed: int, programs: Sequence[Callable[[Callable[[Posix], Posix]], object]]) -> list[object]:
    """What the programs return, or the error that they raise; each gets a function that puts its system calls in turns."""
    turns = Turns(seed, len(programs))
    results: list[object] = [None] * len(programs)

    def run(actor: int) -> None:
        try:
            results[actor] = programs[actor](lambda posix: in_turns(posix, turns, actor))
        except Exception as error:
            results[actor] = error
        finally:
            turns.finish(actor)

    threads = [threading.Thread(target=run, args=(actor,)) for actor in range(len(programs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * WAIT_S)
        assert not thread.is_alive()
    return results
