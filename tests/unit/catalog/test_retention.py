"""The retention policy as a pure function: what each rule keeps, and what no policy may ever do."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dckpt.catalog.retention import Best, Candidate, Retention, plan_retention
from dckpt.errors import ConfigError
from dckpt.format.layout import CheckpointId


def candidates(*steps: float, pinned: tuple[int, ...] = (), losses: dict[int, float] | None = None) -> list[Candidate]:
    """Newest first; step 100.3 is step 100 with micro step 3."""
    made = []
    for step in sorted(steps, reverse=True):
        whole, micro = int(step), round(step % 1 * 10)
        metrics = {"loss": losses[whole]} if losses and whole in losses else {}
        made.append(Candidate(CheckpointId(whole, micro, 1), metrics, whole in pinned, created_unix_s=0.0))
    return made


def kept(line: list[Candidate], policy: Retention) -> list[int]:
    return [item.step for item, _ in plan_retention(line, policy).keep]


def test_without_a_rule_everything_stays():
    plan = plan_retention(candidates(1, 2, 3), Retention())

    assert [item.step for item, _ in plan.keep] == [3, 2, 1]
    assert plan.expire == []


def test_an_empty_line_is_an_empty_plan():
    plan = plan_retention([], Retention(last=1))

    assert (plan.keep, plan.expire) == ([], [])


def test_last_keeps_the_newest():
    assert kept(candidates(1, 2, 3, 4), Retention(last=2)) == [4, 3]


def test_every_keeps_the_round_steps():
    assert kept(candidates(500, 1000, 1500, 2000, 2500, 3000), Retention(every=1000)) == [3000, 2000, 1000]


def test_every_keeps_the_newest_of_a_stretch_without_a_round_step():
    assert kept(candidates(700, 1400, 2100, 2800), Retention(every=1000)) == [2800, 1400, 700]


def test_a_save_within_an_accumulation_does_not_displace_the_round_step():
    assert kept(candidates(900, 1000, 1000.3, 1100), Retention(every=1000)) == [1100, 1000]


def test_step_zero_is_a_round_step():
    assert kept(candidates(0, 500, 1000, 1500), Retention(every=1000)) == [1500, 1000, 0]


@pytest.mark.parametrize(("mode", "best"), [("min", [3, 1]), ("max", [2, 3])])
def test_best_keeps_the_lowest_or_highest(mode: str, best: list[int]):
    line = candidates(1, 2, 3, 4, losses={1: 0.1, 2: 0.9, 3: 0.3})

    assert set(kept(line, Retention(best=Best("loss", mode, keep=2)))) == {4, *best}  # type: ignore[arg-type]


def test_of_equal_values_the_newest_is_best():
    line = candidates(1, 2, 3, 4, losses={1: 0.5, 2: 0.5, 3: 0.5})

    assert kept(line, Retention(best=Best("loss"))) == [4, 3]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_never_best(value: float):
    line = candidates(1, 2, 3, losses={1: 0.5, 2: value})

    assert kept(line, Retention(best=Best("loss"))) == [3, 1]


def test_daily_keeps_the_newest_of_each_of_the_newest_days_that_have_one():
    """The second day of the four has none: it does not count."""
    day = 86400.0
    saved = {10: 100.2, 20: 100.9, 30: 102.0, 40: 102.999, 50: 103.5, 60: 0.0}
    line = [
        Candidate(CheckpointId(step, 0, 1), {}, False, created_unix_s=days * day)
        for step, days in sorted(saved.items(), reverse=True)
    ]

    assert kept(line, Retention(daily=2)) == [60, 50, 40]
    assert kept(line, Retention(daily=9)) == [60, 50, 40, 20]


def test_a_clock_that_went_back_does_not_make_an_older_step_the_newest_of_its_day():
    line = [
        Candidate(CheckpointId(step, 0, 1), {}, False, created_unix_s=saved)
        for step, saved in ((30, 86400.0 * 9), (20, 1000.0), (10, 2000.0))
    ]

    assert kept(line, Retention(daily=2)) == [30, 20]


@pytest.mark.parametrize("seconds", [0.0, -1.0, 1e300, 1e15])
def test_a_time_that_no_calendar_has_is_of_no_day(seconds: float):
    line = [Candidate(CheckpointId(step, 0, 1), {}, False, created_unix_s=seconds) for step in (2, 1)]

    plan = plan_retention(line, Retention(daily=3))

    assert [item.step for item in plan.expire] == [1]
    assert plan.lost[plan.expire[0]] == "saved on a day that is not known"


def test_the_newest_and_pinned_ones_stay_whatever_the_policy():
    line = candidates(1, 2, 3, 4, pinned=(2,), losses={1: 0.1})

    assert kept(line, Retention(best=Best("loss"))) == [4, 2, 1]


def test_the_plan_names_every_reason():
    plan = plan_retention(candidates(1000, 2000, pinned=(2000,), losses={2000: 0.1}), Retention(1, 1000, Best("loss")))

    assert plan.keep[0][1] == ("newest", "pinned", "last 1", "every 1000", "best loss")
    assert plan.keep[1][1] == ("every 1000",)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Retention(last=0),
        lambda: Retention(last=-1),
        lambda: Retention(last=True),
        lambda: Retention(last=1.5),
        lambda: Retention(every=0),
        lambda: Retention(best="loss"),
        lambda: Retention(daily=0),
        lambda: Best(""),
        lambda: Best("loss", "lowest"),
        lambda: Best("loss", keep=0),
    ],
)
def test_a_policy_that_means_nothing_is_refused(make):
    with pytest.raises(ConfigError):
        make()


policies = st.builds(
    Retention,
    last=st.none() | st.integers(1, 8),
    every=st.none() | st.integers(1, 60),
    best=st.none() | st.builds(Best, st.just("loss"), st.sampled_from(["min", "max"]), st.integers(1, 4)),
    daily=st.none() | st.integers(1, 6),
)
ids = st.builds(CheckpointId, st.integers(0, 200), st.integers(0, 3), st.integers(1, 3))
lines = st.lists(
    st.builds(
        Candidate,
        id=ids,
        metrics=st.dictionaries(st.just("loss"), st.floats(width=16)),
        is_pinned=st.booleans(),
        created_unix_s=st.integers(0, 12).map(lambda halves: halves * 43200.0),
    ),
    unique_by=lambda item: item.id,
    max_size=25,
).map(lambda found: sorted(found, key=lambda item: item.id, reverse=True))


@given(lines, policies)
def test_every_candidate_is_decided_once_and_the_order_is_kept(line: list[Candidate], policy: Retention):
    plan = plan_retention(line, policy)
    order = [item.id for item in line]

    assert sorted([item for item, _ in plan.keep] + plan.expire, key=order.index) == order
    assert [item for item, _ in plan.keep] == [item for item in order if item not in plan.expire]
    assert all(reasons for _, reasons in plan.keep)
    assert set(plan.lost) == set(plan.expire) and all(plan.lost.values())


@given(lines, policies)
def test_the_newest_and_pinned_ones_are_never_expired(line: list[Candidate], policy: Retention):
    expired = set(plan_retention(line, policy).expire)

    assert not line or line[0].id not in expired
    assert not any(item.is_pinned and item.id in expired for item in line)


@given(lines, policies)
def test_what_was_kept_is_kept_again(line: list[Candidate], policy: Retention):
    """Applying a policy twice expires nothing more: otherwise each save would eat into what the last one kept."""
    expired = set(plan_retention(line, policy).expire)

    assert plan_retention([item for item in line if item.id not in expired], policy).expire == []


@given(lines, policies)
def test_a_rule_more_never_keeps_less(line: list[Candidate], policy: Retention):
    both = set(plan_retention(line, policy).expire)

    for one in (
        Retention(last=policy.last),
        Retention(every=policy.every),
        Retention(best=policy.best),
        Retention(daily=policy.daily),
    ):
        if one != Retention():
            assert both <= set(plan_retention(line, one).expire)
