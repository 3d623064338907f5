"""Other places that may hold the same bytes as a checkpoint's files: other checkpoints of the run, copies elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from dckpt.catalog.catalog import Catalog
from dckpt.errors import CorruptCheckpointError, FormatVersionError, StorageError
from dckpt.format.index import Chunk, LayoutIndex
from dckpt.format.layout import CheckpointId, parse_checkpoint_name
from dckpt.format.manifest import FileEntry, Manifest
from dckpt.storage.base import Storage
from dckpt.tools.target import open_target

log = logging.getLogger(__name__)

ReadError = (CorruptCheckpointError, FormatVersionError, StorageError)

TENSOR_SIBLINGS_MAX = 8
"""In how many checkpoints a single tensor is looked for: what did not change since the eighth is in the first."""


@dataclass(frozen=True, slots=True)
class Place:
    """One file that should have the bytes that are looked for. `label` is what a person calls it."""

    storage: Storage
    key: str
    label: str

    def read(self, begin: int, size: int, *, uncached: bool = False) -> bytes | None:
        """The bytes, not judged; None if they cannot be read."""
        try:
            with self.storage.open_reader(self.key, uncached=uncached) as reader:
                if reader.size < begin + size:
                    return None
                data = bytearray(size)
                reader.read_into(begin, memoryview(data))
                return bytes(data)
        except (CorruptCheckpointError, StorageError) as error:
            # A candidate that cannot be read is no candidate; whoever asks goes on to the next one.
            log.info("%s cannot be read: %s", self.storage.locate(self.key), error)
            return None


# Without slots: the index is read when it is first asked for and kept in the instance's dict.
@dataclass(frozen=True)
class Sibling:
    """Another checkpoint, its manifest read and sealed."""

    storage: Storage
    name: str
    manifest: Manifest
    label: str

    @cached_property
    def index(self) -> LayoutIndex | None:
        """Where its tensors lie; None if that cannot be read."""
        try:
            return Catalog(self.storage).read_index(self.name, self.manifest)
        except ReadError as error:
            log.info("%s is no source of single tensors: %s", self.label, error)
            return None

    @cached_property
    def by_content(self) -> dict[tuple[str, str, int], list[FileEntry]]:
        """(kind, digest, size) -> its files."""
        found: dict[tuple[str, str, int], list[FileEntry]] = {}
        for entry in self.manifest.files:
            found.setdefault((entry.kind, entry.digest, entry.size), []).append(entry)
        return found

    @cached_property
    def shards(self) -> dict[str, FileEntry]:
        """Its shard files by the names that its index gives them."""
        return {entry.name: entry for entry in self.manifest.shard_entries}

    def place(self, entry: FileEntry) -> Place:
        """Where one of its files lies."""
        return Place(self.storage, entry.key_in(self.name), self.label)


class Siblings:
    """The other checkpoints, those of `copies` first, then those of the run, the nearest in steps first."""

    def __init__(self, storage: Storage, name: str, *, is_run: bool, copies: Sequence[str] = ()) -> None:
        self._own = storage.locate(name)
        self._wanted = parse_checkpoint_name(name)
        found: list[Sibling] = []
        for text in copies:
            found += self._of_copy(text)
        if is_run:
            found += self._of_run(storage, label="")
        self.all: tuple[Sibling, ...] = tuple(found)

    def _of_copy(self, text: str) -> list[Sibling]:
        target = open_target(text)
        if target.checkpoint is None:
            return self._of_run(target.storage, label=f"{target.storage.url}/")
        return self._read(target.storage, [target.checkpoint], label=f"{target.storage.url}/")

    def _of_run(self, storage: Storage, *, label: str) -> list[Sibling]:
        wanted = self._wanted

        def distance(item: CheckpointId) -> tuple[bool, int, int]:
            if wanted is None:
                return (True, -item.step, -item.generation)
            return (item != wanted, abs(item.step - wanted.step), -item.generation)

        ordered = sorted(Catalog(storage).checkpoints(), key=distance)
        return self._read(storage, [item.name for item in ordered], label=label)

    def _read(self, storage: Storage, names: Sequence[str], *, label: str) -> list[Sibling]:
        found = []
        for name in names:
            if storage.locate(name) == self._own:
                continue
            try:
                manifest, _ = Catalog(storage).read_manifest(name)
            except ReadError as error:
                # `dckpt verify` reports it; here it only means one source less.
                log.info("%s is no source: %s", storage.locate(name), error)
                continue
            found.append(Sibling(storage, name, manifest, f"{label}{name}"))
        return found

    def manifest_of_same(self, attempts: Collection[str]) -> Sibling | None:
        """A copy of the very checkpoint in whose directory `attempts` lie.

        Step and generation are the same in any two runs; an attempt's 128 random bits are in no other checkpoint.
        """
        return next(
            (
                item
                for item in self.all
                if self._wanted is not None and item.manifest.id == self._wanted and item.manifest.attempt in attempts
            ),
            None,
        )

    def of_run(self, run_id: str | None) -> list[Sibling]:
        """Those of the run alone: what is derived and not proved may come from no other. None for a checkpoint without a run."""
        return [item for item in self.all if run_id is not None and item.manifest.run_id == run_id]

    def same_files(self, entry: FileEntry) -> Iterator[Place]:
        """Files that had the same size and digest when they were written; whether they still do is the caller's to find out."""
        for sibling in self.all:
            for found in sibling.by_content.get((entry.kind, entry.digest, entry.size), ()):
                yield sibling.place(found)

    def sums_of_same(self, shard: FileEntry) -> Iterator[tuple[Place, FileEntry]]:
        """Sums files of shard files with the size and digest of `shard`."""
        for sibling in self.all:
            for found in sibling.by_content.get(("shard", shard.digest, shard.size), ()):
                entry = sibling.manifest.sums_entry(found)
                yield sibling.place(entry), entry

    def same_chunks(self, name: str, dtype: str, chunk: Chunk) -> Iterator[tuple[Place, int]]:
        """Places and offsets at which a chunk of this tensor with this very box lies: other values, unless it did not change."""
        for sibling in self.all[:TENSOR_SIBLINGS_MAX]:
            index = sibling.index
            if index is None or name not in index or index.meta(name).dtype != dtype:
                continue
            for found in index.chunks(name):
                if found.file >= 0 and (found.offsets, found.sizes) == (chunk.offsets, chunk.sizes):
                    entry = sibling.shards.get(index.files[found.file])
                    if entry is not None:
                        yield sibling.place(entry), found.begin
