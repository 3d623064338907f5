"""Takes a shard file of an earlier checkpoint over into a new attempt, whole and without writing it again."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dckpt import failpoint
from dckpt.blocks.write import write_small
from dckpt.errors import CorruptCheckpointError, StorageMissingError
from dckpt.format.checksum import Sums, digest_bytes, encode_sums
from dckpt.format.layout import sums_file_name
from dckpt.format.manifest import FileEntry

if TYPE_CHECKING:
    from collections.abc import Collection

    from dckpt.storage.base import Storage

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reusable:
    """A shard file with its sums, and the checkpoint in whose directory the two lie."""

    checkpoint: str
    shard: FileEntry
    sums: FileEntry

    @property
    def shard_key(self) -> str:
        """Where the shard lies."""
        return f"{self.checkpoint}/{self.shard.path}"

    @property
    def sums_key(self) -> str:
        """Where its sums lie."""
        return f"{self.checkpoint}/{self.sums.path}"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a file of an attempt goes: the directory's key, and what the manifest says of the file."""

    directory: str
    attempt: str
    rank: int
    name: str


def take_over(
    storage: Storage, found: Reusable, sums: Sums, place: Place, *, may_refer: Collection[str]
) -> list[FileEntry] | None:
    """The entries of `found` as a file of the attempt; None if it has to be written after all.

    A link where the storage has them, else a reference, if it may be one: `may_refer` are the checkpoints that nobody
    deletes meanwhile. `sums` are those of the bytes that the new file must have. The directory is *not* synced.
    """
    assert (sums.file_bytes, sums.digest) == (found.shard.size, found.shard.digest), "another content"
    failpoint.reach("before_link")
    try:
        if storage.size(found.shard_key) != found.shard.size:
            log.warning("%s has another size than its manifest says; written anew", storage.locate(found.shard_key))
            return None
        is_linked = storage.link(found.shard_key, f"{place.directory}/{place.name}")
    except (StorageMissingError, CorruptCheckpointError) as error:
        # Pruned meanwhile, most likely. If the attempt's own directory is gone, the write says so.
        log.info("not taken over: %s", error)
        return None
    failpoint.reach("after_link")
    if is_linked:
        shard = replace(
            found.shard,
            path=f"{place.attempt}/{place.name}",
            rank=place.rank,
            checkpoint=None,
            reused=found.shard.reused + 1,
        )
        return [shard, _sums_beside(storage, found, sums, place)]
    if found.checkpoint not in may_refer or found.shard.name != place.name:
        return None
    if digest_bytes(encode_sums(sums)) != found.sums.digest:
        return None  # the same bytes, with other fingerprints or none: the tensors have other shapes now
    return [
        replace(found.shard, checkpoint=found.checkpoint, reused=found.shard.reused + 1),
        replace(found.sums, checkpoint=found.checkpoint),
    ]


def _sums_beside(storage: Storage, found: Reusable, sums: Sums, place: Place) -> FileEntry:
    """Linked too, if they would be the same bytes; they are small, so otherwise they are simply written."""
    encoded = encode_sums(sums)
    name = sums_file_name(place.name)
    entry = FileEntry(f"{place.attempt}/{name}", len(encoded), digest_bytes(encoded), "sums", place.rank)
    if (entry.size, entry.digest) == (found.sums.size, found.sums.digest):
        try:
            if storage.size(found.sums_key) == entry.size and storage.link(found.sums_key, f"{place.directory}/{name}"):
                return entry
        except (StorageMissingError, CorruptCheckpointError) as error:
            log.info("sums written anew: %s", error)
    write_small(storage, f"{place.directory}/{name}", encoded)
    return entry
