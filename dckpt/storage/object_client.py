"""What an object store has to offer: whole objects, ranges, listings, a conditional create, uploads in parts."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One object. `tag` changes whenever its content does."""

    key: str
    size: int
    modified_unix_s: float
    tag: str


@dataclass(frozen=True, slots=True)
class Listing:
    """Objects, and with a shallow listing the prefixes (ending in '/') below which there are more. Sorted by key."""

    objects: tuple[StoredObject, ...]
    prefixes: tuple[str, ...] = ()


class Put(enum.Enum):
    """What a conditional create was answered with."""

    CREATED = "created"
    TAKEN = "taken"
    UNCLEAR = "unclear"
    """No answer, or one that does not tell: the object may be there now, or may still come."""


class ObjectClient(Protocol):
    """One store and bucket. Safe to use from several threads. Keys are whole: this knows nothing of a root.

    Every call is repeated where it may pass and ends by a deadline; what is missing is a `StorageMissingError`, a refusal
    `StorageReadOnlyError`, a full store `StorageFullError`, anything else a `TransientStorageError` or `StorageError`.
    No message holds a credential. `put_if_absent` alone is tried once: who calls it has to read back.
    """

    @property
    def part_bytes_min(self) -> int:
        """The smallest part of an upload but for its last one."""
        ...

    @property
    def parts_max(self) -> int:
        """The most parts that one upload may have."""
        ...

    @property
    def copy_bytes_max(self) -> int:
        """The largest object that `copy` takes."""
        ...

    def locate(self, key: str) -> str:
        """The URL of the object, for messages."""
        ...

    def head(self, key: str) -> StoredObject | None:
        """The object, None if there is none."""
        ...

    def get(self, key: str) -> tuple[StoredObject, bytes]:
        """A small object with its content, both of one moment."""
        ...

    def get_into(self, item: StoredObject, offset: int, target: memoryview) -> int:
        """Fills `target` from `offset` on and returns how many bytes there were.

        `CorruptCheckpointError` if the object was replaced since `item` was seen.
        """
        ...

    def list(self, prefix: str, *, deep: bool = False) -> Listing:
        """Everything whose key begins with `prefix`; shallow: up to the next '/' only."""
        ...

    def has_any(self, prefix: str) -> bool:
        """Whether any key begins with `prefix`."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """A small object, replaced if it is there."""
        ...

    def put_if_absent(self, key: str, data: bytes) -> Put:
        """One request, only if nothing has this key. Raises only what is a certain refusal."""
        ...

    def copy(self, source: str, target: str) -> None:
        """A copy made by the store itself, whole or absent."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """The objects are gone; nothing happens to those that were not there."""
        ...

    def begin_upload(self, key: str) -> str:
        """Starts an upload in parts and returns its id. Nothing is visible before `complete_upload`."""
        ...

    def put_part(self, key: str, upload: str, number: int, data: bytearray) -> str:
        """Sends part `number`, from 1 on, and returns its tag."""
        ...

    def complete_upload(self, key: str, upload: str, tags: Mapping[int, str]) -> None:
        """The parts, in the order of their numbers, are the object."""
        ...

    def abort_upload(self, key: str, upload: str) -> None:
        """Nothing is left of the upload. Nothing happens if there is none."""
        ...

    def abort_uploads(self, prefix: str) -> int:
        """Aborts every upload whose key begins with `prefix`; returns how many."""
        ...
