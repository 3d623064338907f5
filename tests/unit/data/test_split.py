"""Splits are functions of their arguments, disjoint, and stay what they are when data is appended."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from dckpt.data.split import split_indices
from dckpt.errors import ConfigError


def test_the_first_validation_items_of_version_1_are_these():
    """A change here moves items between training and validation of every run: it needs another SPLIT_VERSION."""
    assert split_indices(200, validation=0.05, seed=0).validation.tolist() == GOLDEN
    assert split_indices([f"{i}.jpg" for i in range(200)], validation=0.05, seed=0).validation.tolist() == GOLDEN_KEYS


@pytest.mark.parametrize("validation", [0.1, 0.5, 100, 999])
def test_each_item_is_on_exactly_one_side(validation):
    split = split_indices(1000, validation=validation, seed=3)
    assert sorted([*split.train.tolist(), *split.validation.tolist()]) == list(range(1000))
    assert split.train.dtype == split.validation.dtype == np.int64
    assert split.train.tolist() == sorted(split.train.tolist())
    assert split.size == 1000
    if isinstance(validation, int):
        assert len(split.validation) == validation


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.9])
def test_a_fraction_is_met_on_average(fraction):
    size = 100_000
    taken = len(split_indices(size, validation=fraction, seed=1).validation)
    assert abs(taken - fraction * size) < 4 * math.sqrt(size * fraction * (1 - fraction))


def test_seeds_split_differently_and_independently():
    a, b = (set(split_indices(100_000, validation=0.5, seed=seed).validation.tolist()) for seed in (0, 1))
    assert abs(len(a & b) - 25_000) < 4 * math.sqrt(100_000 * 0.25 * 0.75)


def test_appended_items_change_nothing_for_those_before():
    before, after = (split_indices(size, validation=0.2, seed=7) for size in (500, 5000))
    assert after.validation[after.validation < 500].tolist() == before.validation.tolist()
    assert after.train[after.train < 500].tolist() == before.train.tolist()
    assert (after.validation >= 500).any()


def test_a_count_stays_what_it_is_among_the_items_of_its_first_time():
    before = split_indices(500, validation=50, seed=7)
    after = split_indices(5000, validation=50, seed=7, among=500)
    assert after.validation.tolist() == before.validation.tolist()
    loose = split_indices(5000, validation=50, seed=7)
    assert loose.validation.tolist() != before.validation.tolist(), "the case that among= is for"


def test_a_key_keeps_its_side_wherever_it_stands():
    names = [f"speaker-{i % 40}/clip-{i}" for i in range(400)]
    split = split_indices(names, validation=0.2, seed=5)
    again = split_indices(names[::-1], validation=0.2, seed=5)
    assert {names[i] for i in split.validation} == {names[::-1][i] for i in again.validation}
    speakers = [name.split("/")[0] for name in names]
    parted = split_indices(speakers, validation=0.2, seed=5)
    assert not {speakers[i] for i in parted.train} & {speakers[i] for i in parted.validation}


def test_a_fingerprint_is_equal_for_equal_splits_alone():
    made = split_indices(300, seed=0)
    assert made.fingerprint == split_indices(300, seed=0).fingerprint
    others = [split_indices(300, seed=1), split_indices(301, seed=0), split_indices(300, validation=0.11, seed=0)]
    assert len({split.fingerprint for split in [made, *others]}) == 4
    facts = made.facts()
    assert json.loads(json.dumps(facts)) == facts
    assert (facts["train"], facts["validation"], facts["seed"]) == (len(made.train), len(made.validation), 0)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"items": 1, "seed": 0}, "items=1"),
        ({"items": True, "seed": 0}, "items=True"),
        ({"items": 10, "seed": -1}, "seed=-1"),
        ({"items": 10, "seed": 0, "validation": 1.0}, "between 0 and 1"),
        ({"items": 10, "seed": 0, "validation": 0}, "between 0 and 1"),
        ({"items": 10, "seed": 0, "validation": True}, "between 0 and 1"),
        ({"items": 10, "seed": 0, "validation": 10}, "found 10 of 10"),
        ({"items": 10, "seed": 0, "validation": 0.0001}, "found 0 of 10"),
        ({"items": 10, "seed": 0, "among": 0}, "among=0"),
        ({"items": ["a", 1.5], "seed": 0}, "key 1: expected str, bytes or int, found float"),
        ({"items": ["a", "a", "b"], "seed": 0, "validation": 1}, "same key"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, match):
    with pytest.raises(ConfigError, match=match):
        split_indices(arguments.pop("items"), **arguments)


GOLDEN = [12, 18, 28, 29, 54, 85, 107, 134, 163]
GOLDEN_KEYS = [0, 3, 12, 38, 69, 78, 104, 146, 170, 187]
