"""The layout index: where every chunk of every tensor lies, in columns (FORMAT.md, section 7)."""

from __future__ import annotations

import math
import struct
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

from dckpt.errors import ConfigError, CorruptCheckpointError, FormatVersionError
from dckpt.format import index_checks
from dckpt.format.fields import Fields
from dckpt.format.layout import FILE_BYTES_MAX, SHARD_SUFFIX, ensure_safe_path, is_tensor_name
from dckpt.format.refusal import corrupt, shown
from dckpt.format.sealed_json import dump_json, load_json
from dckpt.format.shard_file import DIMENSIONS_MAX, DTYPES

INDEX_BYTES_MAX = 2**30
INDEX_HEADER_BYTES_MAX = 64 * 2**20
TENSORS_MAX = 2**22
CHUNKS_MAX = 2**24
INDEX_FILES_MAX = 2**20

_MAGIC = b"\x89dckIDX\n"
_MAJOR, _MINOR = 1, 0
_HEAD = struct.Struct("<8sHHI")
_TRAILER_BYTES = 8
_COLUMN_TYPES = {
    "names": "u1",
    "name_ends": "u8",
    "dtype": "u1",
    "ndim": "u1",
    "shape": "i8",
    "chunk_ends": "u8",
    "file": "i4",
    "begin": "u8",
    "offsets": "i8",
    "sizes": "i8",
}
_HEADER_KEYS = ("tensors", "chunks", "files", "dtypes", "columns")

