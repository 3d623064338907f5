"""Attempts in progress on an object store: how one becomes a checkpoint, and how one that died is swept.

There is no rename that could decide between the two, so each first writes and then looks. The committer creates the
manifest and then reads the attempt's marker; the sweeper overwrites the marker and then reads the manifest. Whatever
the order, at least one sees the other: a sweeper that sees the manifest deletes no file of it, and a committer that sees
the swept marker does not say that it committed.
"""

from __future__ import annotations

import re

from dckpt import failpoint
from dckpt.errors import KeyExistsError, StorageError, StorageMissingError, UnknownOutcomeError
from dckpt.storage.base import MANIFEST_NAME, STAGING_PREFIX, parent_key
from dckpt.storage.object_client import ObjectClient
from dckpt.storage.object_create import ExclusiveCreator, quietly

ATTEMPT = "[0-9a-f]{32}"
MARKER_NAME = ".directory"

_SWEPT = b"\nswept\n"


def is_staging(key: str) -> str | None:
    """The attempt, if `key` is the directory of one in progress."""
    name = key.rpartition("/")[2]
    attempt = name.removeprefix(STAGING_PREFIX)
    return attempt if attempt != name and re.fullmatch(ATTEMPT, attempt) else None


class StagedAttempts:
    """The attempts below one root. Keys are relative to it."""

    def __init__(self, client: ObjectClient, prefix: str, creator: ExclusiveCreator) -> None:
        self._client = client
        self._prefix = prefix
        self._creator = creator
        self._checkpoints: dict[str, str] = {}

    def remember(self, staging: str, checkpoint: str) -> None:
        """Where the files of the attempt lie, so that nobody has to ask the store."""
        self._checkpoints[staging] = checkpoint

    def begin(self, staging: str) -> None:
        """The attempt is in progress: its marker is there."""
        checkpoint = self._checkpoints.get(staging)
        assert checkpoint is not None, "staging_key comes first"
        try:
            self._creator.create(self._marker(staging), checkpoint.encode())
        except KeyExistsError:
            # Begun before, or swept; the first file tells.
            return

    def is_live(self, staging: str) -> bool:
        """Whether the attempt is in progress: begun, and neither committed nor swept."""
        found = self._read_marker(staging)
        return found is not None and not found.endswith(_SWEPT)

    def is_live_place(self, key: str) -> bool:
        """Whether `key` is the directory for the files of an attempt in progress."""
        staging = parent_key(key)
        return is_staging(staging) == key.rpartition("/")[2] and self.is_live(staging)

    def live_places(self, checkpoint: str) -> tuple[str, ...]:
        """Prefixes of files below `checkpoint` that belong to attempts in progress."""
        below = f"{self._prefix}{checkpoint}/"
        parent = parent_key(checkpoint)
        beside = f"{parent}/" if parent else ""
        attempts = [item[len(below) : -1] for item in self._client.list(below).prefixes]
        return tuple(f"{below}{name}/" for name in attempts if self.is_live(f"{beside}{STAGING_PREFIX}{name}"))

    def find_checkpoint(self, staging: str) -> str | None:
        """The checkpoint that the attempt is for; None if there is no trace of the attempt."""
        known = self._checkpoints.get(staging)
        if known is not None:
            return known
        found = self._read_marker(staging)
        if found is None:
            return None
        self._checkpoints[staging] = found.removesuffix(_SWEPT).decode()
        return self._checkpoints[staging]

    def publish(self, staging: str, checkpoint: str, manifest: bytes) -> None:
        """THE commit point; see `Storage.publish`."""
        target = f"{self._prefix}{checkpoint}"
        place = self._client.locate(target)
        if not self.is_live(staging):
            raise StorageMissingError(
                f"Publish {place}: expected the attempt {staging} in progress, found none. Another process swept it (prune, "
                "or a clean-up script) while this save ran; nothing was published. Sweep only older attempts.",
                key=self._client.locate(self._prefix + staging),
            )
        self._ensure_free(checkpoint)
        source = f"{self._prefix}{staging}/"
        for item in self._client.list(source).objects:
            name = item.key[len(source) :]
            if name not in (MARKER_NAME, MANIFEST_NAME):
                self._copy_beside(item.key, f"{target}/{name}")
        failpoint.reach("before_rename")
        try:
            self._creator.create(
                f"{target}/{MANIFEST_NAME}", manifest
            )  # THE COMMIT POINT. All it names is acknowledged.
        except KeyExistsError as error:
            raise self._taken(place) from error
        failpoint.reach("after_rename")
        self._ensure_unswept(staging, place)
        quietly(lambda: self._forget(staging), f"{staging} is left over from a commit")

    def sweep(self, staging: str) -> None:
        """Deletes the attempt if it never committed, and what it left over in any case."""
        attempt = is_staging(staging)
        assert attempt is not None
        checkpoint = self.find_checkpoint(staging)
        if checkpoint is None:
            return
        marker = self._marker(staging)
        if self._read_marker(staging) is not None:
            self._client.put(marker, checkpoint.encode() + _SWEPT)
        if not self._is_committed(checkpoint, attempt):
            below = f"{self._prefix}{checkpoint}/"
            self._client.abort_uploads(f"{below}{attempt}/")
            failpoint.reach("mid_prune")
            self._client.delete([item.key for item in self._client.list(f"{below}{attempt}/", deep=True).objects])
            left = self._client.list(below)
            if not left.prefixes and all(item.key != below + MARKER_NAME for item in left.objects):
                # An index that was put there for a manifest that never came.
                strays = [item.key for item in left.objects if item.key != below + MANIFEST_NAME]
                if len(strays) == len(left.objects):
                    self._client.delete(strays)
        self._forget(staging)

    def _ensure_free(self, checkpoint: str) -> None:
        target = f"{self._prefix}{checkpoint}"
        found = self._client.list(f"{target}/").objects
        blocking = {f"{target}/{MANIFEST_NAME}", f"{target}/{MARKER_NAME}"}
        if any(item.key in blocking for item in found) or self._client.head(target) is not None:
            raise self._taken(self._client.locate(target))

    def _copy_beside(self, source: str, target: str) -> None:
        try:
            self._creator.create(target, self._client.get(source)[1])
        except KeyExistsError:
            # The name says what is in it: another attempt for the same plan has put the same bytes there.
            return

    def _ensure_unswept(self, staging: str, place: str) -> None:
        try:
            if self.is_live(staging):
                return
            why = "its attempt was swept at the same moment"
        except StorageError as error:
            why = f"whether its attempt was swept at the same moment could not be read ({error})"
        raise UnknownOutcomeError(
            f"Publish {place}: the manifest is there, but {why}, so files of it may be gone. Nothing is cleaned up; run "
            "`dckpt verify`, and sweep only older attempts.",
            key=place,
        )

    def _is_committed(self, checkpoint: str, attempt: str) -> bool:
        """Whether the manifest that is there may name files of the attempt: looked for in its bytes, whatever its version."""
        try:
            return attempt.encode() in self._client.get(f"{self._prefix}{checkpoint}/{MANIFEST_NAME}")[1]
        except StorageMissingError:
            return False

    def _forget(self, staging: str) -> None:
        below = f"{self._prefix}{staging}/"
        marker = self._marker(staging)
        rest = [item.key for item in self._client.list(below, deep=True).objects if item.key != marker]
        # The marker last: without it nobody would find the rest.
        self._client.delete(rest)
        self._client.delete([marker])

    def _marker(self, staging: str) -> str:
        return f"{self._prefix}{staging}/{MARKER_NAME}"

    def _read_marker(self, staging: str) -> bytes | None:
        try:
            return self._client.get(self._marker(staging))[1]
        except StorageMissingError:
            return None

    def _taken(self, place: str) -> KeyExistsError:
        return KeyExistsError(
            f"Publish {place}: expected a free name, found something there (an empty directory counts too). Nothing was "
            "published, and what is there was not changed; remove it or choose another name.",
            key=place,
        )
