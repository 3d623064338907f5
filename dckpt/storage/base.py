"""The storage contract: what every backend promises; one contract suite runs over all of them.

Keys are '/'-separated names relative to the root. Call order of one commit, with who calls:

1. coordinator: `ensure_root`, `make_dirs(attempt directory inside staging_key)`
2. every writing rank: `create_file`, `write_at`..., `finish` for each of its files, or `link` for one that did not
   change, then `sync_dir(attempt directory)`
3. coordinator: `list_dir(attempt directory)`, the index by `create_file`, then `stage_manifest`
4. coordinator: `publish`. This is the commit point; nothing before it makes a checkpoint visible, nothing
   after it may change the checkpoint.

Any error from 2 to 4 condemns the attempt: a retry is a new attempt with new files. `UnknownOutcomeError`
alone means that the operation may have taken effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from dckpt.errors import ConfigError

# The words of the on-disk layout that a storage itself must know. `dckpt.format.layout` documents them; both
# packages are in one row, so neither imports the other, and a test holds them equal.
MANIFEST_NAME = "manifest.json"
STAGING_PREFIX = ".tmp-"
TRASH_PREFIX = ".trash-"
TEMPORARY_PREFIX = ".new-"

DIRECT_ALIGNMENT = 4096
"""What offset, length and memory of a read around the page cache are multiples of."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in a directory. `size` is 0 for a directory."""

    name: str
    is_dir: bool
    size: int


