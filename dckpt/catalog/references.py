"""Which checkpoints hold files of others, and how one is deleted without harm to any (FORMAT.md, sections 8.2 and 8.3)."""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Set

from dckpt.errors import CorruptCheckpointError, StorageMissingError
from dckpt.format.layout import MANIFEST_NAME, is_trash_name, parse_checkpoint_name, parse_staging_name, trash_name
from dckpt.format.manifest import MANIFEST_BYTES_MAX
from dckpt.storage.base import Storage, parent_key

Holders = Mapping[str, Set[str]]
"""Checkpoint -> the checkpoints and attempts that refer to it: files of theirs lie in its directory."""

# Found in the bytes, not by parsing: a manifest that is damaged, half staged or of a later version may still be one that
# somebody reads one day. What only looks like a reference keeps a checkpoint for longer, and harms nobody.
_REFERENCE = re.compile(rb'"checkpoint"\s*:\s*"([^"\\]{1,64})"')


class References:
    """Who refers to whom in the run at the root of `storage`. Manifests that were read once are not read again."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._known: dict[str, frozenset[str]] = {}

    def forget(self, checkpoint: str) -> None:
        """To be called when `checkpoint` was committed: its name may have been another one's before."""
        self._known.pop(checkpoint, None)

    def read(self) -> dict[str, set[str]]:
        """What every checkpoint and every attempt in flight says now.

        The root is listed twice: an attempt that is committed while it is listed can be missed under both of its names,
        but then it had its final one before the second listing began.
        """
        holders: dict[str, set[str]] = {}
        for _ in range(2):
            names = [entry.name for entry in self._storage.list_dir() if entry.is_dir]
            self._known = {name: found for name, found in self._known.items() if name in names}
            for name in names:
                for target in self._targets(name):
                    holders.setdefault(target, set()).add(name)
        return holders

    def _targets(self, name: str) -> frozenset[str]:
        if name in self._known:
            return self._known[name]
        is_checkpoint = parse_checkpoint_name(name) is not None
        if not is_checkpoint and parse_staging_name(name) is None:
            return frozenset()
        try:
            data = self._storage.read_bytes(f"{name}/{MANIFEST_NAME}", limit=MANIFEST_BYTES_MAX)
        except (StorageMissingError, CorruptCheckpointError):
            # Not staged yet, moved a moment ago, or nothing that anybody could read as a manifest.
            return frozenset()
        found = frozenset(find_references(data)) - {name}
        if is_checkpoint:
            self._known[name] = found
        return found


def find_references(manifest: bytes) -> set[str]:
    """The checkpoints to which the file entries in the bytes of a manifest refer; never too few."""
    names = {found.decode("utf-8", "replace") for found in _REFERENCE.findall(manifest)}
    return {name for name in names if parse_checkpoint_name(name) is not None}


def plan_deletion(wanted: Iterable[str], holders: Holders) -> tuple[list[str], dict[str, list[str]]]:
    """The order in which `wanted` may go, each before those it refers to; and what has to stay, with who holds it."""
    left = dict.fromkeys(wanted)
    order: list[str] = []
    while True:
        going = set(order)
        free = [name for name in left if not holders.get(name, frozenset()) - going]
        if not free:
            return order, {name: sorted(holders[name] - going) for name in left}
        order += free
        for name in free:
            del left[name]


@contextlib.contextmanager
def announced(storage: Storage, names: Iterable[str]) -> Iterator[dict[str, str]]:
    """Within the body everybody sees that `names` may be deleted; gives the key to discard each of them onto.

    Whoever sweeps an announcement away makes that deletion fail. It is a leftover like any other if the process dies.
    """
    places = {name: f"{trash_name(uuid.uuid4().hex)}/{name}" for name in names}
    try:
        for place in places.values():
            storage.make_dirs(place)
        yield places
    except Exception:
        withdraw(storage, places.values())
        raise
    withdraw(storage, places.values())


def withdraw(storage: Storage, places: Iterable[str]) -> None:
    """Sweeps announcements; nothing happens where one is gone already."""
    for place in places:
        storage.discard(parent_key(place))


def find_referable(storage: Storage, names: Collection[str]) -> set[str]:
    """Those of the checkpoints `names` that are there, and of which nobody has announced that they may be deleted."""
    if not names:
        return set()
    # In this order: one whose announcement is gone again is either deleted, which is seen below, or stays.
    doomed = _find_announcements(storage).keys()
    return {name for name in names if name not in doomed and _is_there(storage, name)}


def hold(storage: Storage, names: Collection[str]) -> set[str]:
    """Those of the checkpoints `names` that are there, and stay.

    To be called when a manifest that refers to them is staged: who looks from now on sees it. Who looked before, and may
    still act on what it saw, cannot when its announcement is gone.
    """
    if not names:
        return set()
    found = _find_announcements(storage)
    withdraw(storage, (place for name in names for place in found.get(name, ())))
    return {name for name in names if _is_there(storage, name)}


def _find_announcements(storage: Storage) -> dict[str, list[str]]:
    """Checkpoint -> where it is announced that it may be deleted."""
    found: dict[str, list[str]] = {}
    for entry in storage.list_dir():
        if entry.is_dir and is_trash_name(entry.name):
            with contextlib.suppress(StorageMissingError):  # Withdrawn while we looked.
                for inner in storage.list_dir(entry.name):
                    if inner.is_dir and parse_checkpoint_name(inner.name) is not None:
                        found.setdefault(inner.name, []).append(f"{entry.name}/{inner.name}")
    return found


def _is_there(storage: Storage, name: str) -> bool:
    try:
        storage.size(f"{name}/{MANIFEST_NAME}")
    except (StorageMissingError, CorruptCheckpointError):
        return False
    return True
