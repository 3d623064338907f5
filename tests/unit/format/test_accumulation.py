from __future__ import annotations

import itertools

import pytest

from dckpt.format.accumulation import carried_micro_step, is_in_short_step


def taken(micro_step: int, batch: tuple[int, int, int]) -> list[int]:
    """Samples of a step in the first micro-batches of all ranks: rank r takes every W-th from the r-th on."""
    micro, accumulation, ranks = batch
    step = range(micro * accumulation * ranks)
    found = sorted(i for rank in range(ranks) for i in step[rank::ranks][: micro * micro_step])
    # The same if ranks take turns at micro-batches.
    own = [step[begin : begin + micro] for begin in range(0, len(step), micro)]
    assert found == sorted(i for rank in range(ranks) for batch in own[rank::ranks][:micro_step] for i in batch)
    return found


def test_the_same_samples_are_in_the_gradients_whatever_the_split():
    sizes = (1, 2, 3, 4, 6, 8, 12)
    splits = [(m, a, w) for m, a, w in itertools.product(sizes, repeat=3) if m * a * w == 24]
    carried = 0
    for saved, live in itertools.product(splits, repeat=2):
        for micro_step in range(1, saved[1] + 1):
            found = carried_micro_step(micro_step, saved, live)
            if isinstance(found, int):
                carried += 1
                assert taken(found, live) == taken(micro_step, saved)
                assert 1 <= found <= live[1]
            else:
                assert "not a whole number" in found
                assert len(taken(micro_step, saved)) % (live[0] * live[2])
    assert carried > 500


def test_another_global_batch_gives_the_gradients_another_weight():
    found = carried_micro_step(2, (2, 4, 4), (2, 2, 4))
    assert isinstance(found, str)
    assert "a step of 32 samples, and a step has 16 now" in found


@pytest.mark.parametrize(
    ("saved", "live"), [(None, None), ((2, 4, 1), None), (None, (2, 4, 1)), ((2, 4, 1), (2, 4, 1))]
)
def test_what_nobody_said_or_nobody_changed_stays(saved, live):
    assert carried_micro_step(3, saved, live) == 3


def position(cursor: int, tail: str = "short") -> dict[str, object]:
    return {"kind": "stateful", "state": {"size": 100, "cursor": cursor, "global_batch": 16, "tail": tail}}


def test_a_shorter_last_step_goes_on_as_it_began_or_begins_again():
    assert is_in_short_step(position(96))
    assert is_in_short_step({"kind": "several", "state": {"a": position(0), "b": position(96)}})
    for other in (
        position(80),
        position(96, "drop"),
        None,
        {"kind": "stateful", "state": {"consumed": 96}},
        {"state": 3},
    ):
        assert not is_in_short_step(other)
    assert carried_micro_step(1, (2, 4, 2), (2, 4, 2), is_short=True) == 1
    found = carried_micro_step(1, (2, 4, 2), (4, 2, 2), is_short=True)
    assert isinstance(found, str)
    assert "shorter last step" in found