class RangeReader(Protocol):
    """Reads ranges of one file; safe to use from several threads. Use it as a context manager."""

    @property
    def size(self) -> int:
        """Bytes in the file when it was opened."""
        ...

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fills all of `target`; a file that ends earlier is a `CorruptCheckpointError`."""
        ...

    def read_scattered(self, offset: int, targets: Sequence[memoryview]) -> None:
        """Fills the targets, one after the other, with consecutive bytes from `offset` on; as `read_into` otherwise."""
        ...

    def read_cached(self, offset: int, targets: Sequence[memoryview]) -> bool:
        """As `read_scattered` if all of it lies in the page cache. False if not, or if this storage cannot tell.

        After False the targets hold anything. Never waits for the medium.
        """
        ...

    def read_around(self, offset: int, size: int, memory: memoryview) -> bool:
        """Reads `size` bytes from the medium to the beginning of `memory`, without a copy in the page cache.

        False if this storage cannot, or cannot tell what is cached, or not into this memory: then nothing was read.
        `offset` is a multiple of `DIRECT_ALIGNMENT`, and so should be the memory's address and its room for `size`.
        """
        ...

    def close(self) -> None: ...

    def __enter__(self) -> RangeReader: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class FileWriter(Protocol):
    """Writes one new file. `write_at` may be called from several threads on disjoint ranges."""

    @property
    def wants_aligned(self) -> bool:
        """Whether large, page-aligned memory is written without a copy; else any memory is as good."""
        ...

    def write_at(self, offset: int, data: memoryview) -> None:
        """Writes all of `data`. After an error the writer only takes `abandon`."""
        ...

    def finish(self, size: int) -> None:
        """The content, `size` bytes, is durable, the file closed. Its *name* is durable after `sync_dir`."""
        ...

    def abandon(self) -> None:
        """Closes, promises nothing, never raises. Does nothing after `finish`."""
        ...


class Storage(Protocol):
    """A root and the files below it."""

    @property
    def url(self) -> str:
        """Opens the same place again with `open_storage`."""
        ...

    def locate(self, key: str) -> str:
        """The absolute place of `key`, for messages."""
        ...

    def ensure_writable(self) -> None:
        """`StorageReadOnlyError` if it is known now that nothing can be created here; writes nothing to find out."""
        ...

    def exists(self) -> bool:
        """Whether the root is there. False is an answer of the storage, never a failure to ask it."""
        ...

    def ensure_root(self) -> None:
        """The root exists durably, with all its ancestors: `exists` says yes, and `list_dir` answers."""
        ...

    def read_bytes(self, key: str, *, limit: int, uncached: bool = False) -> bytes:
        """The whole file. `StorageMissingError` if absent. `uncached` as in `open_reader`.

        `CorruptCheckpointError` if it is larger than `limit`, or not a regular file.
        """
        ...

    def open_reader(self, key: str, *, uncached: bool = False) -> RangeReader:
        """Opens a file for range reads. `uncached` asks the medium, not the page cache."""
        ...

    def size(self, key: str) -> int:
        """Bytes in the file `key`."""
        ...

    def modified_unix_s(self, key: str) -> float:
        """When the file or directory `key` itself was last changed, by the storage's clock; 0 if only what is in it tells."""
        ...

    def list_dir(self, key: str = "") -> list[Entry]:
        """The entries of a directory, sorted by name. `StorageMissingError` if it is not there.

        Checkpoints without a manifest and the files of attempts in progress are not seen under the name of a checkpoint, but
        as `staging_key` names them. A directory that `create` made may be gone when its last file is.
        """
        ...

    def create(self, key: str, data: bytes) -> None:
        """A small file, exclusively: whole or absent at any instant, durable on return, with its directories.

        `KeyExistsError` if the name is taken (the bytes there stay). `UnknownOutcomeError` if the name was
        made and its directory could not be synced.
        """
        ...

    def make_dirs(self, key: str) -> None:
        """The directory exists, with those above it. Durable once its own directory is synced."""
        ...

    def create_file(self, key: str, *, is_large: bool = False, size: int | None = None) -> FileWriter:
        """A new file, exclusively; `KeyExistsError` if the name is taken. Its directory must exist.

        Where nothing but a small object can be created exclusively, a name that is taken while a large one is being written is
        not noticed: names below an attempt are nobody else's.
        `is_large`: worth going around the page cache where the storage can. Takes the same calls either way.
        `size`: the bytes that it will have, where they are known; a very large file may be refused without.
        """
        ...

    def link(self, source: str, target: str) -> bool:
        """`target` is one more name of the file `source`, exclusively; each name outlives the other. Durable after `sync_dir`.

        A copy that the storage itself makes is as good. False if it has neither, or none for this file: nothing was made.
        `StorageMissingError` if the source or the target's directory is gone, `KeyExistsError` if another file has the name.
        """
        ...

    def sync_dir(self, key: str = "") -> None:
        """The names in the directory are durable."""
        ...

    def staging_key(self, checkpoint: str, attempt: str) -> str:
        """Where the attempt's files are written before the commit. Every process that writes or commits asks for it."""
        ...

    def stage_manifest(self, staging: str, manifest: bytes) -> None:
        """Writes the manifest into the staging directory; it and every name in the directory are durable."""
        ...

    def publish(self, staging: str, checkpoint: str, manifest: bytes) -> None:
        """THE commit point: the staged attempt becomes the checkpoint, durably.

        `KeyExistsError` if the name is taken, `StorageMissingError` if the staging directory was swept:
        nothing was published by this call. `UnknownOutcomeError` if the answer is not known, or the name is
        visible and not durable.
        """
        ...

    def discard(self, key: str, *, onto: str | None = None) -> None:
        """Deletes a file or a directory; nobody sees a half-deleted one under its name, also after a crash.

        Nothing happens if it is missing. What is deleted stays deleted after a crash, or lies in the trash. `onto`: an
        empty directory in the trash, to which a directory is moved first; if that is gone, `StorageMissingError`, and
        nothing was deleted.
        """
        ...

    def free_bytes(self) -> int | None:
        """Bytes that this user can still write, None where the storage does not say."""
        ...


def check_key(key: str) -> str:
    """`key` if it is a relative name without '.' and '..'; `ConfigError` otherwise."""
    parts = key.split("/")
    if "\0" in key or any(part in ("", ".", "..") for part in parts):
        raise ConfigError(
            f"Storage key {key!r}: expected a relative name such as 'step-0000000100.g0001/manifest.json', "
            "without empty components, '.', '..' or NUL."
        )
    return key


def parent_key(key: str) -> str:
    """The key of the directory that holds `key`; '' is the root."""
    return key.rpartition("/")[0]
