"""The table of symptoms names tests that exist, for each symptom one without dckpt and one with it, and every test is in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROWS = [
    [cell.strip() for cell in line.strip("| ").split(" | ")]
    for line in (HERE / "README.md").read_text().split("|---|---|---|\n")[1].strip().splitlines()
]
WITHOUT_DCKPT = ("test_torch_alone_", "test_without_dckpt_")
CONTROLS = {"test_a_whole_one_goes_on_as_if_nothing_had_been"}
"""Tests of no symptom: that nothing is said where nothing is wrong."""


def named_in(cell: str) -> set[tuple[str, str]]:
    return set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", cell))


def defined_tests() -> set[tuple[str, str]]:
    return {
        (path.name, name)
        for path in HERE.glob("test_*.py")
        if path != Path(__file__)
        for name in re.findall(r"^def (test_\w+)", path.read_text(), flags=re.MULTILINE)
    }


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_symptom_has_a_test_without_dckpt_and_one_with_it(row: list[str]) -> None:
    _, without, with_it = row

    assert named_in(without) and named_in(with_it)
    assert named_in(without) | named_in(with_it) <= defined_tests()
    assert all(name.startswith(WITHOUT_DCKPT) for _, name in named_in(without))
    assert not any(name.startswith(WITHOUT_DCKPT) for _, name in named_in(with_it))


def test_every_test_belongs_to_a_symptom() -> None:
    named = {test for row in ROWS for cell in row[1:] for test in named_in(cell)}

    assert {name for _, name in defined_tests() - named} == CONTROLS


@pytest.mark.parametrize(
    "symptom",
    [
        "loss spikes",
        "moments are reset",
        "schedule starts again",
        "schedule is not the optimizer's",
        "random states are missing, or the start crashes",
        "left in eval mode",
        "vocabulary changed",
        "batch size changed silently",
        "within an accumulation",
        "gradient mask of an extended vocabulary",
        "split into training and validation",
        "second round on new data",
        "`checkpoint-9` comes after `checkpoint-119`",
        "no random states",
        "no optimizer state",
    ],
)
def test_what_is_reported_most_is_in_the_table(symptom: str) -> None:
    assert [row for row in ROWS if symptom in row[0]]
