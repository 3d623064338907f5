"""An earlier step becomes the latest again: one generation record on top, nothing copied and nothing deleted."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from dckpt import failpoint
from dckpt.catalog.catalog import Catalog
from dckpt.catalog.generations import create_generation, read_generation
from dckpt.catalog.line import trace_line
from dckpt.catalog.references import hold
from dckpt.errors import CommitConflictError, ConfigError, UnknownOutcomeError
from dckpt.format.generation import Generation, Parent
from dckpt.format.layout import CheckpointId
from dckpt.storage.base import Storage


@dataclass(frozen=True, slots=True)
class Rollback:
    """What a rollback changes. `record` is the generation to create; `observed` the newest one when this was planned."""

    target: CheckpointId
    latest: CheckpointId | None
    record: Generation
    observed: int
    superseded: tuple[CheckpointId, ...]
    """Taken off the line, newest first: kept, and the way back for as long as nobody prunes them."""
    restored: tuple[CheckpointId, ...]
    """Back on the line, newest first: superseded until now."""


def plan_rollback(storage: Storage, which: str | int, *, now_unix_s: float) -> Rollback | None:
    """What makes the checkpoint `which` the latest; None if it is that already. Reads only.

    A step means one of the current line; a superseded checkpoint needs its full name. `CheckpointNotFoundError` if it is
    not there, `CorruptCheckpointError` if its manifest cannot be trusted.
    """
    # What is named must be durable: its committer may have died between the rename and the sync.
    storage.sync_dir()
    catalog = Catalog(storage)
    target = catalog.resolve(which)
    line = catalog.line()
    if line and line[0] == target:
        return None
    manifest, sha256 = catalog.read_manifest(target.name)
    if manifest.id is None or manifest.run_id is None:
        raise ConfigError(f"Rollback to {target.name}: expected a checkpoint of a run, found a stand-alone one.")
    observed = catalog.newest_generation()
    record = Generation(
        number=observed + 1,
        run_id=manifest.run_id,
        parent=Parent(target.name, target.step, target.micro_step, target.generation, sha256),
        reason="rollback",
        world_size=manifest.world_size,
        created_unix_s=now_unix_s,
        nonce=uuid.uuid4().hex,
    )
    after = trace_line(
        catalog.checkpoints(),
        record.number,
        lambda number: record if number == record.number else read_generation(storage, number),
    ).on_line
    return Rollback(
        target=target,
        latest=line[0] if line else None,
        record=record,
        observed=observed,
        superseded=tuple(item for item in line if item not in after),
        restored=tuple(item for item in after if item not in line),
    )


def roll_back(storage: Storage, plan: Rollback) -> None:
    """THE commit of a rollback: on return the target is the latest, durably, and whoever saved before is fenced.

    `CommitConflictError` if another job began a generation since the plan was made, or the target was deleted meanwhile;
    `UnknownOutcomeError` if the record may be there.
    """
    failpoint.reach("before_generation")
    try:
        create_generation(storage, plan.record, expected_newest=plan.observed)
    except UnknownOutcomeError:
        # The same record again: its nonce tells whether the first one landed.
        create_generation(storage, plan.record, expected_newest=plan.observed)
    failpoint.reach("after_generation")
    # As a save that refers to a checkpoint does (FORMAT.md, section 8.3): the record was shown first, so whoever deletes
    # either sees it or is seen here.
    if not hold(storage, [plan.target.name]):
        raise CommitConflictError(
            f"Rollback to {plan.target.name} of {storage.url}: expected the checkpoint to stay, found it deleted meanwhile by "
            "another job or `dckpt prune`. The newest that is left before it is the latest now: `dckpt ls` shows it; roll back "
            "to another one by its full name."
        )
