"""The line of a run as a pure function: which checkpoints `latest` may mean, and which are superseded."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from dckpt.errors import CorruptCheckpointError, DckptError, FormatVersionError, StorageMissingError
from dckpt.format.generation import Generation
from dckpt.format.layout import CheckpointId

ONE_CHECKPOINT = ("repair", "reshard", "import")
"""Reasons of generations that are made for the one checkpoint that is committed right after the record."""


@dataclass(frozen=True, slots=True)
class Line:
    """`on_line` newest first, `superseded` ascending. `notes` say where the lineage could not be followed.

    leg_ends: checkpoints of the line, newest first, after which a new leg began; whether or not they are still there.
    """

    on_line: tuple[CheckpointId, ...]
    superseded: tuple[CheckpointId, ...]
    notes: tuple[str, ...]
    leg_ends: tuple[CheckpointId, ...] = ()


def trace_line(checkpoints: Collection[CheckpointId], newest: int, read_record: Callable[[int], Generation]) -> Line:
    """Follows the parents from generation `newest` (0: none) down; FORMAT.md, section 9.

    A record that is missing or damaged ends the line there, with a note: what lies before it was continued by
    nobody knows whom, so it is superseded and has to be named in full. If the line would be empty because of
    it although older checkpoints exist, the record's error is raised: `latest` is then unknown, not absent.

    A newest record whose one checkpoint is not there is passed over: a repair or reshard died between the two, and training never
    went on from its parent. It still fences.
    """
    on_line: list[CheckpointId] = []
    notes: list[str] = []
    leg_ends: list[CheckpointId] = []
    number, bound = newest, None
    while number > 0:
        on_line += _of_generation(checkpoints, number, bound)
        try:
            record = read_record(number)
        except (StorageMissingError, CorruptCheckpointError, FormatVersionError) as error:
            if not any(item.generation < number for item in checkpoints):
                if not isinstance(error, StorageMissingError):
                    notes.append(f"{error} No older checkpoint depends on this record.")
                break
            if not on_line:
                raise _unknown_latest(number, error) from error
            notes.append(
                f"Lineage before generation {number} is unknown: {error} Older checkpoints count as "
                "superseded; load one by its full name."
            )
            break
        if not on_line and record.reason in ONE_CHECKPOINT and record.parent is not None and bound is None:
            number -= 1
            continue
        parent = record.parent
        if parent is None:
            break
        if record.reason == "leg":
            leg_ends.append(parent.id)
        assert parent.generation < number, "parse_generation refuses a parent that is not older"
        number, bound = parent.generation, (parent.step, parent.micro_step)
    chosen = set(on_line)
    superseded = tuple(sorted(item for item in checkpoints if item not in chosen))
    return Line(on_line=tuple(on_line), superseded=superseded, notes=tuple(notes), leg_ends=tuple(leg_ends))


def _of_generation(
    checkpoints: Collection[CheckpointId], number: int, bound: tuple[int, int] | None
) -> list[CheckpointId]:
    found = [
        item
        for item in checkpoints
        if item.generation == number and (bound is None or (item.step, item.micro_step) <= bound)
    ]
    return sorted(found, reverse=True)


def _unknown_latest(number: int, error: DckptError) -> DckptError:
    if isinstance(error, FormatVersionError):
        return error
    return CorruptCheckpointError(
        f"Generation {number}: its record decides which checkpoint is the latest, and it cannot be read: "
        f"{error} Load a checkpoint by its full name; `dckpt ls` shows them.",
        key=getattr(error, "key", None),
        field="parent",
        expected="a readable record",
        found=type(error).__name__,
    )
