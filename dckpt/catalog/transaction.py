"""One attempt at one checkpoint, on the coordinator: directories, listing, index, manifest, commit."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dckpt import failpoint
from dckpt.catalog.generations import ensure_not_fenced
from dckpt.catalog.references import hold
from dckpt.errors import (
    CommitConflictError,
    CorruptCheckpointError,
    DckptError,
    FormatVersionError,
    KeyExistsError,
    StorageError,
    StorageMissingError,
    UnknownOutcomeError,
)
from dckpt.format.layout import MANIFEST_NAME, index_file_name
from dckpt.format.manifest import (
    MANIFEST_BYTES_MAX,
    FileEntry,
    Manifest,
    encode_manifest,
    manifest_digest,
    parse_manifest,
)
from dckpt.storage.base import Storage, parent_key

if TYPE_CHECKING:
    from dckpt.format.index import LayoutIndex

logger = logging.getLogger(__name__)

_LISTING_PAUSE_S = 0.2


def read_attempt(storage: Storage, checkpoint: str) -> str | None:
    """The attempt that is committed as `checkpoint` now; None if there is no manifest."""
    key = f"{checkpoint}/{MANIFEST_NAME}"
    try:
        data = storage.read_bytes(key, limit=MANIFEST_BYTES_MAX)
    except StorageMissingError:
        return None
    return parse_manifest(data, key=storage.locate(key)).attempt


class Transaction:
    """One attempt at a commit.

    Call in this order: `begin`; then all ranks write, finish their files and sync `attempt_dir`; then
    `ensure_files`, `write_index`, `stage_manifest`, `publish`. After any error only `abandon` may follow; a
    retry is a new attempt.
    """

    def __init__(self, storage: Storage, *, checkpoint: str, attempt: str, generation: int) -> None:
        """`generation` 0 is a stand-alone checkpoint: nothing fences it."""
        self._storage = storage
        self._checkpoint = checkpoint
        self._attempt = attempt
        self._generation = generation
        self._manifest: bytes | None = None
        self._may_be_published = False
        self.staging = storage.staging_key(checkpoint, attempt)
        self.attempt_dir = f"{self.staging}/{attempt}"

    def begin(self) -> None:
        """Makes the directories. `CommitConflictError` if the checkpoint's name is taken."""
        self._storage.ensure_root()
        found = self._find_taken()
        if found is not None:
            raise CommitConflictError(
                f"Checkpoint {self._storage.locate(self._checkpoint)}: expected a free name, found {found}. "
                "A committed checkpoint is never overwritten: choose another name, or remove it first."
            )
        # Their names become durable with `stage_manifest` and `publish`: until then they may vanish, as may
        # the attempt.
        self._storage.make_dirs(self.attempt_dir)

    def ensure_files(self, entries: Sequence[FileEntry], *, patience_s: float = 5.0) -> None:
        """Every shard and sums file of this attempt, linked ones too, is visible here with its size, and nothing else is.

        This listing goes through the coordinator's own mount, which catches ranks that wrote elsewhere. A
        network file system may show new files late, so a difference is looked at again for `patience_s`. What
        lies in other checkpoints was looked at by the rank that refers to it.
        """
        failpoint.reach("before_listing")
        deadline = time.monotonic() + patience_s
        while True:
            problems = self._compare_listing(entries)
            if not problems:
                return
            if time.monotonic() >= deadline:
                break
            time.sleep(_LISTING_PAUSE_S)
        more = f" ({len(problems) - 1} more such files.)" if len(problems) > 1 else ""
        raise StorageError(problems[0] + more, key=self._storage.locate(self.attempt_dir))

    def write_index(self, index: LayoutIndex) -> FileEntry:
        """Writes the layout index beside the attempt; its content is durable."""
        # Imported here: both need numpy, which commands that only list checkpoints should not wait for.
        from dckpt.format.checksum import digest_bytes
        from dckpt.format.index import encode_index

        failpoint.reach("before_index")
        data = encode_index(index)
        digest = digest_bytes(data)
        path = index_file_name(digest)
        writer = self._storage.create_file(f"{self.staging}/{path}")
        try:
            writer.write_at(0, memoryview(data))
            writer.finish(len(data))
        finally:
            writer.abandon()
        return FileEntry(path=path, size=len(data), digest=digest, kind="index", rank=None)

    def stage_manifest(self, manifest: Manifest) -> str:
        """Writes the manifest, last of all files; all names in staging are durable. Returns its SHA-256.

        From here on nobody deletes the checkpoints to which it refers; `StorageMissingError` if one is gone already.
        """
        assert manifest.attempt == self._attempt, "a manifest of another attempt"
        assert manifest.generation == self._generation, "a manifest of another generation"
        data = encode_manifest(manifest)
        failpoint.reach("before_manifest")
        self._storage.stage_manifest(self.staging, data)
        failpoint.reach("after_manifest")
        self._manifest = data
        self._hold_references(manifest)
        return manifest_digest(data)

    def publish(self) -> None:
        """THE commit: on return the checkpoint exists, durably.

        `UnknownOutcomeError` if it may exist. Any other error means that this attempt was not committed.
        """
        assert self._manifest is not None, "stage_manifest comes first"
        if self._generation > 0:
            ensure_not_fenced(self._storage, self._generation)
        self._may_be_published = True
        try:
            self._storage.publish(self.staging, self._checkpoint, self._manifest)
        except KeyExistsError as error:
            self._judge_taken(error)
        except UnknownOutcomeError:
            raise
        except StorageError:
            self._may_be_published = False
            raise

    def abandon(self) -> None:
        """Removes what this attempt wrote, as far as possible; an error is logged, never raised.

        Does nothing if the attempt is, or may be, committed: an unknown outcome triggers no cleanup.
        """
        if self._may_be_published:
            logger.warning("%s stays as it is: attempt %s may be committed", self._checkpoint, self._attempt)
            return
        try:
            self._storage.discard(self.staging)
        except DckptError as error:
            # The save has failed already, for its own reason; what stays here is swept later.
            logger.warning("attempt %s was not removed: %s", self._attempt, error)

    def _find_taken(self) -> str | None:
        try:
            entries = self._storage.list_dir(self._checkpoint)
            return f"{len(entries)} entries there" if entries else "an empty directory there"
        except StorageMissingError:
            # Not a directory; it may still be a file.
            pass
        except CorruptCheckpointError:
            return "a symbolic link there"
        try:
            return f"a file of {self._storage.size(self._checkpoint):,} bytes there"
        except StorageMissingError:
            return None
        except CorruptCheckpointError:
            return "a special file there"

    def _compare_listing(self, entries: Sequence[FileEntry]) -> list[str]:
        expected = {
            entry.path.rpartition("/")[2]: entry
            for entry in entries
            if entry.kind != "index" and entry.checkpoint is None
        }
        found = {entry.name: entry for entry in self._storage.list_dir(self.attempt_dir)}
        problems = []
        for name, entry in expected.items():
            seen = found.get(name)
            if seen is None or seen.is_dir or seen.size != entry.size:
                what = "nothing" if seen is None else "a directory" if seen.is_dir else f"{seen.size:,} bytes"
                problems.append(
                    f"File {name} of rank {entry.rank} in {self._storage.locate(self.attempt_dir)}: "
                    f"expected {entry.size:,} bytes, found {what} on the coordinator's node. Written to a "
                    "node-local directory? Every rank must write to the same file system."
                )
        place = self._storage.locate(self.attempt_dir)
        problems += [
            f"File {name} in {place}: expected only files that a rank reported, found this one too. "
            "Something else writes into the attempt's directory; the attempt is given up."
            for name in sorted(found.keys() - expected.keys())
        ]
        return problems

    def _hold_references(self, manifest: Manifest) -> None:
        lost = sorted(set(manifest.references) - hold(self._storage, manifest.references))
        if lost:
            raise StorageMissingError(
                f"Checkpoint {self._storage.locate(self._checkpoint)}: expected {lost[0]}, in which unchanged files of it lie, "
                "found it deleted. Another job took the run over, or somebody deletes by hand; the next save writes these "
                "files anew.",
                key=self._storage.locate(lost[0]),
            )

    def _judge_taken(self, error: KeyExistsError) -> None:
        """Returns if the name is taken by this very attempt, raises what is known otherwise."""
        try:
            found = read_attempt(self._storage, self._checkpoint)
            if found == self._attempt:
                # Our own rename, whose answer was lost. The name may not be durable yet.
                self._storage.sync_dir(parent_key(self._checkpoint))
                return
        except (StorageError, CorruptCheckpointError, FormatVersionError) as reading:
            raise UnknownOutcomeError(
                f"Checkpoint {self._storage.locate(self._checkpoint)}: the name is taken, and whether by "
                f"this attempt could not be established: {reading} Nothing is cleaned up.",
                key=self._storage.locate(self._checkpoint),
            ) from reading
        # Where attempts are staged under the checkpoint's own name, cleaning up would reach into what is
        # there.
        self._may_be_published = self.staging == self._checkpoint
        owner = f"attempt {found}" if found else "a directory without a manifest"
        raise CommitConflictError(
            f"Checkpoint {self._storage.locate(self._checkpoint)}: expected a free name, found {owner}, not "
            f"this attempt {self._attempt}. Another job committed it; nothing was overwritten. Stop one of "
            "the two."
        ) from error
