"""Each shard file of a checkpoint, block by block: what is good, what another place gives back, what is lost. Reads only.

A block is given back only by bytes whose checksum is the one that was recorded when it was written, and a file that is written
anew from them must have the digest that the manifest states. So what is restored is proved, wherever it came from.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import xxhash

from dckpt.blocks.read import read_checked
from dckpt.blocks.scan import FileScan, ScanItem, scan_file
from dckpt.errors import CorruptCheckpointError, StorageError, StorageMissingError
from dckpt.format.checksum import BLOCK_BYTES, FileHasher, Sums, block_checksums, digest_bytes, parse_sums
from dckpt.format.index import LayoutIndex
from dckpt.format.manifest import FileEntry, Manifest
from dckpt.format.shard_file import ShardFilePlan, ShardTensor, plan_shard_file
from dckpt.storage.base import Storage
from dckpt.tools.siblings import Place, ReadError, Siblings

GROUP_BLOCKS = 64
"""Blocks asked of another place at once: 4 MiB."""

FLIPS_MAX = 8
"""Blocks of one checkpoint that are searched for a single flipped bit; each takes a second or so."""

BYTES_MAX = 1
"""Blocks that are searched for a single wrong byte; it takes half a minute or so."""

ONE_BIT = tuple(1 << bit for bit in range(8))
SEVERAL_BITS = tuple(mask for mask in range(1, 256) if mask not in ONE_BIT)


@dataclass(frozen=True, slots=True)
class Segment:
    """Blocks `first` to `stop` (exclusive) of a file, and where their bytes are: a place, or here."""

    first: int
    stop: int
    source: Place | bytes


@dataclass(slots=True)
class FileState:
    """One shard file. `sums` None: nothing says which of its blocks are good, and the file is not.

    is_intact: every byte in place is good. segments: all good blocks, ascending. lost: the others, with every byte in them: a
    fingerprint alone proves no bytes, because damage in a pattern (a page of zeros among equal values) can leave it as it was.
    plan: where its tensors lie, if that is known. taken: from where -> the blocks that were restored. notes: what was restored
    and from where, a sentence each.
    """

    entry: FileEntry
    place: Place
    sums: Sums | None
    has_good_sums: bool
    is_intact: bool = False
    segments: list[Segment] = field(default_factory=list)
    lost: list[tuple[int, int]] = field(default_factory=list)
    plan: ShardFilePlan | None = None
    taken: dict[str, list[int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        """Whether every block is good here or elsewhere."""
        return self.sums is not None and not self.lost

    def read(self, begin: int, end: int, target: memoryview) -> None:
        """Fills `target` with bytes `begin` to `end`, each block compared with its checksum once more.

        `CorruptCheckpointError` if a source changed since it was looked at, or a block is lost.
        """
        assert self.sums is not None
        assert len(target) == end - begin
        for first, stop, data in self._blocks(begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)):
            if not np.array_equal(block_checksums(data), self.sums.blocks[first:stop]):
                raise self._changed(first, stop)
            low, high = max(begin, first * BLOCK_BYTES), min(end, first * BLOCK_BYTES + len(data))
            target[low - begin : high - begin] = data[low - first * BLOCK_BYTES : high - first * BLOCK_BYTES]

    def _blocks(self, first: int, stop: int) -> Iterator[tuple[int, int, bytes]]:
        at = first
        begin = bisect_right(self.segments, first, key=lambda segment: segment.stop)
        for segment in itertools.islice(self.segments, begin, None):
            if segment.first >= stop:
                break
            low, high = max(at, segment.first), min(stop, segment.stop)
            if low != at and low < high:
                break
            while low < high:
                upper = min(high, low + GROUP_BLOCKS)
                low_byte, end = low * BLOCK_BYTES, min(upper * BLOCK_BYTES, self.entry.size)
                source = segment.source
                if isinstance(source, bytes):
                    base = segment.first * BLOCK_BYTES
                    data: bytes | None = source[low_byte - base : end - base]
                else:
                    data = source.read(low_byte, end - low_byte)
                if data is None:
                    raise self._changed(low, upper)
                yield low, upper, data
                at = low = upper
        if at < stop:
            raise self._changed(at, stop)

    def _changed(self, first: int, stop: int) -> CorruptCheckpointError:
        return CorruptCheckpointError(
            f"{self.place.storage.locate(self.place.key)}: blocks {first} to {stop - 1}: expected the bytes that were there when "
            "this repair was planned, found others. Somebody changes the files; plan again.",
            key=self.place.key,
            field=f"blocks {first}-{stop}",
        )


class Restorer:
    """Looks at every shard file of one checkpoint and finds what is damaged again elsewhere."""

    def __init__(
        self,
        storage: Storage,
        name: str,
        manifest: Manifest,
        index: LayoutIndex | None,
        siblings: Siblings,
        on_bytes: Callable[[int], None] | None = None,
    ) -> None:
        self._storage = storage
        self._name = name
        self._manifest = manifest
        self._index = index
        self._siblings = siblings
        self._shards = {entry.name: entry for entry in manifest.shard_entries}
        self._on_bytes = on_bytes
        self._flips_left = FLIPS_MAX
        self._bytes_left = BYTES_MAX

    def look(self, entry: FileEntry) -> FileState:
        """Reads the whole file, and whatever else it takes to give its damaged blocks back."""
        place = Place(self._storage, entry.key_in(self._name), self._name)
        sums = self._read_sums(entry)
        state = FileState(entry, place, sums, has_good_sums=sums is not None, plan=self._plan(entry))
        trouble: StorageError | None = None
        scan: FileScan | None = None
        try:
            scan = scan_file(self._storage, ScanItem(place.key, entry.digest, sums), on_bytes=self._on_bytes)
        except (CorruptCheckpointError, StorageMissingError):
            pass  # Gone, or no regular file: every block has to come from elsewhere.
        except StorageError as error:
            trouble = error  # Block by block some of it may be readable, and the rest lies elsewhere.
        state.is_intact = scan is not None and (scan.digest, scan.size) == (entry.digest, entry.size)
        if state.sums is None:
            self._find_sums(state)
        if state.sums is not None:
            self._restore(state, self._bad_blocks(state, scan))
        if trouble is not None and not state.is_whole:
            # What cannot be read today is not lost: nothing may be given up for it.
            raise trouble
        if state.is_whole and not state.is_intact and not state.notes:
            state.notes.append(f"{entry.name} without what was added to it; every block of it is there")
        return state

    def _plan(self, entry: FileEntry) -> ShardFilePlan | None:
        """The file's layout by the index; None if a writer of another kind laid it out."""
        index = self._index
        return None if index is None else plan_of_file(index, entry.name, entry.size)

    # -- sums ----------------------------------------------------------------------------------------------------------

    def _read_sums(self, entry: FileEntry) -> Sums | None:
        try:
            sums_entry = self._manifest.sums_entry(entry)
            sums = parse_sums(read_checked(self._storage, self._name, sums_entry), key=sums_entry.path)
        except ReadError:
            return None  # Reported as a row of the plan by whoever sees `has_good_sums`.
        return sums if (sums.file_bytes, sums.digest) == (entry.size, entry.digest) else None

    def _find_sums(self, state: FileState) -> None:
        """Sums that another checkpoint has of the same file, or of the file itself if its digest is right."""
        entry = state.entry
        for place, found in self._siblings.sums_of_same(entry):
            data = place.read(0, found.size)
            if data is None or digest_bytes(data) != found.digest:
                continue
            sums = parse_sums(data, key=place.key)
            if (sums.file_bytes, sums.digest) == (entry.size, entry.digest):
                state.sums = sums
                state.notes.append(f"checksums of {entry.name} from {place.label}")
                return
        sources = [state.place] if state.is_intact else list(self._siblings.same_files(entry))
        for place in sources:
            found_sums = self._compute_sums(place, entry)
            if found_sums is not None:
                state.sums = found_sums
                state.notes.append(f"checksums of {entry.name} computed again; its digest is the recorded one")
                return

    def _compute_sums(self, place: Place, entry: FileEntry) -> Sums | None:
        hasher = FileHasher()
        for begin in range(0, entry.size, GROUP_BLOCKS * BLOCK_BYTES):
            data = place.read(begin, min(GROUP_BLOCKS * BLOCK_BYTES, entry.size - begin))
            if data is None:
                return None
            hasher.update(data)
        return Sums(entry.size, entry.digest, hasher.checksums()) if hasher.digest() == entry.digest else None

    # -- blocks --------------------------------------------------------------------------------------------------------

    def _bad_blocks(self, state: FileState, scan: FileScan | None) -> npt.NDArray[np.bool_]:
        assert state.sums is not None
        bad = np.zeros(len(state.sums.blocks), dtype=np.bool_)
        if state.is_intact:
            return bad
        if scan is None or scan.bad_ranges is None:
            bad[:] = True
            return bad
        for begin, end in scan.bad_ranges:
            bad[begin // BLOCK_BYTES : -(-end // BLOCK_BYTES)] = True
        # A file of another size: its last block was cut or joined with what follows.
        if scan.size != state.entry.size:
            bad[min(scan.size, state.entry.size) // BLOCK_BYTES :] = True
        return bad

    def _restore(self, state: FileState, bad: npt.NDArray[np.bool_]) -> None:
        segments = [Segment(first, stop, state.place) for first, stop in _runs(~bad)]
        for first, stop in _runs(bad):
            for begin in range(first, stop, GROUP_BLOCKS):
                segments += self._restore_group(state, begin, min(stop, begin + GROUP_BLOCKS))
        state.segments = sorted(segments, key=lambda segment: segment.first)
        held = np.zeros(len(bad), dtype=np.bool_)
        for segment in segments:
            held[segment.first : segment.stop] = True
        state.lost = _runs(~held)
        state.notes += [
            f"{_shown_blocks(state, blocks)} of {state.entry.name} {how}" for how, blocks in state.taken.items()
        ]

    def _restore_group(self, state: FileState, first: int, stop: int) -> list[Segment]:
        assert state.sums is not None
        left = set(range(first, stop))
        found: list[Segment] = []
        size = self._end(state, stop) - first * BLOCK_BYTES
        for place in (state.place, *self._siblings.same_files(state.entry)):
            data = place.read(first * BLOCK_BYTES, size)
            if data is None:
                continue
            good = block_checksums(data) == state.sums.blocks[first:stop]
            taken = [block for block in sorted(left) if good[block - first]]
            found += [Segment(begin, end, place) for begin, end in _stretches(taken)]
            left -= set(taken)
            if taken and place is not state.place:
                state.taken.setdefault(f"from {place.label}", []).extend(taken)
            if not left:
                return found
        for block in sorted(left):
            segment = self._assemble(state, block) or self._unflip(state, block)
            if segment is not None:
                found.append(segment)
        return found

    def _end(self, state: FileState, stop: int) -> int:
        return min(stop * BLOCK_BYTES, state.entry.size)

    def _matches(self, state: FileState, block: int, data: bytes | bytearray) -> bool:
        assert state.sums is not None
        return xxhash.xxh3_64_intdigest(data) == int(state.sums.blocks[block])

    def _assemble(self, state: FileState, block: int) -> Segment | None:
        """The block put together from the same tensors elsewhere: frozen ones, records that are equal on other ranks."""
        begin, end = block * BLOCK_BYTES, self._end(state, block + 1)
        base = state.place.read(begin, end - begin)
        parts = list(self._parts(state, begin, end))
        if not parts:
            return None
        whole = bytearray(base or bytes(end - begin))
        tries: list[tuple[bytes | bytearray, str]] = []
        for offset, data, label in parts:
            whole[offset : offset + len(data)] = data
            if base is not None:
                alone = bytearray(base)
                alone[offset : offset + len(data)] = data
                tries.append((alone, label))
        tries.insert(0, (whole, ", ".join(dict.fromkeys(label for _, _, label in parts))))
        for tried, label in tries:
            if self._matches(state, block, tried):
                state.taken.setdefault(f"put together from equal bytes in {label}", []).append(block)
                return Segment(block, block + 1, bytes(tried))
        return None

    def _parts(self, state: FileState, begin: int, end: int) -> Iterator[tuple[int, bytes, str]]:
        """(offset in the block, bytes, from where) of what may belong there; the likeliest of each tensor last."""
        index = self._index
        if index is None or state.entry.name not in index.files:
            return
        located = index.located_chunks(index.files.index(state.entry.name))
        if state.plan is not None and begin < len(state.plan.header):
            yield 0, state.plan.header[begin:end], "the layout index"
        for name, item_bytes, chunk in located:
            low = max(begin, chunk.begin)
            high = min(end, chunk.begin + int(np.prod(chunk.sizes, dtype=np.int64)) * item_bytes)
            if low >= high:
                continue
            sources = [*self._siblings.same_chunks(name, index.meta(name).dtype, chunk), *self._peers(index, name)]
            for place, at in reversed(sources):
                data = place.read(at + low - chunk.begin, high - low)
                if data is not None:
                    yield low - begin, data, place.label

    def _peers(self, index: LayoutIndex, name: str) -> Iterator[tuple[Place, int]]:
        """The same record of other ranks: they may be equal."""
        if not name.startswith("rank."):
            return
        meta, tail = index.meta(name), name.split(".", 2)[2]
        for rank in range(min(self._manifest.world_size, GROUP_BLOCKS)):
            other = f"rank.{rank}.{tail}"
            if other == name or other not in index or index.meta(other).shape != meta.shape:
                continue
            for chunk in index.chunks(other):
                entry = self._shards.get(index.files[chunk.file])
                if entry is not None:
                    yield Place(self._storage, entry.key_in(self._name), f"{other} of this checkpoint"), chunk.begin

    def _unflip(self, state: FileState, block: int) -> Segment | None:
        """A block with one wrong bit, or one wrong byte. Chance finds a wrong one in 1 of 2^40 blocks, and then the file's digest
        does not match.
        """
        begin = block * BLOCK_BYTES
        base = state.place.read(begin, self._end(state, block + 1) - begin)
        if base is None or self._flips_left <= 0:
            return None
        self._flips_left -= 1
        searches = [(ONE_BIT, "one flipped bit")]
        if self._bytes_left > 0:
            searches.append((SEVERAL_BITS, "one wrong byte"))
        for masks, what in searches:
            if masks is SEVERAL_BITS:
                self._bytes_left -= 1
            found = self._search(state, block, bytearray(base), masks)
            if found is not None:
                at, data = found
                state.notes.append(f"{what} of {state.entry.name} turned back, in byte {begin + at:,}")
                return Segment(block, block + 1, data)
        return None

    def _search(
        self, state: FileState, block: int, data: bytearray, masks: tuple[int, ...]
    ) -> tuple[int, bytes] | None:
        """(place, whole block) of the one byte that differs by one of `masks`."""
        assert state.sums is not None
        expected, digest = int(state.sums.blocks[block]), xxhash.xxh3_64_intdigest
        for at, right in enumerate(bytes(data)):
            for mask in masks:
                data[at] = right ^ mask
                if digest(data) == expected:
                    return at, bytes(data)
            data[at] = right
        return None


def plan_of_file(index: LayoutIndex, name: str, size: int) -> ShardFilePlan | None:
    """How the index says that a shard file is laid out; None if it does not name it, or another writer laid it out otherwise."""
    if name not in index.files:
        return None
    located = index.located_chunks(index.files.index(name))
    tensors = []
    for tensor, _, chunk in located:
        meta = index.meta(tensor)
        tensors.append(ShardTensor(tensor, meta.dtype, chunk.sizes, chunk.offsets, tuple(meta.shape)))
    plan = plan_shard_file(name, tensors)
    begins = {tensor: chunk.begin for tensor, _, chunk in located}
    is_same = all(begins[tensor.name] == begin for tensor, begin in zip(plan.tensors, plan.begins, strict=True))
    return plan if is_same and plan.size == size else None


def _runs(mask: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """(first, stop) of each stretch of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return [(int(first), int(stop)) for first, stop in zip(edges[::2], edges[1::2], strict=True)]


def _stretches(blocks: list[int]) -> list[tuple[int, int]]:
    """(first, stop) of each stretch of numbers that follow each other; `blocks` ascend."""
    found: list[tuple[int, int]] = []
    for block in blocks:
        if found and found[-1][1] == block:
            found[-1] = (found[-1][0], block + 1)
        else:
            found.append((block, block + 1))
    return found


def _shown_blocks(state: FileState, blocks: list[int]) -> str:
    size = sum(min((block + 1) * BLOCK_BYTES, state.entry.size) - block * BLOCK_BYTES for block in blocks)
    places = len(_stretches(sorted(blocks)))
    where = "" if places == 1 else f" in {places:,} places"
    return f"{size:,} bytes{where} from byte {min(blocks) * BLOCK_BYTES:,} on"
