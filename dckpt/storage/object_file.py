"""Reading ranges of one object, and writing one in parts from several threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import TracebackType

from dckpt.errors import CorruptCheckpointError, StorageError, StorageMissingError
from dckpt.storage.object_client import ObjectClient, StoredObject
from dckpt.storage.object_create import quietly

PART_BYTES = 16 * 2**20
"""One segment of a file, which one thread fills from its beginning to its end: so each thread has one part in memory."""


class ObjectReader:
    """A `RangeReader`. There is no page cache: each read is one request, of the version that was there at the open."""

    def __init__(self, client: ObjectClient, item: StoredObject) -> None:
        self._client = client
        self._item = item
        self._place = client.locate(item.key)
        self._is_closed = False
        self.size = item.size

    def read_into(self, offset: int, target: memoryview) -> None:
        self.read_scattered(offset, [target])

    def read_scattered(self, offset: int, targets: Sequence[memoryview]) -> None:
        if self._is_closed:
            raise StorageError(f"Read {self._place}: the reader is closed.", key=self._place)
        views = [view for target in targets if (view := _as_bytes(target))]
        end = offset + sum(map(len, views))
        if end > self.size:
            self._raise_short(end, self.size)
        if len(views) > 1:
            # One request for all of it: a request costs more than the copy of what is seldom more than 4 MiB.
            whole = memoryview(bytearray(end - offset))
            self._fill(offset, whole)
            for view in views:
                view[:], whole = whole[: len(view)], whole[len(view) :]
            return
        for view in views:
            self._fill(offset, view)

    def read_cached(self, offset: int, targets: Sequence[memoryview]) -> bool:  # noqa: ARG002 (of the contract)
        return False

    def read_around(self, offset: int, size: int, memory: memoryview) -> bool:  # noqa: ARG002 (of the contract)
        return False

    def close(self) -> None:
        self._is_closed = True

    def __enter__(self) -> ObjectReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fill(self, offset: int, view: memoryview) -> None:
        count = self._client.get_into(self._item, offset, view)
        if count < len(view):
            self._raise_short(offset + len(view), offset + count)

    def _raise_short(self, expected: int, found: int) -> None:
        raise CorruptCheckpointError(
            f"{self._place}: expected at least {expected:,} bytes, found {found:,}. The object was cut short; "
            "load an older step, and run `dckpt verify` to see the damage.",
            key=self._place,
            field="size",
            expected=expected,
            found=found,
        )


class _Part:
    """The bytes of one part that are here, in any order."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self.filled = 0
        self.end = 0


class ObjectWriter:
    """A `FileWriter`: a part that is full is sent at once, by the thread that filled it, and its memory given back.

    A file of at most one part is one conditional create. Nothing is visible before `finish`.
    """

    wants_aligned = False

    def __init__(
        self, client: ObjectClient, key: str, create: Callable[[str, bytes], None], *, part_bytes: int = PART_BYTES
    ) -> None:
        self._client = client
        self._key = key
        self._create = create
        self._place = client.locate(key)
        self._part_bytes = max(part_bytes, client.part_bytes_min)
        self._lock = threading.Lock()
        self._parts: dict[int, _Part] = {}
        self._tags: dict[int, str] = {}
        self._upload: str | None = None
        self._is_closed = False

    def write_at(self, offset: int, data: memoryview) -> None:
        rest = _as_bytes(data)
        try:
            while rest:
                number, begin = divmod(offset, self._part_bytes)
                piece = rest[: self._part_bytes - begin]
                self._fill(number, begin, piece)
                rest, offset = rest[len(piece) :], offset + len(piece)
        except StorageError:
            self._is_closed = True
            raise

    def finish(self, size: int) -> None:
        self._ensure_open()
        self._is_closed = True
        try:
            self._ensure_whole(size)
            if self._upload is None:
                whole = self._parts[0].data[:size] if size else b""
                self._create(self._key, bytes(whole))
            else:
                for number, part in sorted(self._parts.items()):
                    if number * self._part_bytes < size:
                        del part.data[size - number * self._part_bytes :]
                        self._send(number, part)
                self._complete(self._upload, size)
                self._upload = None
        except StorageError:
            self.abandon()
            raise
        self._parts.clear()

    def abandon(self) -> None:
        self._is_closed = True
        self._parts.clear()
        with self._lock:
            upload, self._upload = self._upload, None
        if upload is not None:
            quietly(
                lambda: self._client.abort_upload(self._key, upload), f"the upload of {self._place} was not aborted"
            )

    def _fill(self, number: int, begin: int, piece: memoryview) -> None:
        self._ensure_open()
        with self._lock:
            part = self._parts.get(number)
            if part is None:
                part = self._parts[number] = _Part(self._part_bytes)
        part.data[begin : begin + len(piece)] = piece
        with self._lock:
            part.filled += len(piece)
            part.end = max(part.end, begin + len(piece))
            is_full = part.filled == self._part_bytes
            if is_full:
                del self._parts[number]
        if is_full:
            self._send(number, part)

    def _send(self, number: int, part: _Part) -> None:
        with self._lock:
            if self._upload is None:
                self._upload = self._client.begin_upload(self._key)
            upload = self._upload
        tag = self._client.put_part(self._key, upload, number + 1, part.data)
        with self._lock:
            self._tags[number + 1] = tag

    def _complete(self, upload: str, size: int) -> None:
        try:
            self._client.complete_upload(self._key, upload, self._tags)
        except StorageMissingError:
            # A request whose answer was lost has completed it, and a repeated one finds no upload any more. The name is
            # this attempt's alone, so what has it is this file.
            found = self._client.head(self._key)
            if found is None or found.size != size:
                raise

    def _ensure_whole(self, size: int) -> None:
        """Every byte before `size` was written; what was written behind it is cut off, unless it was sent already."""
        sent = {number - 1 for number in self._tags}
        count = -(-size // self._part_bytes)
        found = 0
        for number in range(count):
            wanted = min(self._part_bytes, size - number * self._part_bytes)
            part = self._parts.get(number)
            found += wanted if number in sent else min(wanted, part.filled if part else 0)
        if found < size:
            raise StorageError(
                f"Write {self._place}: expected {size:,} bytes, found {found:,}. Part of the object was never written; this "
                "attempt is given up.",
                key=self._place,
            )
        assert not sent or (max(sent) + 1) * self._part_bytes <= size, "bytes behind the end of the file were sent"

    def _ensure_open(self) -> None:
        if self._is_closed:
            raise StorageError(f"Write {self._place}: the file is closed, or a write to it failed.", key=self._place)


def _as_bytes(data: memoryview) -> memoryview:
    return data if data.format == "B" and data.ndim == 1 else data.cast("B")
