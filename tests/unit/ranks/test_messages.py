"""The sentences that survivors read."""

from __future__ import annotations

import json

import pytest

from dckpt.errors import ConfigError, CorruptCheckpointError, PeerFailedError
from dckpt.ranks import messages

STANDS = "The save is abandoned; the previous checkpoint stands."


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([5], "rank 5"),
        ([0, 1], "ranks 0 and 1"),
        ([1, 2, 3], "ranks 1-3"),
        ([1, 2, 3, 7], "ranks 1-3 and 7"),
        ([7, 3, 2, 1, 1], "ranks 1-3 and 7"),
        ([0, 2, 4], "ranks 0, 2 and 4"),
        ([0, 1, 2, 5, 6, 9], "ranks 0-2, 5, 6 and 9"),
        (list(range(4096)), "ranks 0-4095"),
    ],
)
def test_ranks_are_listed_as_people_write_them(ranks: list[int], expected: str) -> None:
    assert messages.format_ranks(ranks) == expected


def test_one_failed_rank_is_named_with_phase_and_text() -> None:
    error = messages.peers_failed("save of step 100", "plan", {3: ("OSError", "OSError: disk gone.")}, STANDS)

    assert str(error) == f"save of step 100: rank 3 failed in phase plan: OSError: disk gone. {STANDS}"
    assert (error.rank, error.phase, error.cause) == (3, "plan", "OSError")


def test_several_failed_ranks_are_named_lowest_first_and_equal_texts_once() -> None:
    failures = {7: ("A", "A: x"), 2: ("B", "B: y"), 5: ("A", "A: x"), 6: ("A", "A: x")}

    error = messages.peers_failed("save of step 1", "write", failures, STANDS)

    assert "rank 2 failed in phase write: B: y; ranks 5-7 failed in phase write: A: x. The" in str(error)
    assert (error.rank, error.cause) == (2, "B")


def test_many_different_failures_name_every_rank_but_not_every_text() -> None:
    failures = {rank: ("E", f"E: number {rank}") for rank in range(100)}

    text = str(messages.peers_failed("save of step 1", "write", failures, STANDS))

    assert "number 3;" in text
    assert "number 4" not in text
    assert "; ranks 4-99 failed too. " in text


def test_absent_and_stalled_ranks_are_told_apart() -> None:
    error = messages.ranks_late(
        "save of step 100",
        "plan",
        absent=[1, 2, 3],
        stalled=[5],
        call="save(step=100)",
        deadline_s=60,
        consequence=STANDS,
    )

    assert str(error) == (
        "save of step 100: ranks 1-3 did not call save(step=100) within 60 s; every rank must call it; "
        f"rank 5 made no progress in phase plan for 60 s. {STANDS}"
    )
    assert error.ranks == [1, 2, 3, 5]


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("two\nlines\tof it"), "ValueError: two lines of it"),
        (ValueError("lone \udc80 surrogate"), "ValueError: lone \udc80 surrogate"),
        (Unprintable(), "Unprintable (its text cannot be read)"),
        (ConfigError("Ours."), "Ours."),
    ],
)
def test_any_exception_crosses_as_one_line(error: Exception, expected: str) -> None:
    cause, message = messages.failure_from_bytes(messages.failure_to_bytes(error))

    assert (cause, message) == (type(error).__name__, expected)


def test_a_text_of_megabytes_is_cut() -> None:
    assert len(messages.sentence(ValueError("x" * 5_000_000))) < messages.TEXT_CHARS_MAX + 100


def test_our_errors_cross_with_type_and_fields_even_if_a_field_is_not_json() -> None:
    error = CorruptCheckpointError("File f: broken.", key="f", field="x", expected={1, 2}, found=b"\xff")

    text = messages.error_to_text(error)
    back = messages.error_from_text(text)

    assert text.isascii()
    assert type(back) is CorruptCheckpointError
    assert (back.message, back.key) == (error.message, "f")
    assert json.loads(text)["fields"]["found"] == repr(b"\xff")


def test_a_peer_error_crosses_unchanged() -> None:
    error = messages.coordinator_lost("save of step 1", "write", STANDS)

    back = messages.error_from_text(messages.error_to_text(error))

    assert type(back) is PeerFailedError
    assert (back.message, back.fields()) == (error.message, error.fields())
