"""Which parameter each position of a foreign optimizer belongs to. Pure functions: what does not fit exactly is refused.

`torch.optim` states name nothing: parameter 7 is the eighth that the program handed over. Swapped moments of two parameters of
one shape would train on without a word, so a mapping is taken only if the order of the parameters is known, or shapes and layer
numbers leave no other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

Shape = tuple[int, ...]

_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")


@dataclass(frozen=True, slots=True)
class Positions:
    """The groups of an optimizer: for each position the shape of its parameter, None where it has no state."""

    groups: tuple[tuple[Shape | None, ...], ...]

    @property
    def count(self) -> int:
        """Parameters in all groups."""
        return sum(len(group) for group in self.groups)


@dataclass(frozen=True, slots=True)
class Unmatched:
    """Why there is no mapping, in a sentence."""

    reason: str


def match_in_order(
    positions: Positions, order: Sequence[str], shapes: Mapping[str, Shape], norms: AbstractSet[str] = frozenset()
) -> list[list[str]] | Unmatched:
    """Names by group, when the order of the model's parameters is known: one group, the groups one after the other, or
    those that trainers make (weights with decay, then biases and norms without; matrices, then vectors; or the other way round).
    """
    if len(order) != positions.count:
        return Unmatched(f"the optimizer has {positions.count} parameters, the model {len(order)}")
    found: list[list[list[str]]] = []
    for groups in _splits(positions, order, shapes, norms):
        if _fits(positions, groups, shapes) and groups not in found:
            found.append(groups)
    if not found:
        return Unmatched("the shapes of its moments are not those of the parameters in any usual order of groups")
    if len(found) > 1:
        return Unmatched(f"{len(found)} different assignments of its moments to parameters fit equally well")
    return found[0]


def match_by_shape(positions: Positions, shapes: Mapping[str, Shape]) -> list[list[str]] | Unmatched:
    """Names by group without any order: only if in each group parameters of one shape differ by layer numbers alone."""
    names = sorted(shapes)
    if len(names) != positions.count:
        return Unmatched(f"the optimizer has {positions.count} parameters, the weights {len(names)}")
    found: list[list[list[str]]] = []
    reason = "the shapes of its moments are not those of the weights in any usual order of groups"
    for members in _splits(positions, names, shapes, frozenset()):
        groups: list[list[str]] = []
        for shapes_of_group, group in zip(positions.groups, members, strict=True):
            ordered = _place_by_shape(shapes_of_group, group, shapes)
            if isinstance(ordered, Unmatched):
                reason = ordered.reason
                break
            groups.append(ordered)
        else:
            if groups not in found:
                found.append(groups)
    if len(found) == 1:
        return found[0]
    return Unmatched(reason if not found else "several assignments of its moments to parameters fit equally well")


def _splits(
    positions: Positions, order: Sequence[str], shapes: Mapping[str, Shape], norms: AbstractSet[str]
) -> Iterable[list[list[str]]]:
    sizes = [len(group) for group in positions.groups]
    consecutive, begin = [], 0
    for size in sizes:
        consecutive.append(list(order[begin : begin + size]))
        begin += size
    yield consecutive
    if len(sizes) != 2:
        return
    without_decay = [name for name in order if _NO_DECAY.search(name) or name in norms]
    vectors = [name for name in order if len(shapes.get(name, ())) < 2]
    for second in (without_decay, vectors):
        first = [name for name in order if name not in set(second)]
        for groups in ([first, second], [second, first]):
            if [len(group) for group in groups] == sizes:
                yield groups


def _fits(positions: Positions, groups: Sequence[Sequence[str]], shapes: Mapping[str, Shape]) -> bool:
    return all(
        shape is None or shapes.get(name) == shape
        for expected, names in zip(positions.groups, groups, strict=True)
        for shape, name in zip(expected, names, strict=True)
    )


def _place_by_shape(
    expected: Sequence[Shape | None], names: Sequence[str], shapes: Mapping[str, Shape]
) -> list[str] | Unmatched:
    if None in expected:
        return Unmatched("some parameters have no moments, so that nothing tells which these are")
    pools: dict[Shape, list[str]] = {}
    for name in names:
        pools.setdefault(shapes[name], []).append(name)
    for pool_shape, pool in pools.items():
        if len({_NUMBER.sub("#", name) for name in pool}) > 1:
            shown = ", ".join(sorted(pool)[:4])
            return Unmatched(f"nothing tells apart the moments of parameters of shape {list(pool_shape)}: {shown}")
        pool.sort(key=_layers, reverse=True)
    placed = []
    for shape in expected:
        assert shape is not None
        if not pools.get(shape):
            return Unmatched(f"it has moments of shape {list(shape)} for which there is no parameter left")
        placed.append(pools[shape].pop())
    return placed


def _layers(name: str) -> tuple[int, ...]:
    return tuple(int(number) for number in _NUMBER.findall(name))
