"""Checkpoints as objects: the commit is one conditional create, a staged attempt is a marker and a place for its files.

What lies where (beside each other at the root, or below any directory):

- `step-.../<attempt>/...` are an attempt's files from the first byte on: nothing is ever renamed or copied
- `.tmp-<attempt>/` has what is not files yet: the marker that says to which checkpoint the attempt belongs, the index,
  and the manifest as it will be published. Keys below `.tmp-<attempt>/<attempt>/` mean the files above
- `step-.../manifest.json` is the commit. Without it the checkpoint is not there, whatever lies below its name

Directories are prefixes; one that is to be seen while it is empty has a marker object. `StagedAttempts` has the
protocol between a commit and a sweep.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlencode

from dckpt import failpoint
from dckpt.errors import ConfigError, CorruptCheckpointError, KeyExistsError, StorageMissingError
from dckpt.storage.base import MANIFEST_NAME, STAGING_PREFIX, TRASH_PREFIX, Entry, check_key, parent_key
from dckpt.storage.object_client import Listing, ObjectClient, StoredObject
from dckpt.storage.object_create import ExclusiveCreator
from dckpt.storage.object_file import PART_BYTES, ObjectReader, ObjectWriter
from dckpt.storage.object_staging import ATTEMPT, MARKER_NAME, StagedAttempts, is_staging

_STAGED_FILE = re.compile(rf"((?:.*/)?{re.escape(STAGING_PREFIX)}({ATTEMPT}))/\2(/.*)?")

_LISTINGS_AT_ONCE = 8


class ObjectStorage:
    """A `Storage` below the prefix `root` of one bucket; '' is the bucket itself."""

    def __init__(
        self,
        client: ObjectClient,
        root: str,
        *,
        url: str,
        options: dict[str, str] | None = None,
        part_bytes: int = PART_BYTES,
    ) -> None:
        self._client = client
        self._prefix = f"{root}/" if root else ""
        self._part_bytes = part_bytes
        self._creator = ExclusiveCreator(client, self._prefix)
        self._staged = StagedAttempts(client, self._prefix, self._creator)
        query = urlencode(options or {})
        self._url = f"{url}?{query}" if query else url

    @property
    def url(self) -> str:
        return self._url

    def locate(self, key: str) -> str:
        return self._client.locate(self._key(key)) if key else self._client.locate(self._prefix.rstrip("/"))

    # --- reading

    def ensure_writable(self) -> None:
        """Nothing is known before the first request that writes."""

    def exists(self) -> bool:
        return not self._prefix or self._client.has_any(self._prefix)

    def read_bytes(self, key: str, *, limit: int, uncached: bool = False) -> bytes:  # noqa: ARG002 (nothing is cached)
        found = self._find(key)
        if found.size > limit:
            place = self.locate(key)
            raise CorruptCheckpointError(
                f"{place}: expected at most {limit:,} bytes, found {found.size:,}. This is not a file that dckpt wrote; run "
                "`dckpt verify`.",
                key=place,
                field="size",
                expected=limit,
                found=found.size,
            )
        return self._client.get(found.key)[1]

    def open_reader(self, key: str, *, uncached: bool = False) -> ObjectReader:  # noqa: ARG002 (nothing is cached)
        return ObjectReader(self._client, self._find(key))

    def size(self, key: str) -> int:
        return self._find(key).size

    def modified_unix_s(self, key: str) -> float:
        found = self._client.head(self._key(key))
        if found is not None:
            return found.modified_unix_s
        here = self._client.list(self._below(key))
        if not here.objects and not here.prefixes and not self._is_made(key):
            raise self._missing(key)
        return max((item.modified_unix_s for item in here.objects), default=0.0)

    def list_dir(self, key: str = "") -> list[Entry]:
        attempt = is_staging(check_key(key)) if key else None
        found = self._client.list(self._below(key))
        prefix = self._below(key)
        if attempt is not None:
            checkpoint = self._staged.find_checkpoint(key)
            if checkpoint is None:
                raise self._missing(key)
            return sorted([Entry(attempt, True, 0), *_files(found, prefix)], key=lambda entry: entry.name)
        if not found.objects and not found.prefixes and not self._is_made(key):
            raise self._missing(key)
        if key and _is_uncommitted(found, prefix):
            raise self._missing(key)
        with ThreadPoolExecutor(_LISTINGS_AT_ONCE) as threads:
            shown = threads.map(lambda below: self._shown(key, below[len(prefix) : -1], below), found.prefixes)
            directories = set().union(*shown)
        entries = [*_files(found, prefix), *(Entry(name, True, 0) for name in directories)]
        return sorted(entries, key=lambda entry: entry.name)

    def free_bytes(self) -> int | None:
        return None

    # --- creating

    def ensure_root(self) -> None:
        if self._prefix and not self.exists():
            self._client.put(self._prefix + MARKER_NAME, b"")

    def create(self, key: str, data: bytes) -> None:
        self._creator.create(self._key(check_key(key)), data)

    def make_dirs(self, key: str) -> None:
        staging = next((part for part in _ancestors(check_key(key)) if is_staging(part)), None)
        if staging is not None:
            self._staged.begin(staging)
        else:
            self._client.put(self._below(key) + MARKER_NAME, b"")

    def create_file(self, key: str, *, is_large: bool = False, size: int | None = None) -> ObjectWriter:  # noqa: ARG002 (size tells)
        place = self._key(check_key(key))
        self._ensure_dir(parent_key(key))
        self._ensure_free(place)
        # As many segments a part as it takes to stay below the store's number of parts.
        segments = -(-(size or 1) // (self._part_bytes * self._client.parts_max))
        return ObjectWriter(self._client, place, self._creator.create, part_bytes=self._part_bytes * segments)

    def link(self, source: str, target: str) -> bool:
        found = self._find(source)
        self._ensure_dir(parent_key(check_key(target)))
        if found.size > self._client.copy_bytes_max:
            return False
        place = self._key(target)
        self._ensure_free(place)
        self._client.copy(found.key, place)
        return True

    def sync_dir(self, key: str = "") -> None:
        """What a store has acknowledged is durable."""

    # --- committing

    def staging_key(self, checkpoint: str, attempt: str) -> str:
        parent = parent_key(check_key(checkpoint))
        staging = f"{parent}/{STAGING_PREFIX}{attempt}" if parent else STAGING_PREFIX + attempt
        self._staged.remember(staging, checkpoint)
        return staging

    def stage_manifest(self, staging: str, manifest: bytes) -> None:
        self._ensure_dir(staging)
        self._creator.create(self._key(f"{staging}/{MANIFEST_NAME}"), manifest)

    def publish(self, staging: str, checkpoint: str, manifest: bytes) -> None:
        self._staged.publish(check_key(staging), check_key(checkpoint), manifest)

    # --- deleting

    def discard(self, key: str, *, onto: str | None = None) -> None:
        if is_staging(check_key(key)) is not None:
            self._staged.sweep(key)
            return
        place = self._key(key)
        if self._client.head(place) is not None:
            self._client.delete([place])
            return
        below = self._below(key)
        if not self._client.has_any(below):
            return
        if onto is not None and self._client.head(self._below(check_key(onto)) + MARKER_NAME) is None:
            raise StorageMissingError(
                f"Delete {self.locate(key)}: expected its announcement {self.locate(onto)} in the trash, found none. A save "
                "that refers to it took it away; nothing was deleted.",
                key=self.locate(onto),
            )
        # First of all: from here on the checkpoint is not there, and what is left shows as attempts that never committed.
        self._client.delete([below + MANIFEST_NAME])
        failpoint.reach("mid_prune")
        kept = self._staged.live_places(key)
        doomed = [item.key for item in self._client.list(below, deep=True).objects]
        # Attempts last, so that a crash leaves nothing that looks like an empty checkpoint.
        doomed.sort(key=lambda name: ("/" in name[len(below) :], name))
        self._client.delete([name for name in doomed if not name.startswith(kept)])
        if onto is not None:
            self._client.delete([self._below(onto) + MARKER_NAME])

    # --- parts

    def _key(self, key: str) -> str:
        staged = _STAGED_FILE.fullmatch(check_key(key))
        if staged is None:
            return self._prefix + key
        checkpoint = self._staged.find_checkpoint(staged[1])
        if checkpoint is None:
            raise self._missing_attempt(staged[1])
        return f"{self._prefix}{checkpoint}/{staged[2]}{staged[3] or ''}"

    def _below(self, key: str) -> str:
        return f"{self._key(key)}/" if key else self._prefix

    def _find(self, key: str) -> StoredObject:
        found = self._client.head(self._key(check_key(key)))
        if found is not None:
            return found
        here = self._client.list(self._below(key))
        if (here.objects or here.prefixes) and not _is_uncommitted(here, self._below(key)):
            place = self.locate(key)
            raise CorruptCheckpointError(
                f"{place}: expected an object, found a directory. dckpt never writes one there.",
                key=place,
                field="type",
                expected="an object",
                found="a directory",
            )
        raise self._missing(key)

    def _is_made(self, key: str) -> bool:
        """Whether a directory without anything in it is there all the same: the bucket, or an attempt's."""
        return self._staged.is_live_place(key) if key else not self._prefix

    def _shown(self, directory: str, name: str, below: str) -> set[str]:
        """As what the prefix shows in a listing: itself, or the attempts in it if it is no checkpoint yet."""
        if name.startswith((STAGING_PREFIX, TRASH_PREFIX)):
            return {name}
        found = self._client.list(below)
        if not _is_uncommitted(found, below):
            return {name}
        beside = f"{directory}/" if directory else ""
        attempts = {item[len(below) : -1] for item in found.prefixes}
        for attempt in attempts:
            self._staged.remember(f"{beside}{STAGING_PREFIX}{attempt}", f"{beside}{name}")
        return {STAGING_PREFIX + attempt for attempt in attempts}

    def _ensure_dir(self, key: str) -> None:
        staging = next((part for part in _ancestors(key) if is_staging(part)), None)
        if staging is not None:
            if not self._staged.is_live(staging):
                raise self._missing_attempt(staging)
        elif key and not self._client.has_any(self._below(key)):
            raise self._missing(key)

    def _ensure_free(self, place: str) -> None:
        if self._client.head(place) is not None:
            where = self._client.locate(place)
            raise KeyExistsError(
                f"Create {where}: expected a free name, found an object there. It was not changed.", key=where
            )

    def _missing(self, key: str) -> StorageMissingError:
        place = self._client.locate(self._prefix + key)
        return StorageMissingError(
            f"{place}: expected it there, found nothing. It was deleted or never written.", key=place
        )

    def _missing_attempt(self, staging: str) -> StorageMissingError:
        place = self._client.locate(self._prefix + staging)
        return StorageMissingError(
            f"{place}: expected an attempt in progress, found none. Another process swept it (prune, or a clean-up script) while "
            "this save ran. Sweep only older attempts.",
            key=place,
        )


