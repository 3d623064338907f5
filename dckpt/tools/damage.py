"""Damage to a checkpoint's files, put in terms of what is lost: ranks and tensors, not only bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dckpt.errors import CorruptCheckpointError, FormatVersionError, StorageError, StorageMissingError
from dckpt.format.index import LayoutIndex
from dckpt.format.manifest import FileEntry
from dckpt.format.shard_file import ShardHeader


@dataclass(frozen=True, slots=True)
class Damage:
    """One damaged place. `begin` and `end` are bytes of the file; None when the whole file is meant."""

    file: str
    what: str
    begin: int | None = None
    end: int | None = None
    ranks: tuple[int, ...] = ()
    tensors: tuple[str, ...] = ()
    is_unreadable: bool = False
    """The storage failed before the bytes could be judged: nothing is known to be damaged."""


@dataclass(frozen=True, slots=True)
class Extents:
    """Which bytes of one shard file belong to which tensor, ascending: by the index, or its header."""

    data_begin: int
    tensors: tuple[tuple[str, int, int], ...]

    def names_in(self, begin: int, end: int) -> tuple[str, ...]:
        """The tensors that lose bytes when `begin` to `end` are lost."""
        return tuple(name for name, first, stop in self.tensors if first < end and begin < stop)

    def describe(self, begin: int, end: int) -> str:
        """What else than tensors lies in the range."""
        return "header and data" if begin < self.data_begin < end else "header" if begin < self.data_begin else "data"


def extents_from_index(index: LayoutIndex, file: int) -> Extents:
    """The extents that the layout index gives for its file number `file`."""
    chunks = tuple(index.chunks_in_file(file))
    return Extents(data_begin=min((begin for _, begin, _ in chunks), default=0), tensors=chunks)


def extents_from_header(header: ShardHeader) -> Extents:
    """The extents that the shard file itself gives; for naming tensors when the index is lost."""
    chunks = sorted(
        (
            (tensor.name, begin, begin + tensor.nbytes)
            for tensor, begin in zip(header.tensors, header.begins, strict=True)
        ),
        key=lambda chunk: chunk[1],
    )
    return Extents(data_begin=header.data_begin, tensors=tuple(chunks))


NO_EXTENTS = Extents(data_begin=0, tensors=())


def ranks_of(entry: FileEntry) -> tuple[int, ...]:
    """The rank that wrote the file, as a tuple for `Damage`."""
    return () if entry.rank is None else (entry.rank,)


def damage_from_error(
    error: CorruptCheckpointError | FormatVersionError | StorageError,
    file: str,
    *,
    ranks: tuple[int, ...] = (),
    tensors: tuple[str, ...] = (),
) -> Damage:
    """The damage that an error while reading `file` stands for."""
    if isinstance(error, StorageMissingError):
        return Damage(file=file, what="missing", ranks=ranks, tensors=tensors)
    if isinstance(error, StorageError):
        return Damage(file=file, what=error.message, ranks=ranks, tensors=tensors, is_unreadable=True)
    return Damage(file=file, what=error.message, ranks=ranks, tensors=tensors)


def merge_ranges(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same bytes as fewest ranges, ascending."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def compare_header(
    header: ShardHeader, index: LayoutIndex, file: int, *, key: str, ranks: tuple[int, ...]
) -> list[Damage]:
    """Every tensor of one shard file that its header and the layout index describe differently."""
    in_index = _chunks_from_index(index, file)
    in_header = {
        tensor.name: _Place(begin, begin + tensor.nbytes, tensor.dtype, tuple(tensor.shape), tuple(tensor.offsets))
        for tensor, begin in zip(header.tensors, header.begins, strict=True)
    }
    damages = []
    for name in sorted({*in_index, *in_header}):
        ours, theirs = in_index.get(name), in_header.get(name)
        if ours != theirs:
            what = f"header and index disagree on {name}: {_difference(ours, theirs)}"
            damages.append(Damage(file=key, what=what, ranks=ranks, tensors=(name,)))
    return damages


@dataclass(frozen=True, slots=True)
class _Place:
    begin: int
    end: int
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]


def _difference(in_index: _Place | None, in_header: _Place | None) -> str:
    if in_index is None:
        return "only the header has it"
    if in_header is None:
        return "only the index has it"
    return f"index says {_describe(in_index)}, header says {_describe(in_header)}"


def _describe(place: _Place) -> str:
    return f"{place.dtype}{list(place.shape)} from {list(place.offsets)} at bytes {place.begin:,}-{place.end:,}"


def _chunks_from_index(index: LayoutIndex, file: int) -> Mapping[str, _Place]:
    places: dict[str, _Place] = {}
    for name, begin, end in index.chunks_in_file(file):
        meta = index.meta(name)
        for chunk in index.chunks(name):
            if chunk.file == file and chunk.begin == begin:
                places[name] = _Place(begin, end, meta.dtype, tuple(chunk.sizes), tuple(chunk.offsets))
    return places


def sorted_damages(damages: Iterable[Damage]) -> tuple[Damage, ...]:
    """Each damage once (two checks may trip over the same byte), by file and place."""
    return tuple(sorted(set(damages), key=lambda damage: (damage.file, damage.begin or 0, damage.what)))
