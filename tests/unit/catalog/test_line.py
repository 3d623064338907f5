"""The line of a run: lineage as a pure function over generation records and checkpoint names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dckpt.catalog.line import Line, trace_line
from dckpt.errors import CorruptCheckpointError, FormatVersionError, StorageMissingError
from dckpt.format.generation import Generation, Parent, Reason
from dckpt.format.layout import CheckpointId


def at(step: int, generation: int, micro_step: int = 0) -> CheckpointId:
    return CheckpointId(step, micro_step, generation)


def record(number: int, parent: CheckpointId | None) -> Generation:
    link = None
    if parent is not None:
        link = Parent(parent.name, parent.step, parent.micro_step, parent.generation, "0" * 64)
    return Generation(number, "run", link, "start", 1, 0.0, "nonce")


def trace(
    checkpoints: list[CheckpointId], parents: Mapping[int, CheckpointId | None], newest: int | None = None
) -> Line:
    def read(number: int) -> Generation:
        if number not in parents:
            raise StorageMissingError(f"generation {number} is not there")
        return record(number, parents[number])

    return trace_line(checkpoints, max(parents, default=0) if newest is None else newest, read)


def test_an_empty_run_has_an_empty_line():
    assert trace([], {}) == Line((), (), ())


def test_the_ends_of_earlier_legs_are_known():
    """Where a leg began, its parent ended the leg before, also if it is gone by now."""
    records = {1: record(1, None), 2: record(2, at(200, 1)), 3: record(3, at(250, 2)), 4: record(4, at(300, 3))}
    for number in (2, 4):
        records[number] = replace(records[number], reason="leg")
    checkpoints = [at(100, 1), at(200, 1), at(250, 2), at(320, 4)]

    assert trace_line(checkpoints, 4, records.__getitem__).leg_ends == (at(300, 3), at(200, 1))
    assert trace_line(checkpoints, 3, records.__getitem__).leg_ends == (at(200, 1),)


def test_a_generation_without_a_checkpoint_continues_its_parent():
    found = trace([at(100, 1), at(200, 1)], {1: None, 2: at(200, 1)})

    assert found.on_line == (at(200, 1), at(100, 1))


@pytest.mark.parametrize("reason", ["repair", "reshard", "import"])
def test_a_repair_that_died_before_its_commit_takes_nothing_off_the_line(reason: Reason):
    records = {1: record(1, None), 2: replace(record(2, at(200, 1)), reason=reason)}
    checkpoints = [at(100, 1), at(200, 1), at(300, 1)]

    died = trace_line(checkpoints, 2, records.__getitem__)
    committed = trace_line([*checkpoints, at(200, 2)], 2, records.__getitem__)

    assert died == Line((at(300, 1), at(200, 1), at(100, 1)), (), ())
    assert committed == Line((at(200, 2), at(200, 1), at(100, 1)), (at(300, 1),), ())


def test_repairs_that_died_one_after_the_other_lead_to_the_rollback_before_them():
    records = {
        1: record(1, None),
        2: replace(record(2, at(100, 1)), reason="rollback"),
        3: replace(record(3, at(200, 1)), reason="repair"),
        4: replace(record(4, at(200, 1)), reason="repair"),
    }

    found = trace_line([at(100, 1), at(200, 1)], 4, records.__getitem__)

    assert found == Line((at(100, 1),), (at(200, 1),), ())


def test_a_repaired_checkpoint_that_was_expired_after_training_went_on_still_bounds_the_line():
    """Generation 3 continues the repaired step 200: step 300 of generation 1 stays superseded."""
    records = {1: record(1, None), 2: replace(record(2, at(200, 1)), reason="repair"), 3: record(3, at(200, 2))}

    for own in ([at(250, 3)], []):
        found = trace_line([at(200, 1), at(300, 1), *own], 3, records.__getitem__)

        assert found.on_line == (*own, at(200, 1))


def test_walking_back_and_retraining_supersedes_what_came_after():
    """Step 300 was damaged: generation 2 continues from 200 and commits its own 300."""
    found = trace([at(100, 1), at(200, 1), at(300, 1), at(300, 2), at(400, 2)], {1: None, 2: at(200, 1)})

    assert found.on_line == (at(400, 2), at(300, 2), at(200, 1), at(100, 1))
    assert found.superseded == (at(300, 1),)
    assert found.notes == ()


def test_a_rollback_that_committed_nothing_yet_already_decides_the_latest():
    found = trace([at(100, 1), at(200, 1), at(300, 1)], {1: None, 2: at(100, 1)})

    assert found.on_line == (at(100, 1),)
    assert found.superseded == (at(200, 1), at(300, 1))


def test_a_generation_between_that_was_skipped_is_superseded_with_all_it_has():
    found = trace([at(100, 1), at(150, 2), at(120, 3)], {1: None, 2: at(100, 1), 3: at(100, 1)})

    assert found.on_line == (at(120, 3), at(100, 1))
    assert found.superseded == (at(150, 2),)


def test_a_zombies_late_commit_is_superseded():
    """Generation 1 commits 300 after generation 2 has started from 200, in the gap between its check and its rename."""
    found = trace([at(200, 1), at(250, 2), at(300, 1)], {1: None, 2: at(200, 1)})

    assert found.on_line == (at(250, 2), at(200, 1))


def test_the_bound_of_a_parent_counts_its_micro_step():
    found = trace([at(100, 1), at(100, 1, 2), at(100, 1, 3)], {1: None, 2: at(100, 1, 2)})

    assert found.on_line == (at(100, 1, 2), at(100, 1))


def test_a_parent_that_retention_expired_still_bounds_the_line():
    found = trace([at(100, 1), at(300, 1), at(250, 2)], {1: None, 2: at(200, 1)})

    assert found.on_line == (at(250, 2), at(100, 1))


def test_a_new_start_beside_older_generations_leaves_them_superseded():
    found = trace([at(100, 1), at(10, 2)], {1: None, 2: None})

    assert (found.on_line, found.superseded) == ((at(10, 2),), (at(100, 1),))


def test_without_any_record_the_newest_generation_by_name_is_the_line_and_it_is_said():
    found = trace([at(100, 1), at(200, 2), at(300, 2)], {}, newest=2)

    assert found.on_line == (at(300, 2), at(200, 2))
    assert found.superseded == (at(100, 1),)
    assert "Lineage before generation 2 is unknown" in found.notes[0]


def test_a_missing_record_in_the_middle_ends_the_line_and_is_said():
    found = trace([at(100, 1), at(200, 2), at(300, 3)], {1: None, 3: at(200, 2)})

    assert found.on_line == (at(300, 3), at(200, 2))
    assert found.superseded == (at(100, 1),)
    assert "generation 2" in found.notes[0]


def test_a_missing_record_before_which_nothing_is_left_is_no_problem():
    assert trace([at(200, 2)], {}, newest=2) == Line((at(200, 2),), (), ())


@pytest.mark.parametrize("error", [CorruptCheckpointError("flipped"), StorageMissingError("gone")])
def test_an_unreadable_newest_record_makes_the_latest_unknown_not_absent(error: Exception):
    """A rollback may be written in it: taking the older end of the line could bring back what was rolled back."""

    def read(number: int) -> Generation:
        raise error

    with pytest.raises(CorruptCheckpointError, match="by its full name"):
        trace_line([at(100, 1)], 2, read)


def test_a_record_of_a_newer_dckpt_is_a_version_error():
    def read(number: int) -> Generation:
        raise FormatVersionError("newer")

    with pytest.raises(FormatVersionError):
        trace_line([at(100, 1)], 2, read)


events = st.lists(
    st.one_of(
        st.tuples(st.just("commit"), st.integers(1, 5)),
        st.tuples(st.just("resume"), st.just(0)),
        st.tuples(st.just("roll back"), st.integers(0, 20)),
    ),
    max_size=30,
)


@given(events)
def test_the_line_is_what_a_run_lived_through(happened: list[tuple[str, int]]):
    """Replays a run and keeps its own list of what the current state descends from."""
    parents: dict[int, CheckpointId | None] = {1: None}
    everything: list[CheckpointId] = []
    line: list[CheckpointId] = []
    generation, step = 1, 0
    for kind, number in happened:
        if kind == "commit":
            step += number
            line.append(at(step, generation))
            everything.append(line[-1])
        elif line:
            if kind == "roll back":
                del line[1 + number % len(line) :]
            generation, step = generation + 1, line[-1].step
            parents[generation] = line[-1]

    found = trace(everything, parents)

    assert list(found.on_line) == line[::-1]
    assert sorted(found.on_line + found.superseded) == sorted(everything)
