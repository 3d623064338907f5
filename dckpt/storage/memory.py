"""Objects in the memory of this process, for tests and try-outs: `memory://name`. They are gone when it ends."""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from collections.abc import Iterable, Mapping

from dckpt.errors import CorruptCheckpointError, StorageMissingError
from dckpt.storage.object_client import Listing, Put, StoredObject


class MemoryClient:
    """An `ObjectClient` over a dictionary, as strict as a store is."""

    part_bytes_min = 1
    parts_max = 10_000
    copy_bytes_max = 2**40

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._objects: dict[str, tuple[StoredObject, bytes]] = {}
        self._uploads: dict[str, tuple[str, dict[int, bytes]]] = {}
        self._numbers = itertools.count(1)

    def locate(self, key: str) -> str:
        return f"memory://{self._name}/{key}" if key else f"memory://{self._name}"

    def head(self, key: str) -> StoredObject | None:
        with self._lock:
            found = self._objects.get(key)
        return found[0] if found else None

    def get(self, key: str) -> tuple[StoredObject, bytes]:
        with self._lock:
            found = self._objects.get(key)
        if found is None:
            raise self._missing(key)
        return found

    def get_into(self, item: StoredObject, offset: int, target: memoryview) -> int:
        found, data = self.get(item.key)
        if found.tag != item.tag:
            place = self.locate(item.key)
            raise CorruptCheckpointError(
                f"{place}: expected the object that was opened, found another one. Somebody overwrites checkpoints.",
                key=place,
                field="tag",
                expected=item.tag,
                found=found.tag,
            )
        piece = memoryview(data)[offset : offset + len(target)]
        target[: len(piece)] = piece
        return len(piece)

    def list(self, prefix: str, *, deep: bool = False) -> Listing:
        with self._lock:
            found = sorted(
                (item for key, (item, _) in self._objects.items() if key.startswith(prefix)), key=lambda o: o.key
            )
        if deep:
            return Listing(tuple(found))
        here = [item for item in found if "/" not in item.key[len(prefix) :]]
        below = {prefix + item.key[len(prefix) :].partition("/")[0] + "/" for item in found if item not in here}
        return Listing(tuple(here), tuple(sorted(below)))

    def has_any(self, prefix: str) -> bool:
        with self._lock:
            return any(key.startswith(prefix) for key in self._objects)

    def put(self, key: str, data: bytes) -> None:
        with self._lock:
            self._store(key, data)

    def put_if_absent(self, key: str, data: bytes) -> Put:
        with self._lock:
            if key in self._objects:
                return Put.TAKEN
            self._store(key, data)
        return Put.CREATED

    def copy(self, source: str, target: str) -> None:
        _, data = self.get(source)
        self.put(target, data)

    def delete(self, keys: Iterable[str]) -> None:
        with self._lock:
            for key in keys:
                self._objects.pop(key, None)

    def begin_upload(self, key: str) -> str:
        with self._lock:
            upload = str(next(self._numbers))
            self._uploads[upload] = (key, {})
        return upload

    def put_part(self, key: str, upload: str, number: int, data: bytearray) -> str:
        with self._lock:
            self._parts(key, upload)[number] = bytes(data)
        return hashlib.sha256(data).hexdigest()

    def complete_upload(self, key: str, upload: str, tags: Mapping[int, str]) -> None:
        with self._lock:
            parts = self._parts(key, upload)
            self._store(key, b"".join(parts[number] for number in sorted(tags)))
            del self._uploads[upload]

    def abort_upload(self, key: str, upload: str) -> None:  # noqa: ARG002 (of the contract)
        with self._lock:
            self._uploads.pop(upload, None)

    def abort_uploads(self, prefix: str) -> int:
        with self._lock:
            found = [upload for upload, (key, _) in self._uploads.items() if key.startswith(prefix)]
            for upload in found:
                del self._uploads[upload]
        return len(found)

    def _store(self, key: str, data: bytes) -> None:
        now = time.time()
        self._objects[key] = (StoredObject(key, len(data), now, str(next(self._numbers))), bytes(data))

    def _parts(self, key: str, upload: str) -> dict[int, bytes]:
        if upload not in self._uploads:
            raise self._missing(f"{key} (upload {upload})")
        return self._uploads[upload][1]

    def _missing(self, key: str) -> StorageMissingError:
        place = self.locate(key)
        return StorageMissingError(
            f"{place}: expected an object, found none. It was deleted or never written.", key=place
        )


_clients: dict[str, MemoryClient] = {}
_clients_lock = threading.Lock()


def memory_client(name: str) -> MemoryClient:
    """The objects of that name in this process, the same ones at each call."""
    with _clients_lock:
        return _clients.setdefault(name, MemoryClient(name))
