"""`dckpt prune`: a plan that can be read before anything is deleted, and its execution."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from dckpt.catalog.catalog import Catalog
from dckpt.catalog.prune import expire, sweep
from dckpt.catalog.retention import Candidate, Retention, plan_retention
from dckpt.errors import CorruptCheckpointError, FormatVersionError, StorageError
from dckpt.format.layout import MANIFEST_NAME, CheckpointId
from dckpt.storage.base import Storage
from dckpt.tools.inspect import LeftoverRow, list_leftovers
from dckpt.tools.manifest_head import ManifestHead, read_head

LEFTOVER_HOURS = 24.0
"""Younger leftovers may belong to a save that is still running."""


@dataclass(frozen=True, slots=True)
class PruneRequest:
    """What to remove. `retention` None leaves the line alone."""

    retention: Retention | None = None
    superseded: bool = False
    leftovers: bool = False
    older_than_s: float = LEFTOVER_HOURS * 3600


@dataclass(frozen=True, slots=True)
class KeepRow:
    """A checkpoint that stays, and every reason for it."""

    name: str
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RemoveRow:
    """A checkpoint that goes. `size_bytes` is None when its manifest cannot be read."""

    name: str
    reason: str
    size_bytes: int | None


@dataclass(frozen=True, slots=True)
class PrunePlan:
    """What stays and what goes, newest first."""

    url: str
    keep: tuple[KeepRow, ...]
    remove: tuple[RemoveRow, ...]
    leftovers: tuple[LeftoverRow, ...]

    @property
    def freed_bytes(self) -> int:
        """Bytes that the plan frees, as far as known."""
        return sum(row.size_bytes or 0 for row in self.remove) + sum(row.size_bytes for row in self.leftovers)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to remove."""
        return not self.remove and not self.leftovers


def plan_prune(storage: Storage, request: PruneRequest, *, now_unix_s: float) -> PrunePlan:
    """Reads only. The newest of the line and pinned checkpoints always stay.

    `CorruptCheckpointError` if superseded steps shall go and a damaged record hides which ones they are.
    """
    catalog = Catalog(storage)
    traced = catalog.trace()
    if traced.notes and request.superseded:
        # What hangs behind a damaged record looks superseded and may be the line's own past.
        raise CorruptCheckpointError(
            f"Run {storage.url}: expected a line that can be followed before superseded steps are removed, found: "
            f"{' '.join(traced.notes)} Restore the record, or prune without --superseded."
        )
    pins = catalog.pins()
    keep, remove = _plan_line(storage, traced.on_line, pins, request.retention)
    for checkpoint in reversed(traced.superseded):
        if checkpoint.name in pins:
            keep.append(KeepRow(checkpoint.name, ("pinned", "superseded")))
        elif request.superseded:
            remove.append(_remove_row(storage, checkpoint.name, "superseded"))
        else:
            keep.append(KeepRow(checkpoint.name, ("superseded: --superseded removes it",)))
    leftovers: tuple[LeftoverRow, ...] = ()
    if request.leftovers:
        leftovers = list_leftovers(storage, older_than_s=request.older_than_s, now_unix_s=now_unix_s)
    return PrunePlan(url=storage.url, keep=tuple(keep), remove=tuple(remove), leftovers=leftovers)


def apply_prune(storage: Storage, plan: PrunePlan) -> None:
    """Removes what the plan names; the line is read again first, so a stale plan harms nothing."""
    if plan.remove:
        expire(storage, [row.name for row in plan.remove])
    if plan.leftovers:
        sweep(storage, [row.name for row in plan.leftovers])


def _plan_line(
    storage: Storage, line: Sequence[CheckpointId], pins: Collection[str], retention: Retention | None
) -> tuple[list[KeepRow], list[RemoveRow]]:
    if retention is None:
        return [KeepRow(checkpoint.name, ("on the line, no policy given",)) for checkpoint in line], []
    keep: list[KeepRow] = []
    candidates = []
    for checkpoint in line:
        head = _read_head(storage, checkpoint.name)
        if head is None:
            # It must not take the place of a good checkpoint among the last N, so the policy does not see it.
            keep.append(KeepRow(checkpoint.name, ("manifest cannot be read: not judged, see `dckpt verify`",)))
        else:
            candidates.append(
                Candidate(
                    id=checkpoint,
                    metrics=head.metrics,
                    is_pinned=checkpoint.name in pins,
                    created_unix_s=head.created_unix_s,
                )
            )
    decision = plan_retention(candidates, retention)
    keep += [KeepRow(checkpoint.name, tuple(reasons)) for checkpoint, reasons in decision.keep]
    keep.sort(key=lambda row: row.name, reverse=True)
    remove = [_remove_row(storage, checkpoint.name, "expired by the policy") for checkpoint in decision.expire]
    return keep, remove


def _read_head(storage: Storage, name: str) -> ManifestHead | None:
    try:
        return read_head(storage, f"{name}/{MANIFEST_NAME}")
    except (CorruptCheckpointError, FormatVersionError, StorageError):
        return None  # The plan shows it as kept, with the command that says what is wrong.


def _remove_row(storage: Storage, name: str, reason: str) -> RemoveRow:
    head = _read_head(storage, name)
    return RemoveRow(name, reason, None if head is None else head.size_bytes)