def _ancestors(key: str) -> list[str]:
    """The key and every directory above it, the topmost first; not the root."""
    parts = key.split("/") if key else []
    return ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _files(found: Listing, prefix: str) -> list[Entry]:
    names = ((item.key[len(prefix) :], item.size) for item in found.objects)
    return [Entry(name, False, size) for name, size in names if name not in ("", MARKER_NAME)]


def _is_uncommitted(found: Listing, prefix: str) -> bool:
    """Whether a prefix holds attempts and nothing that makes it a directory: no manifest, no marker."""
    has_attempts = any(re.fullmatch(ATTEMPT, below[len(prefix) : -1]) for below in found.prefixes)
    return has_attempts and all(item.key[len(prefix) :] not in (MANIFEST_NAME, MARKER_NAME) for item in found.objects)


def parse_place(url: str, text: str) -> tuple[str, str]:
    """Bucket and root of what follows `scheme://` in `url`."""
    bucket, _, root = text.partition("/")
    root = root.strip("/")
    if not bucket or (root and any(part in ("", ".", "..") for part in root.split("/"))):
        raise ConfigError(
            f"Storage URL {url!r}: expected scheme://bucket/path without empty components, '.' and '..', found bucket "
            f"{bucket!r} and path {root!r}."
        )
    return bucket, root
