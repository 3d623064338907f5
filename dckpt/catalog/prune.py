"""Deleting, and only deleting: expired checkpoints and what never committed. Policies decide elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from dckpt import failpoint
from dckpt.catalog.catalog import Catalog
from dckpt.catalog.generations import ensure_not_fenced
from dckpt.catalog.references import References, announced, plan_deletion, withdraw
from dckpt.errors import CommitConflictError, ConfigError, StorageMissingError
from dckpt.format.layout import (
    GENERATIONS_DIR,
    PINS_DIR,
    is_trash_name,
    parse_checkpoint_name,
    parse_staging_name,
)
from dckpt.storage.base import TEMPORARY_PREFIX, Storage

LeftoverKind = Literal["staging", "trash", "temporary"]


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something in a run that no reader looks at. `age_s` counts from the last change anywhere in it."""

    name: str
    kind: LeftoverKind
    bytes: int
    age_s: float


def expire(
    storage: Storage, names: Iterable[str], *, generation: int | None = None, references: References | None = None
) -> list[str]:
    """Deletes the checkpoints `names`, on the line or superseded; returns those that were there and went.

    One to which another checkpoint refers stays. The run is read again first: with the newest of the line or a pinned
    one among the names, or if the newest one's manifest cannot be read, nothing at all is deleted. `generation` fences
    this as it fences a commit. `references`: what the caller knows of the run's references from before.
    """
    wanted = list(dict.fromkeys(names))
    unknown = [name for name in wanted if parse_checkpoint_name(name) is None]
    if unknown:
        raise ConfigError(f"expire: expected names of checkpoints, found {unknown[0]!r}. `dckpt ls` lists them.")
    if not wanted:
        return []
    # What stays must be durable before anything goes: its committer may have died between the rename and the
    # sync.
    storage.sync_dir()
    if generation is not None:
        ensure_not_fenced(storage, generation)
    catalog = Catalog(storage)
    references = references or References(storage)
    present = {item.name for item in catalog.checkpoints()}
    free, _ = plan_deletion([name for name in wanted if name in present], references.read())
    with announced(storage, free) as places:
        # Only what is read from here on counts: a save that did not see the announcement is seen now.
        _ensure_expirable(catalog, storage, wanted)
        free, held = plan_deletion(free, references.read())
        withdraw(storage, (places[name] for name in held))
        failpoint.reach("before_prune")
        for name in free:
            storage.discard(name, onto=places[name])
    failpoint.reach("after_prune")
    return [name for name in wanted if name in free]


def find_leftovers(storage: Storage, *, older_than_s: float, now_unix_s: float) -> list[Leftover]:
    """Staging and trash directories and temporary files, unchanged for `older_than_s`; sorted by name.

    A save that is still running looks the same, which is why age counts. `now_unix_s` and the storage's clock
    may differ.
    """
    if not storage.exists():
        return []
    found: list[tuple[str, LeftoverKind, bool]] = []
    directories = set()
    for entry in storage.list_dir():
        if entry.is_dir:
            directories.add(entry.name)
        kind = _kind_of(entry.name)
        if kind is not None:
            found.append((entry.name, kind, entry.is_dir))
    for directory in (GENERATIONS_DIR, PINS_DIR):
        if directory in directories:
            found += [
                (f"{directory}/{entry.name}", "temporary", entry.is_dir)
                for entry in storage.list_dir(directory)
                if _kind_of(entry.name) == "temporary"
            ]
    leftovers = []
    for name, kind, is_dir in sorted(found):
        try:
            size, changed_unix_s = _measure(storage, name, is_dir)
        except StorageMissingError:
            # Committed or swept while we looked: no leftover any more.
            continue
        age_s = max(0.0, now_unix_s - changed_unix_s)
        if age_s >= older_than_s:
            leftovers.append(Leftover(name=name, kind=kind, bytes=size, age_s=age_s))
    return leftovers


def sweep(storage: Storage, names: Sequence[str]) -> None:
    """Deletes leftovers. A commit of theirs that is still under way finds its directory gone and fails."""
    refused = [name for name in names if not _is_leftover(name)]
    if refused:
        raise ConfigError(
            f"sweep: expected names from find_leftovers, found {refused[0]!r}. Committed checkpoints are "
            "expired instead."
        )
    for name in names:
        storage.discard(name)


def _ensure_expirable(catalog: Catalog, storage: Storage, wanted: Sequence[str]) -> None:
    line = catalog.line()
    if line and line[0].name in wanted:
        raise CommitConflictError(
            f"Expire {line[0].name} of {storage.url}: expected an older checkpoint, found the newest of the "
            "line. The run changed since this was planned; nothing was deleted. Plan again."
        )
    pinned = sorted(catalog.pins().intersection(wanted))
    if pinned:
        raise CommitConflictError(
            f"Expire {pinned[0]} of {storage.url}: expected a checkpoint that is not pinned, found a pin. "
            "Nothing was deleted. Unpin it first, or plan again."
        )
    if line:
        # The one that stays must at least be readable before older ones go.
        catalog.read_manifest(line[0].name)


def _kind_of(name: str) -> LeftoverKind | None:
    if parse_staging_name(name) is not None:
        return "staging"
    if is_trash_name(name):
        return "trash"
    return "temporary" if name.startswith(TEMPORARY_PREFIX) else None


def _is_leftover(name: str) -> bool:
    directory, _, last = name.rpartition("/")
    kind = _kind_of(last)
    return kind is not None and (directory == "" or (directory in (GENERATIONS_DIR, PINS_DIR) and kind == "temporary"))


def _measure(storage: Storage, key: str, is_dir: bool) -> tuple[int, float]:
    """Bytes in the tree and the last change anywhere in it: writing a file does not touch its directory."""
    changed_unix_s = storage.modified_unix_s(key)
    if not is_dir:
        return storage.size(key), changed_unix_s
    total = 0
    for entry in storage.list_dir(key):
        size, changed = _measure(storage, f"{key}/{entry.name}", entry.is_dir)
        total += size
        changed_unix_s = max(changed_unix_s, changed)
    return total, changed_unix_s
