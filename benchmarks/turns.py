"""Contenders take turns: within each round every one works once, and each round another one begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.figures import Round, turns
from benchmarks.series import Entrant
from benchmarks.world import World


@dataclass(frozen=True, slots=True)
class Contender:
    """Someone who is measured. `work` does the whole turn once on every rank and returns {measure: value}.

    What `work` does before and after the part that it times (removing what the last turn wrote, emptying caches) is its
    own business and costs it nothing.
    """

    entrant: Entrant
    work: Callable[[], dict[str, float]]


def take_turns(world: World, contenders: Sequence[Contender], rounds: int) -> list[Round]:
    """The measured rounds. A round before them is discarded: in it memory is touched, modules are imported and plans made
    for the first time."""
    measured: list[Round] = []
    for number in range(rounds + 1):
        found: Round = {}
        for place in turns(len(contenders), number):
            contender = contenders[place]
            world.barrier()
            found[contender.entrant.name] = contender.work()
        if number:
            measured.append(found)
    return measured


def entrants(contenders: Sequence[Contender]) -> tuple[Entrant, ...]:
    """Who took part, in the order of the tables."""
    return tuple(contender.entrant for contender in contenders)
