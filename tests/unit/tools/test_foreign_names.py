"""Moments go to the parameter they belong to, or nowhere: no assignment is taken that another one could equal."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dckpt.tools.foreign_names import Positions, Unmatched, match_by_shape, match_in_order

SHAPES = {
    "embed.weight": (16, 8),
    "layers.0.up.weight": (32, 8),
    "layers.0.up.bias": (32,),
    "layers.0.norm.weight": (8,),
    "layers.1.up.weight": (32, 8),
    "layers.1.up.bias": (32,),
    "layers.1.norm.weight": (8,),
}
ORDER = list(SHAPES)
DECAY = ["embed.weight", "layers.0.up.weight", "layers.1.up.weight"]
REST = [name for name in ORDER if name not in DECAY]


def positions(*groups: list[str]) -> Positions:
    return Positions(tuple(tuple(SHAPES[name] for name in group) for group in groups))


@pytest.mark.parametrize("groups", [[ORDER], [DECAY, REST], [REST, DECAY], [ORDER[:2], ORDER[2:]]])
def test_the_usual_groups_are_recognised_when_the_order_is_known(groups: list[list[str]]) -> None:
    assert match_in_order(positions(*groups), ORDER, SHAPES) == groups


@pytest.mark.parametrize("groups", [[ORDER], [DECAY, REST], [REST, DECAY]])
def test_layer_numbers_are_enough_where_shapes_tell_the_rest(groups: list[list[str]]) -> None:
    shuffled = dict(random.Random(3).sample(list(SHAPES.items()), len(SHAPES)))

    assert match_by_shape(positions(*groups), shuffled) == groups


def test_the_tenth_layer_comes_after_the_ninth() -> None:
    shapes = {f"layers.{number}.weight": (4, 4) for number in range(12)}
    names = list(shapes)

    found = match_by_shape(Positions((tuple(shapes[name] for name in names),)), dict(sorted(shapes.items())))

    assert found == [names]


def test_two_parameters_of_one_shape_in_a_layer_are_not_told_apart() -> None:
    shapes = {"layers.0.key.weight": (4, 4), "layers.0.query.weight": (4, 4)}

    found = match_by_shape(Positions((((4, 4), (4, 4)),)), shapes)

    assert isinstance(found, Unmatched) and "nothing tells apart" in found.reason


def test_two_ways_that_fit_equally_well_are_no_way() -> None:
    """Square matrices without and with decay: as they come, or by the rule of trainers."""
    shapes = {"a.norm.weight": (4, 4), "b.weight": (4, 4)}

    found = match_in_order(Positions((((4, 4),), ((4, 4),))), list(shapes), shapes)

    assert isinstance(found, Unmatched) and "equally well" in found.reason


def test_other_shapes_and_counts_are_refused() -> None:
    assert isinstance(match_in_order(positions(ORDER[1:]), ORDER, SHAPES), Unmatched)
    assert isinstance(match_in_order(positions([*ORDER[1:], ORDER[0]]), ORDER, SHAPES), Unmatched)
    assert isinstance(match_by_shape(positions(ORDER[1:]), SHAPES), Unmatched)
    assert isinstance(match_by_shape(Positions((((3, 3),) * len(ORDER),)), SHAPES), Unmatched)


def test_a_parameter_without_moments_has_its_place_by_order_alone() -> None:
    held = Positions((tuple(None if name == ORDER[2] else SHAPES[name] for name in ORDER),))

    assert match_in_order(held, ORDER, SHAPES) == [ORDER]
    assert isinstance(match_by_shape(held, SHAPES), Unmatched)


@given(st.lists(st.sampled_from([(4,), (4, 4), (8, 4)]), min_size=1, max_size=8), st.randoms())
def test_no_assignment_by_shape_is_ever_wrong(shapes: list[tuple[int, ...]], rng: random.Random) -> None:
    """Whatever the true order is: the answer is it, or none. Numbers follow the order, as lists of modules do."""
    kinds = ["x", "y", "z"]
    names = [f"{rng.choice(kinds)}.{number}.w" for number in range(len(shapes))]
    by_name = dict(zip(names, shapes, strict=True))
    order = names[:]

    found = match_by_shape(Positions((tuple(by_name[name] for name in order),)), by_name)

    assert isinstance(found, Unmatched) or found == [order]
