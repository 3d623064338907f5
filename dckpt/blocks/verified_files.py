"""The shard files of one checkpoint, opened when first asked for and shared by threads; a bounded number at once."""

from __future__ import annotations

import contextlib
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dckpt.blocks.read import VerifiedFile
from dckpt.errors import CorruptCheckpointError
from dckpt.format.index import LayoutIndex
from dckpt.format.manifest import FileEntry, Manifest

if TYPE_CHECKING:
    from types import TracebackType

    from dckpt.storage.base import Storage

OPEN_FILES_MAX = 64
SUMS_BYTES_MAX = 64 * 2**20
"""Block checksums held in memory at once, of files that nobody reads just now: those of 512 GiB."""


class VerifiedFiles:
    """Files of a checkpoint by their number in its index. Several threads may borrow at once."""

    def __init__(self, storage: Storage, checkpoint: str, manifest: Manifest, index: LayoutIndex) -> None:
        self._storage = storage
        self._checkpoint = checkpoint
        self._manifest = manifest
        self._index = index
        self._entries = {entry.name: entry for entry in manifest.shard_entries}
        self._extents = index.file_extents()
        self._lock = threading.Lock()
        self._open: OrderedDict[int, VerifiedFile] = OrderedDict()
        self._borrowed: dict[int, int] = {}

    def __enter__(self) -> VerifiedFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes what is open; nobody may still read."""
        with self._lock:
            while self._open:
                self._open.popitem()[1].close()

    @contextlib.contextmanager
    def borrow(self, number: int) -> Iterator[VerifiedFile]:
        """The file, open for as long as the body runs."""
        with self._lock:
            file = self._open.get(number)
            if file is None:
                file = self._open[number] = self._open_file(number)
            self._open.move_to_end(number)
            self._borrowed[number] = self._borrowed.get(number, 0) + 1
        try:
            yield file
        finally:
            with self._lock:
                self._borrowed[number] -= 1
                self._close_oldest()

    def _close_oldest(self) -> None:
        held = sum(file.sums.blocks.nbytes for file in self._open.values())
        idle = [number for number in self._open if not self._borrowed.get(number)]
        # The one that was used last is kept however large: the next piece is in it.
        for number in idle[:-1]:
            if len(self._open) <= OPEN_FILES_MAX and held <= SUMS_BYTES_MAX:
                return
            file = self._open.pop(number)
            held -= file.sums.blocks.nbytes
            file.close()

    def _open_file(self, number: int) -> VerifiedFile:
        name = self._index.files[number]
        entry = self._entries.get(name)
        if entry is None:
            raise self._inconsistent("manifest.json", "files", f"{name}, which the layout index names", "none")
        if self._extents[number] > entry.size:
            expected = f"at least {self._extents[number]:,} bytes by the layout index"
            raise self._inconsistent(entry.path, "size", expected, f"{entry.size:,} in the manifest")
        return VerifiedFile(self._storage, self._checkpoint, entry, self._sums_entry(entry))

    def _sums_entry(self, entry: FileEntry) -> FileEntry:
        return self._manifest.sums_entry(entry)

    def _inconsistent(self, path: str, field: str, expected: str, found: str) -> CorruptCheckpointError:
        key = f"{self._checkpoint}/{path}"
        return CorruptCheckpointError(
            f"{self._storage.locate(key)}: expected {expected}, found {found}. The checkpoint is inconsistent; use an older "
            "step.",
            key=key,
            field=field,
            expected=expected,
            found=found,
        )

    def read_record(self, name: str, *, limit: int) -> bytes:
        """The bytes of a whole record: a U8 tensor of one dimension and one chunk, at most `limit` bytes.

        A record of another shape is a `CorruptCheckpointError`, found before memory is taken for it.
        """
        meta, chunks = self._index.meta(name), self._index.chunks(name)
        length = math.prod(meta.shape)
        if (meta.dtype, len(meta.shape), len(chunks)) != ("U8", 1, 1) or length > limit:
            expected = f"record {name} to be one U8 chunk of at most {limit:,} bytes"
            found = f"{meta.dtype} {list(meta.shape)} in {len(chunks)} chunks"
            raise self._inconsistent(self._manifest.index_entry.path, name, expected, found)
        with self.borrow(chunks[0].file) as file:
            return bytes(file.read(chunks[0].begin, chunks[0].begin + length))
