"""Medians, per-round ratios and judged lines, on rounds that are written down here."""

from __future__ import annotations

import pytest

from benchmarks.figures import Line, Value, judge, medians, ratios, turns

OURS, THEIRS = Value("ours", "save_s"), Value("theirs", "save_s")


def rounds_of(ours: list[float], theirs: list[float]):
    return [{"ours": {"save_s": a}, "theirs": {"save_s": b}} for a, b in zip(ours, theirs, strict=True)]


def test_medians_are_taken_for_each_measure_of_each_contender():
    rounds = [{"a": {"x_s": 3.0, "y_s": 1.0}}, {"a": {"x_s": 1.0}}, {"a": {"x_s": 2.0}, "b": {"x_s": 5.0}}]

    assert medians(rounds) == {"a": {"x_s": 2.0, "y_s": 1.0}, "b": {"x_s": 5.0}}


def test_ratios_are_formed_within_each_round():
    """A machine that slows down over the run slows both; the ratio of the medians would mix fast and slow rounds."""
    rounds = rounds_of(ours=[1.0, 2.0, 10.0], theirs=[2.0, 4.0, 5.0])

    assert ratios(rounds, THEIRS, OURS) == [2.0, 2.0, 0.5]
    assert judge(Line("", "at least", 1.9, THEIRS, OURS), rounds)["value"] == 2.0


def test_a_number_can_stand_below():
    assert ratios(rounds_of([10.0, 20.0], [1.0, 1.0]), OURS, 10.0) == [1.0, 2.0]


def test_a_contender_that_was_not_measured_gives_no_ratio_and_no_verdict():
    rounds = [{"ours": {"save_s": 1.0}}]

    assert ratios(rounds, THEIRS, OURS) is None
    assert judge(Line("", "at least", 1.0, THEIRS, OURS), rounds)["passed"] is None


def test_one_round_without_a_contender_leaves_the_line_unjudged():
    rounds = [*rounds_of([1.0], [2.0]), {"ours": {"save_s": 1.0}}]

    assert judge(Line("", "at least", 1.0, THEIRS, OURS), rounds)["passed"] is None


@pytest.mark.parametrize(
    ("sense", "target", "passed"),
    [
        ("at least", 2.0, True),
        ("at least", 2.01, False),
        ("at most", 2.0, True),
        ("at most", 1.99, False),
    ],
)
def test_a_target_that_is_met_exactly_holds(sense, target, passed):
    line = Line("speed", sense, target, THEIRS, OURS)

    assert judge(line, rounds_of([1.0, 1.0, 1.0], [1.0, 2.0, 9.0]))["passed"] is passed


@pytest.mark.parametrize(("sense", "value"), [("at least", 1.0), ("at most", 9.0)])
def test_where_one_bad_round_counts_the_worst_is_judged(sense, value):
    line = Line("memory", sense, 2.0, THEIRS, OURS, "worst")

    assert judge(line, rounds_of([1.0, 1.0, 1.0], [1.0, 2.0, 9.0]))["value"] == value


def test_the_line_keeps_what_it_was_judged_by():
    judged = judge(Line("speed / theirs", "at least", 3, THEIRS, OURS), rounds_of([1.0, 2.0], [4.0, 4.0]))

    assert judged == {
        "text": "speed / theirs",
        "sense": "at least",
        "target": 3,
        "reduce": "median",
        "ratios": [4.0, 2.0],
        "value": 3.0,
        "passed": True,
    }


@pytest.mark.parametrize("count", [1, 2, 5])
def test_each_contender_begins_equally_often_and_works_once_a_round(count):
    orders = [turns(count, number) for number in range(2 * count)]

    assert all(sorted(order) == list(range(count)) for order in orders)
    assert sorted(order[0] for order in orders) == sorted([*range(count), *range(count)])
