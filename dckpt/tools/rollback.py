"""`dckpt rollback`: what it changes, as a record, and doing it."""

from __future__ import annotations

from dataclasses import dataclass

from dckpt.catalog.rollback import Rollback, plan_rollback, roll_back
from dckpt.errors import CorruptCheckpointError
from dckpt.storage.base import Storage
from dckpt.tools.inspect import list_leftovers
from dckpt.tools.verify import verify_checkpoint


@dataclass(frozen=True, slots=True)
class RollbackPlan:
    """What a person wants to know before it happens; names newest first."""

    url: str
    checkpoint: str
    latest: str | None
    """The latest until now."""
    generation: int
    """The number of the record that is added."""
    superseded: tuple[str, ...]
    restored: tuple[str, ...]
    youngest_attempt_s: float | None
    """Seconds since a save that has not committed was last touched: a small number means that a job is saving now."""


def describe_rollback(
    storage: Storage, step: str | int, *, now_unix_s: float
) -> tuple[Rollback | None, RollbackPlan | None]:
    """The plan, and what it looks like; (None, None) if the step is the latest already.

    Reads the target's manifest, index, headers and checksums, no tensor data: `CorruptCheckpointError` if one is damaged.
    """
    plan = plan_rollback(storage, step, now_unix_s=now_unix_s)
    if plan is None:
        return None, None
    report = verify_checkpoint(storage, plan.target.name, is_run=True, is_quick=True)
    if report.damages:
        first = report.damages[0]
        raise CorruptCheckpointError(
            f"Rollback to {plan.target.name} of {storage.url}: expected a whole checkpoint, found {first.file}: {first.what}. "
            "Nothing was changed: see `dckpt verify`, and choose another step or repair this one first.",
            key=first.file,
        )
    attempts = [
        row.age_s for row in list_leftovers(storage, older_than_s=0, now_unix_s=now_unix_s) if row.kind == "staging"
    ]
    return plan, RollbackPlan(
        url=storage.url,
        checkpoint=plan.target.name,
        latest=None if plan.latest is None else plan.latest.name,
        generation=plan.record.number,
        superseded=tuple(item.name for item in plan.superseded),
        restored=tuple(item.name for item in plan.restored),
        youngest_attempt_s=min(attempts, default=None),
    )


def apply_rollback(storage: Storage, plan: Rollback) -> None:
    """Does it; see `dckpt.catalog.rollback.roll_back` for what it raises."""
    roll_back(storage, plan)