Columns: TypeAlias = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """A tensor as a whole."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype]

    def chunk_nbytes(self, chunk: Chunk) -> int:
        """Bytes of one of its chunks."""
        return math.prod(chunk.sizes) * DTYPES[self.dtype]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor and where it lies: `file` is a number in the index's `files`, -1 for an empty box."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: int
    begin: int


class LayoutIndex:
    """Where every chunk of every tensor lies. Made by `build_index` and `parse_index`, which have checked it.

    It holds columns; records are made for what is asked.
    """

    __slots__ = ("_columns", "_dtypes", "_file_order", "_names", "_placed", "files")

    def __init__(self, files: tuple[str, ...], dtypes: tuple[str, ...], columns: Columns, placed: _Placed) -> None:
        self.files = files
        """Shard files, relative to the attempt directory."""
        self._dtypes = dtypes
        self._columns = columns
        self._placed = placed
        self._names = placed.names
        self._file_order: npt.NDArray[np.intp] | None = None

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._find(name) is not None

    def __eq__(self, other: object) -> bool:
        return encode_index(self) == encode_index(other) if isinstance(other, LayoutIndex) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    @property
    def num_chunks(self) -> int:
        """Chunks of all tensors, the empty ones included."""
        return len(self._columns["file"])

    def names(self) -> tuple[str, ...]:
        """All tensor names, ascending."""
        return self._names

    def _find(self, name: str) -> int | None:
        place = bisect_left(self._names, name)
        return place if place < len(self._names) and self._names[place] == name else None

    def _row(self, name: str) -> int:
        row = self._find(name)
        if row is None:
            raise KeyError(name)
        return row

    def meta(self, name: str) -> TensorMeta:
        """dtype and global shape of a tensor; KeyError if there is none of this name."""
        row = self._row(name)
        begin, end = self._placed.shape_begins[row : row + 2].tolist()
        shape = tuple(self._columns["shape"][begin:end].tolist())
        return TensorMeta(name=name, dtype=self._dtypes[self._columns["dtype"][row]], shape=shape)

    def chunks(self, name: str) -> list[Chunk]:
        """The chunks of a tensor, ascending by offsets; KeyError if there is none of this name."""
        row = self._row(name)
        begin, end = self._placed.chunk_begins[row : row + 2].tolist()
        dimensions = int(self._columns["ndim"][row])
        first = int(self._placed.box_begins[begin]) if begin < end else 0
        places = slice(first, first + (end - begin) * dimensions)
        offsets = self._columns["offsets"][places].reshape(end - begin, dimensions).tolist()
        sizes = self._columns["sizes"][places].reshape(end - begin, dimensions).tolist()
        files = self._columns["file"][begin:end].tolist()
        begins = self._columns["begin"][begin:end].tolist()
        return [
            Chunk(offsets=tuple(offset), sizes=tuple(size), file=file, begin=place)
            for offset, size, file, place in zip(offsets, sizes, files, begins, strict=True)
        ]

    def chunks_overlapping(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> list[Chunk]:
        """Those of `chunks(name)` that share an element with the box at `offsets` of shape `sizes`."""
        return [
            chunk
            for chunk in self.chunks(name)
            if all(
                max(a, b) < min(a + s, b + t)
                for a, s, b, t in zip(offsets, sizes, chunk.offsets, chunk.sizes, strict=True)
            )
        ]

    def chunks_in_file(self, file: int) -> list[tuple[str, int, int]]:
        """(tensor name, begin, end) of the chunks in one file, ascending; to name damaged tensors."""
        if self._file_order is None:
            self._file_order = np.lexsort((self._columns["begin"], self._columns["file"]))
        order = self._file_order
        numbers = self._columns["file"][order]
        rows = order[np.searchsorted(numbers, file, "left") : np.searchsorted(numbers, file, "right")]
        begins = self._columns["begin"][rows].astype(np.int64)
        ends = begins + self._placed.nbytes[rows]
        owners = self._placed.owner[rows].tolist()
        return [
            (self._names[owner], begin, end)
            for owner, begin, end in zip(owners, begins.tolist(), ends.tolist(), strict=True)
        ]

    def file_extents(self) -> list[int]:
        """For each file, where its last chunk ends: the size it must have (0: no chunk in it)."""
        ends = np.zeros(len(self.files), dtype=np.int64)
        rows = np.flatnonzero(self._columns["file"] >= 0)
        stops = self._columns["begin"][rows].astype(np.int64) + self._placed.nbytes[rows]
        np.maximum.at(ends, self._columns["file"][rows], stops)
        return [int(end) for end in ends]


@dataclass(frozen=True, slots=True, eq=False)
class _Placed:
    """Derived from the columns once: names as strings, where the rows of each tensor and chunk begin."""

    names: tuple[str, ...]
    shape_begins: index_checks.Ints
    chunk_begins: index_checks.Ints
    box_begins: index_checks.Ints
    owner: index_checks.Ints
    nbytes: index_checks.Ints


def build_index(files: Sequence[str], tensors: Mapping[str, tuple[str, Sequence[int], Sequence[Chunk]]]) -> LayoutIndex:
    """The index of a plan; one whose chunks overlap or leave a gap is refused before anything is written."""
    names = sorted(tensors, key=lambda name: name.encode("utf-8", "surrogatepass"))
    for name in names:
        dtype, shape, chunks = tensors[name]
        if dtype not in DTYPES or not is_tensor_name(name):
            raise ConfigError(
                f"Layout index: tensor {shown(name)}: cannot store this name with dtype {shown(dtype)}. Change them."
            )
        if len(shape) > DIMENSIONS_MAX or any(
            len(chunk.offsets) != len(shape) or len(chunk.sizes) != len(shape) for chunk in chunks
        ):
            raise ConfigError(
                f"Layout index: tensor {name}: expected chunks of {len(shape)} dimensions as the tensor has, "
                f"and at most {DIMENSIONS_MAX}. Reshape it."
            )
    dtypes = tuple(sorted({tensors[name][0] for name in names}))
    numbers = {dtype: number for number, dtype in enumerate(dtypes)}
    rows = [sorted(tensors[name][2], key=lambda chunk: (chunk.offsets, chunk.sizes)) for name in names]
    flat = list(chain.from_iterable(rows))
    blobs = [name.encode() for name in names]
    shapes = [tensors[name][1] for name in names]
    try:
        columns: Columns = {
            "names": np.frombuffer(b"".join(blobs), dtype="u1"),
            "name_ends": np.cumsum(_column((len(blob) for blob in blobs), "u8"), dtype="u8"),
            "dtype": _column((numbers[tensors[name][0]] for name in names), "u1"),
            "ndim": _column((len(shape) for shape in shapes), "u1"),
            "shape": _column(chain.from_iterable(shapes), "i8"),
            "chunk_ends": np.cumsum(_column((len(chunks) for chunks in rows), "u8"), dtype="u8"),
            "file": _column((chunk.file for chunk in flat), "i4"),
            "begin": _column((chunk.begin for chunk in flat), "u8"),
            "offsets": _column(chain.from_iterable(chunk.offsets for chunk in flat), "i8"),
            "sizes": _column(chain.from_iterable(chunk.sizes for chunk in flat), "i8"),
        }
        return _checked(tuple(files), dtypes, columns, key="layout index")
    except CorruptCheckpointError as error:
        facts = error.fields()
        raise ConfigError(
            f"Layout of {facts['field']}: expected {facts['expected']}, found {facts['found']}. "
            "Every element of a tensor must be saved by exactly one rank."
        ) from error
    except OverflowError as error:
        raise ConfigError(f"Layout index: a number does not fit its column: {error}.") from error


def _column(items: Iterable[int], kind: str) -> npt.NDArray[Any]:
    return np.fromiter(items, dtype=f"<{kind}")


def encode_index(index: LayoutIndex) -> bytes:
    """The content of an index file; equal indexes give equal bytes."""
    columns = index._columns
    # The header states where the columns begin, and its own length moves them: at most a few rounds until it fits.
    header, room = b"", 0
    while not header or len(header) > room:
        room = -(-len(header) // 8) * 8
        table, end = [], _HEAD.size + room
        for name, kind in _COLUMN_TYPES.items():
            begin = -(-end // 8) * 8
            table.append([name, kind, begin, len(columns[name])])
            end = begin + columns[name].nbytes
        header = dump_json(
            {
                "tensors": len(index),
                "chunks": index.num_chunks,
                "files": list(index.files),
                "dtypes": list(index._dtypes),
                "columns": table,
            }
        )
    pieces = [_HEAD.pack(_MAGIC, _MAJOR, _MINOR, room), header.ljust(room)]
    for name, kind in _COLUMN_TYPES.items():
        data = columns[name].astype(f"<{kind}", copy=False).tobytes()
        pieces.append(data.ljust(-(-len(data) // 8) * 8, b"\0"))
    body = b"".join(pieces)
    if len(body) + _TRAILER_BYTES > INDEX_BYTES_MAX or room > INDEX_HEADER_BYTES_MAX:
        raise ConfigError(
            f"Layout index: expected at most {INDEX_BYTES_MAX} bytes, found {len(body)}. Use fewer, larger tensors."
        )
    return body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))


def parse_index(data: bytes | bytearray | memoryview, *, key: str) -> LayoutIndex:
    """The index in the file `key`, all of it checked; the result may refer to `data`, which must not change."""
    view = memoryview(data).cast("B")
    _ensure_intact(view, key)
    _, major, minor, header_bytes = _HEAD.unpack_from(view)
    if major > _MAJOR:
        raise FormatVersionError(
            f"File {key}: expected version {_MAJOR} or older, found {major}.{minor}. Upgrade dckpt."
        )
    if major < 1:
        raise corrupt(key, "version", "1 or newer", str(major))
    end = _HEAD.size + header_bytes
    if end % 8 or end > len(view) - _TRAILER_BYTES:
        raise corrupt(key, "header length", f"a multiple of 8 inside the {len(view)} bytes", str(header_bytes))
    header = load_json(view[_HEAD.size : end], key=key, limit=INDEX_HEADER_BYTES_MAX)
    fields = Fields(header, key=key, path="header")
    is_newer = minor > _MINOR
    fields.ensure_known(_HEADER_KEYS, is_newer=is_newer)
    files = fields.items("files", limit=INDEX_FILES_MAX)
    dtypes = fields.names("dtypes", limit=len(DTYPES))
    if not all(dtype in DTYPES for dtype in dtypes):
        raise fields.refuse("dtypes", "known dtypes", shown(str(dtypes)))
    columns = _read_columns(view, fields, key, end, is_newer=is_newer)
    num_tensors = fields.integer("tensors", 0, TENSORS_MAX)
    num_chunks = fields.integer("chunks", 0, CHUNKS_MAX)
    for name in ("name_ends", "dtype", "ndim", "chunk_ends", "file", "begin"):
        wanted = num_chunks if name in ("file", "begin") else num_tensors
        if len(columns[name]) != wanted:
            raise corrupt(key, f"column {name}", f"{wanted} items", str(len(columns[name])))
    return _checked(tuple(files), dtypes, columns, key=key)


def _ensure_intact(view: memoryview, key: str) -> None:
    size = len(view)
    if bytes(view[: len(_MAGIC)]) != _MAGIC:
        raise corrupt(key, "magic", shown(_MAGIC), shown(bytes(view[: len(_MAGIC)])))
    if not _HEAD.size + _TRAILER_BYTES <= size <= INDEX_BYTES_MAX or size % 8:
        raise corrupt(key, "size", f"a multiple of 8, at most {INDEX_BYTES_MAX}", f"{size} bytes")
    stated = int.from_bytes(view[-_TRAILER_BYTES:], "little")
    actual = xxhash.xxh3_64_intdigest(view[:-_TRAILER_BYTES])
    if stated != actual:
        raise corrupt(key, "trailing checksum", f"{stated:016x}", f"{actual:016x}")


def _read_columns(view: memoryview, fields: Fields, key: str, end: int, *, is_newer: bool) -> Columns:
    table = fields.items("columns", limit=256)
    columns: Columns = {}
    stop = len(view) - _TRAILER_BYTES
    for place, (name, kind) in enumerate(_COLUMN_TYPES.items()):
        row: Any = table[place] if place < len(table) else None
        begin = -(-end // 8) * 8
        is_row = isinstance(row, list) and len(row) == 4 and row[:3] == [name, kind, begin]
        if not is_row or type(row[2]) is not int or type(row[3]) is not int or row[3] < 0:
            expected = f"[{name}, {kind}, {begin}, count]"
            raise fields.refuse(f"columns[{place}]", expected, shown(str(row)[:200]))
        _ensure_zeros(view[end:begin], key, name)
        end = begin + row[3] * int(kind[1:])
        if end > stop:
            raise fields.refuse(f"columns[{place}]", f"an end at most at {stop}", str(end))
        columns[name] = np.frombuffer(view[begin:end], dtype=f"<{kind}")
    if not is_newer:
        if len(table) != len(_COLUMN_TYPES) or -(-end // 8) * 8 != stop:
            raise corrupt(key, "columns", f"the last one to end at {stop}", str(end))
        _ensure_zeros(view[end:stop], key, "trailer")
    return columns


def _ensure_zeros(padding: memoryview, key: str, name: str) -> None:
    if any(padding):
        raise corrupt(key, f"bytes before {name}", "zeros", "others")


def _ensure_files(files: tuple[Any, ...], key: str) -> None:
    for place, file in enumerate(files):
        field = f"files[{place}]"
        if not isinstance(file, str) or not file.endswith(SHARD_SUFFIX):
            raise corrupt(key, field, f"a name that ends in {SHARD_SUFFIX}", shown(file))
        ensure_safe_path(file, key=key, field=field)
    if len(set(files)) != len(files):
        raise corrupt(key, "files", "each file once", "a repeated one")


def _begins(ends: npt.NDArray[Any], total: int, key: str, column: str) -> index_checks.Ints:
    """`ends` as int64 with a leading 0, once it is known to ascend to `total`."""
    last = int(ends[-1]) if len(ends) else 0
    # In unsigned numbers: a hostile 2^63 must not turn negative before it was looked at.
    if last != total or (ends[1:] < ends[:-1]).any():
        raise corrupt(key, f"column {column}", f"numbers that ascend to {total}", f"others, the last {last}")
    found = np.zeros(len(ends) + 1, dtype=np.int64)
    found[1:] = ends
    return found


def _read_names(columns: Columns, key: str) -> tuple[str, ...]:
    blob = columns["names"].tobytes()
    begins = _begins(columns["name_ends"], len(blob), key, "name_ends").tolist()
    try:
        names = tuple(blob[begin:end].decode() for begin, end in pairwise(begins))
    except UnicodeDecodeError as error:
        raise corrupt(key, "column names", "UTF-8", error.reason) from None
    for name in names:
        if not is_tensor_name(name):
            raise corrupt(key, "column names", "1 to 4096 bytes without control characters", shown(name))
    for before, after in pairwise(names):
        if before >= after:
            raise corrupt(key, "column names", f"a name after {shown(before)}", shown(after))
    return names


def _checked(files: tuple[str, ...], dtypes: tuple[str, ...], columns: Columns, *, key: str) -> LayoutIndex:
    """The index over these columns, after every check of FORMAT.md, section 7."""
    _ensure_files(files, key)
    names = _read_names(columns, key)
    num_chunks = len(columns["file"])
    chunk_begins = _begins(columns["chunk_ends"], num_chunks, key, "chunk_ends")
    ndim = columns["ndim"].astype(np.int64)
    if (ndim > DIMENSIONS_MAX).any() or int(ndim.sum()) != len(columns["shape"]):
        raise corrupt(
            key, "column ndim", f"{len(columns['shape'])} dimensions, at most {DIMENSIONS_MAX} each", "others"
        )
    if (columns["dtype"] >= len(dtypes)).any():
        raise corrupt(key, "column dtype", f"numbers below {len(dtypes)}", str(int(columns["dtype"].max())))
    owner = np.repeat(np.arange(len(names)), np.diff(chunk_begins))
    box_begins = np.zeros(num_chunks + 1, dtype=np.int64)
    np.cumsum(ndim[owner], out=box_begins[1:])
    for name in ("offsets", "sizes"):
        if len(columns[name]) != box_begins[-1]:
            raise corrupt(key, f"column {name}", f"{box_begins[-1]} items", str(len(columns[name])))

    def refuse(tensor: int, expected: str, found: str) -> CorruptCheckpointError:
        return corrupt(key, names[tensor], expected, found)

    item_bytes = np.array([DTYPES[dtype] for dtype in dtypes], dtype=np.int64)[columns["dtype"]]
    chunk_bytes = _check_boxes(columns, ndim, owner, item_bytes, len(files), refuse)
    placed = _Placed(
        names=names,
        shape_begins=np.concatenate([[0], np.cumsum(ndim)]).astype(np.int64),
        chunk_begins=chunk_begins,
        box_begins=box_begins,
        owner=owner,
        nbytes=chunk_bytes,
    )
    return LayoutIndex(files, dtypes, columns, placed)


def _check_boxes(
    columns: Columns,
    ndim: index_checks.Ints,
    owner: index_checks.Ints,
    item_bytes: index_checks.Ints,
    num_files: int,
    refuse: index_checks.Refuse,
) -> index_checks.Ints:
    """The bytes of each chunk, once boxes, files and byte ranges are sound."""
    shapes, offsets, sizes = columns["shape"], columns["offsets"], columns["sizes"]
    index_checks.ensure_shapes(shapes, ndim, item_bytes, refuse)
    tensor_volumes = index_checks.exact_volumes(shapes, ndim)
    index_checks.ensure_boxes_inside(owner, ndim, shapes, offsets, sizes, refuse)
    chunk_volumes = index_checks.exact_volumes(sizes, ndim[owner])
    chunk_bytes: index_checks.Ints = chunk_volumes * item_bytes[owner]
    file, begin = columns["file"], columns["begin"]
    is_empty = chunk_volumes == 0
    is_misplaced = np.where(is_empty, (file != -1) | (begin != 0), (file < 0) | (file >= num_files))
    place = index_checks.first(is_misplaced | (begin >= FILE_BYTES_MAX))
    if place is not None:
        expected = "file -1 and begin 0" if is_empty[place] else f"a file below {num_files}"
        raise refuse(int(owner[place]), expected, f"file {int(file[place])} and begin {int(begin[place])}")
    full = np.flatnonzero(~is_empty)
    begins = begin[full].astype(np.int64)
    index_checks.ensure_extents_disjoint(owner[full], file[full], begins, chunk_bytes[full], refuse)
    if len(full) == len(file):
        index_checks.ensure_boxes_disjoint(owner, ndim, offsets, sizes, refuse)
    else:
        keep = np.repeat(~is_empty, ndim[owner])
        index_checks.ensure_boxes_disjoint(owner[full], ndim, offsets[keep], sizes[keep], refuse)
    index_checks.ensure_complete(owner, chunk_volumes, tensor_volumes, refuse)
    return chunk_bytes
