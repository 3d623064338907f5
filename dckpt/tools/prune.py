"""`dckpt prune`: a plan that can be read before anything is deleted, and its execution."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from dckpt.catalog.catalog import Catalog
from dckpt.catalog.line import Line
from dckpt.catalog.prune import expire, sweep
from dckpt.catalog.references import References, plan_deletion
from dckpt.catalog.retention import Candidate, Retention, plan_retention
from dckpt.errors import CorruptCheckpointError
from dckpt.storage.base import Storage
from dckpt.tools.inspect import LeftoverRow, list_leftovers
from dckpt.tools.manifest_head import ManifestHead, ReadError, copies_of, read_heads
from dckpt.tools.sharing import freed_bytes

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
    """What stays and what goes, newest first. `freed_bytes`: as far as known; what others share is not freed."""

    url: str
    keep: tuple[KeepRow, ...]
    remove: tuple[RemoveRow, ...]
    leftovers: tuple[LeftoverRow, ...]
    freed_bytes: int

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to remove."""
        return not self.remove and not self.leftovers


Heads = Mapping[str, ManifestHead | ReadError]


def plan_prune(storage: Storage, request: PruneRequest, *, now_unix_s: float) -> PrunePlan:
    """Reads only. The newest of the line, pinned checkpoints, and those in which files of kept ones lie always stay.

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
    heads = read_heads(storage, [*traced.on_line, *traced.superseded])
    keep, going = _plan_line(heads, traced, pins, request.retention)
    for checkpoint in reversed(traced.superseded):
        if checkpoint.name in pins:
            keep.append(KeepRow(checkpoint.name, ("pinned", "superseded")))
        elif request.superseded:
            going[checkpoint.name] = "superseded"
        else:
            keep.append(KeepRow(checkpoint.name, ("superseded: --superseded removes it",)))
    free, held = plan_deletion(going, References(storage).read() if going else {})
    keep += [KeepRow(name, (f"files of {', '.join(holders)} lie in it", going[name])) for name, holders in held.items()]
    leftovers: tuple[LeftoverRow, ...] = ()
    if request.leftovers:
        leftovers = list_leftovers(storage, older_than_s=request.older_than_s, now_unix_s=now_unix_s)
    return PrunePlan(
        url=storage.url,
        keep=tuple(keep),
        remove=tuple(_remove_row(heads, name, reason) for name, reason in going.items() if name in free),
        leftovers=leftovers,
        freed_bytes=freed_bytes(copies_of(heads), free) + sum(row.size_bytes for row in leftovers),
    )


def apply_prune(storage: Storage, plan: PrunePlan) -> int:
    """Removes what the plan names, and returns how many checkpoints went; the run is read again first, so a stale plan
    harms nothing.
    """
    removed = expire(storage, [row.name for row in plan.remove]) if plan.remove else []
    if plan.leftovers:
        sweep(storage, [row.name for row in plan.leftovers])
    return len(removed)


def _plan_line(
    heads: Heads, line: Line, pins: Collection[str], retention: Retention | None
) -> tuple[list[KeepRow], dict[str, str]]:
    """What the policy keeps, and what may go with the reason."""
    if retention is None:
        return [KeepRow(checkpoint.name, ("on the line, no policy given",)) for checkpoint in line.on_line], {}
    keep: list[KeepRow] = []
    candidates = []
    for checkpoint in line.on_line:
        head = heads[checkpoint.name]
        if not isinstance(head, ManifestHead):
            # It must not take the place of a good checkpoint among the last N, so the policy does not see it.
            keep.append(KeepRow(checkpoint.name, ("manifest cannot be read: not judged, see `dckpt verify`",)))
        else:
            candidates.append(
                Candidate(
                    id=checkpoint,
                    metrics=head.metrics,
                    is_pinned=checkpoint.name in pins,
                    created_unix_s=head.created_unix_s,
                    is_leg_end=checkpoint in line.leg_ends,
                )
            )
    decision = plan_retention(candidates, retention)
    keep += [KeepRow(checkpoint.name, tuple(reasons)) for checkpoint, reasons in decision.keep]
    keep.sort(key=lambda row: row.name, reverse=True)
    return keep, {checkpoint.name: f"no rule keeps it: {decision.lost[checkpoint]}" for checkpoint in decision.expire}


def _remove_row(heads: Heads, name: str, reason: str) -> RemoveRow:
    head = heads[name]
    return RemoveRow(name, reason, head.size_bytes if isinstance(head, ManifestHead) else None)
