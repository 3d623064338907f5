"""The layout index: where every chunk of every tensor lies, in columns (FORMAT.md, section 7)."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from dckpt.errors import ConfigError, CorruptCheckpointError, FormatVersionError
from dckpt.format import index_checks
from dckpt.format.fields import Fields
from dckpt.format.grids import Grid, Levels, find_grid, parts_of
from dckpt.format.layout import FILE_BYTES_MAX, SHARD_SUFFIX, TENSORS_MAX, ensure_safe_path, is_tensor_name
from dckpt.format.layout_index import Chunk, Columns, LayoutIndex, Placed, TensorMeta
from dckpt.format.refusal import corrupt, shown
from dckpt.format.sealed_json import dump_json, load_json
from dckpt.format.shard_file import DIMENSIONS_MAX, DTYPES, HEADER_BYTES_MAX, LENGTH_BYTES

__all__ = ["Chunk", "Grid", "LayoutIndex", "TensorMeta", "build_index", "encode_index", "parse_index"]

INDEX_BYTES_MAX = 2**30
INDEX_HEADER_BYTES_MAX = 64 * 2**20
CHUNKS_MAX = 2**24
INDEX_FILES_MAX = 2**20
GRIDS_MAX = 2**20
CELLS_MAX = 2**24
LEVELS_MAX = 16

_MAGIC = b"\x89dckIDX\n"
_MAJOR, _MINOR = 1, 0
_HEAD = struct.Struct("<8sHHI")
_PLAIN = struct.Struct("<Q")
_TRAILER_BYTES = 8
# Bounds what a small hostile file can make a reader allocate; real indexes shrink to a tenth or a thirtieth.
_PLAIN_BYTES_FREE = 64 * 2**20
_PLAIN_RATIO_MAX = 128
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
    "grid": "i4",
    "data_begin": "u8",
    "grid_ndim": "u1",
    "grid_levels": "u1",
    "grid_parts": "i8",
    "cell_ends": "u8",
    "cells": "i4",
}
_PER_GRID = ("grid_ndim", "cell_ends")
_HEADER_KEYS = ("tensors", "chunks", "grids", "files", "dtypes", "columns")


def build_index(
    files: Sequence[str],
    tensors: Mapping[str, tuple[str, Sequence[int], Sequence[Chunk] | Grid]],
    *,
    data_begins: Sequence[int] | None = None,
) -> LayoutIndex:
    """The index of a plan; one whose chunks overlap or leave a gap is refused before anything is written.

    A tensor comes with its dtype, global shape, and its chunks or its `Grid`. `data_begins`: where the data of each file
    begins; needed with grids. Given, chunks that form a grid in the order of FORMAT.md, 5, are stored as one.
    """
    names = sorted(tensors, key=lambda name: name.encode("utf-8", "surrogatepass"))
    for name in names:
        dtype, shape, chunks = tensors[name]
        if dtype not in DTYPES or not is_tensor_name(name):
            raise ConfigError(
                f"Layout index: tensor {shown(name)}: cannot store this name with dtype {shown(dtype)}. Change them."
            )
        if len(shape) > DIMENSIONS_MAX or (
            not isinstance(chunks, Grid)
            and any(len(chunk.offsets) != len(shape) or len(chunk.sizes) != len(shape) for chunk in chunks)
        ):
            raise ConfigError(
                f"Layout index: tensor {name}: expected chunks of {len(shape)} dimensions as the tensor has, "
                f"and at most {DIMENSIONS_MAX}. Reshape it."
            )
    listed, gridded = _split(names, tensors, is_compacted=data_begins is not None)
    grids = list(dict.fromkeys(gridded.values()))
    grid_numbers = {grid: number for number, grid in enumerate(grids)}
    dtypes = tuple(sorted({tensors[name][0] for name in names}))
    numbers = {dtype: number for number, dtype in enumerate(dtypes)}
    rows = [listed.get(name, []) for name in names]
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
            "grid": _column((grid_numbers[gridded[name]] if name in gridded else -1 for name in names), "i4"),
            "data_begin": _column(data_begins or (), "u8"),
            "grid_ndim": _column((len(grid.levels) for grid in grids), "u1"),
            "grid_levels": _column((len(counts) for grid in grids for counts in grid.levels), "u1"),
            "grid_parts": _column((count for grid in grids for counts in grid.levels for count in counts), "i8"),
            "cell_ends": np.cumsum(_column((len(grid.files) for grid in grids), "u8"), dtype="u8"),
            "cells": _column(chain.from_iterable(grid.files for grid in grids), "i4"),
        }
        return _ensure_placed(_checked(tuple(files), dtypes, columns, key="layout index"), tensors)
    except CorruptCheckpointError as error:
        facts = error.fields()
        raise ConfigError(
            f"Layout of {facts['field']}: expected {facts['expected']}, found {facts['found']}. "
            "Every element of a tensor must be saved by exactly one rank."
        ) from error
    except OverflowError as error:
        raise ConfigError(f"Layout index: a number does not fit its column: {error}.") from error


def _split(
    names: Sequence[str],
    tensors: Mapping[str, tuple[str, Sequence[int], Sequence[Chunk] | Grid]],
    *,
    is_compacted: bool,
) -> tuple[dict[str, list[Chunk]], dict[str, Grid]]:
    """Which tensors are stored as listed chunks (sorted) and which as grids."""
    listed: dict[str, list[Chunk]] = {}
    gridded: dict[str, Grid] = {}
    for name in names:
        _, shape, given = tensors[name]
        if isinstance(given, Grid):
            gridded[name] = given
            continue
        chunks = sorted(given, key=lambda chunk: (chunk.offsets, chunk.sizes))
        levels = find_grid(shape, [(chunk.offsets, chunk.sizes) for chunk in chunks]) if is_compacted else None
        if levels is None:
            listed[name] = chunks
        else:
            gridded[name] = Grid(levels, tuple(chunk.file for chunk in chunks))
    return listed, gridded


def _ensure_placed(
    index: LayoutIndex, tensors: Mapping[str, tuple[str, Sequence[int], Sequence[Chunk] | Grid]]
) -> LayoutIndex:
    """Pair assertion: a chunk that became a cell of a grid lies where the order of its file's data says."""
    if len(index.columns["data_begin"]):
        for name, (_, _, given) in tensors.items():
            if not isinstance(given, Grid):
                expected = sorted(given, key=lambda chunk: (chunk.offsets, chunk.sizes))
                assert index.chunks(name) == expected, (name, index.chunks(name)[:3], expected[:3])
    return index


def _column(items: Iterable[int], kind: str) -> npt.NDArray[Any]:
    return np.fromiter(items, dtype=f"<{kind}")


def encode_index(index: LayoutIndex) -> bytes:
    """The content of an index file; equal indexes give equal bytes."""
    columns = index.columns
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
                "chunks": len(columns["file"]),
                "grids": len(columns["grid_ndim"]),
                "files": list(index.files),
                "dtypes": list(index.dtypes),
                "columns": table,
            }
        )
    pieces = [_HEAD.pack(_MAGIC, _MAJOR, _MINOR, room), header.ljust(room)]
    for name, kind in _COLUMN_TYPES.items():
        data = columns[name].astype(f"<{kind}", copy=False).tobytes()
        pieces.append(data.ljust(-(-len(data) // 8) * 8, b"\0"))
    plain = b"".join(pieces)
    if len(plain) > INDEX_BYTES_MAX or room > INDEX_HEADER_BYTES_MAX:
        raise ConfigError(
            f"Layout index: expected at most {INDEX_BYTES_MAX} bytes, found {len(plain)}. Use fewer, larger tensors."
        )
    return _packed(plain)


def _packed(plain: bytes) -> bytes:
    """The file with this content: what follows the head is compressed."""
    content = plain[_HEAD.size :]
    stream = zlib.compress(content, 6)
    if len(content) > _plain_limit(len(stream)):
        stream = zlib.compress(content, 0)
    body = plain[: _HEAD.size] + _PLAIN.pack(len(content)) + stream
    return body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))


def _plain_limit(stream_bytes: int) -> int:
    return min(INDEX_BYTES_MAX, _PLAIN_BYTES_FREE + _PLAIN_RATIO_MAX * stream_bytes)


def _unpacked(view: memoryview, key: str) -> memoryview:
    """Head and decompressed content, as if the file held them so."""
    (stated,) = _PLAIN.unpack_from(view, _HEAD.size)
    stream = view[_HEAD.size + _PLAIN.size : -_TRAILER_BYTES]
    limit = _plain_limit(len(stream))
    if stated > limit:
        raise corrupt(key, "content", f"at most {limit} bytes", str(stated))
    inflater = zlib.decompressobj()
    try:
        content = inflater.decompress(stream, stated + 1)
    except zlib.error as error:
        raise corrupt(key, "content", "a zlib stream", str(error)) from None
    if len(content) != stated or not inflater.eof or inflater.unused_data:
        raise corrupt(key, "content", f"{stated} bytes in one zlib stream", f"{len(content)} bytes, or more data")
    return memoryview(bytes(view[: _HEAD.size]) + content)


def parse_index(data: bytes | bytearray | memoryview, *, key: str) -> LayoutIndex:
    """The index in the file `key`, all of it checked."""
    view = memoryview(data).cast("B")
    _ensure_intact(view, key)
    _, major, minor, header_bytes = _HEAD.unpack_from(view)
    if major > _MAJOR:
        raise FormatVersionError(
            f"File {key}: expected version {_MAJOR} or older, found {major}.{minor}. Upgrade dckpt."
        )
    if major < 1:
        raise corrupt(key, "version", "1 or newer", str(major))
    view = _unpacked(view, key)
    end = _HEAD.size + header_bytes
    if end % 8 or end > len(view):
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
    num_grids = fields.integer("grids", 0, GRIDS_MAX)
    for name in ("name_ends", "dtype", "ndim", "chunk_ends", "grid", "file", "begin", "grid_ndim", "cell_ends"):
        wanted = num_chunks if name in ("file", "begin") else num_grids if name in _PER_GRID else num_tensors
        if len(columns[name]) != wanted:
            raise corrupt(key, f"column {name}", f"{wanted} items", str(len(columns[name])))
    return _checked(tuple(files), dtypes, columns, key=key)


def _ensure_intact(view: memoryview, key: str) -> None:
    size = len(view)
    if bytes(view[: len(_MAGIC)]) != _MAGIC:
        raise corrupt(key, "magic", shown(_MAGIC), shown(bytes(view[: len(_MAGIC)])))
    least = _HEAD.size + _PLAIN.size + _TRAILER_BYTES
    if not least <= size <= INDEX_BYTES_MAX:
        raise corrupt(key, "size", f"from {least} to {INDEX_BYTES_MAX}", f"{size} bytes")
    stated = int.from_bytes(view[-_TRAILER_BYTES:], "little")
    actual = xxhash.xxh3_64_intdigest(view[:-_TRAILER_BYTES])
    if stated != actual:
        raise corrupt(key, "trailing checksum", f"{stated:016x}", f"{actual:016x}")


def _read_columns(view: memoryview, fields: Fields, key: str, end: int, *, is_newer: bool) -> Columns:
    table = fields.items("columns", limit=256)
    columns: Columns = {}
    stop = len(view)
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
        _ensure_zeros(view[end:stop], key, "the end")
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
    grid_levels, cell_begins = _check_grids(columns, ndim, chunk_begins, len(files), key, refuse)
    _ensure_total(columns, ndim, item_bytes, key)
    placed = Placed(
        names=names,
        item_bytes=item_bytes,
        shape_begins=np.concatenate([[0], np.cumsum(ndim)]).astype(np.int64),
        chunk_begins=chunk_begins,
        box_begins=box_begins,
        owner=owner,
        nbytes=chunk_bytes,
        grid_levels=grid_levels,
        cell_begins=cell_begins,
    )
    return LayoutIndex(files, dtypes, columns, placed, key=key)


def _check_grids(
    columns: Columns,
    ndim: index_checks.Ints,
    chunk_begins: index_checks.Ints,
    num_files: int,
    key: str,
    refuse: index_checks.Refuse,
) -> tuple[tuple[tuple[Levels, ...], ...], index_checks.Ints]:
    """The levels of each grid and where its cells begin, once they are sound."""
    cells = columns["cells"]
    if len(cells) > CELLS_MAX:
        raise corrupt(key, "column cells", f"at most {CELLS_MAX} items", str(len(cells)))
    cell_begins = _begins(columns["cell_ends"], len(cells), key, "cell_ends")
    grid_levels = _read_levels(columns, key)
    counts = [math.prod(parts_of(levels)) for levels in grid_levels]
    if counts != np.diff(cell_begins).tolist():
        raise corrupt(key, "column cell_ends", "as many cells as the parts of each grid give", "others")
    grid_ndim = columns["grid_ndim"].astype(np.int64)
    if (cells < 0).any() or (cells >= num_files).any():
        raise corrupt(key, "column cells", f"files below {num_files}", "others")
    owner = np.repeat(np.arange(len(grid_ndim)), np.diff(cell_begins))
    order = np.lexsort((cells, owner))
    if ((cells[order][1:] == cells[order][:-1]) & (owner[order][1:] == owner[order][:-1])).any():
        raise corrupt(key, "column cells", "each file at most once in a grid", "one twice")
    numbers = columns["grid"].astype(np.int64)
    place = index_checks.first((numbers < -1) | (numbers >= len(grid_ndim)))
    if place is not None:
        raise refuse(place, f"a grid below {len(grid_ndim)}", str(int(numbers[place])))
    used = np.flatnonzero(numbers >= 0)
    place = index_checks.first(grid_ndim[numbers[used]] > ndim[used])
    if place is not None:
        raise refuse(int(used[place]), "a grid of at most its own dimensions", "one of more")
    place = index_checks.first(np.diff(chunk_begins)[used] > 0)
    if place is not None:
        raise refuse(int(used[place]), "a grid or listed chunks", "both")
    begins = columns["data_begin"]
    if len(begins) not in (0, num_files) or (len(used) and not len(begins)):
        raise corrupt(key, "column data_begin", f"{num_files} items", str(len(begins)))
    if (begins > HEADER_BYTES_MAX + LENGTH_BYTES).any():
        raise corrupt(key, "column data_begin", f"at most {HEADER_BYTES_MAX + LENGTH_BYTES}", "a larger one")
    return grid_levels, cell_begins


def _read_levels(columns: Columns, key: str) -> tuple[tuple[Levels, ...], ...]:
    ndim, depth, parts = columns["grid_ndim"], columns["grid_levels"], columns["grid_parts"]
    if (ndim > DIMENSIONS_MAX).any() or int(ndim.astype(np.int64).sum()) != len(depth):
        raise corrupt(key, "column grid_ndim", f"{len(depth)} dimensions, at most {DIMENSIONS_MAX} each", "others")
    if (depth > LEVELS_MAX).any() or int(depth.astype(np.int64).sum()) != len(parts):
        raise corrupt(key, "column grid_levels", f"{len(parts)} levels, at most {LEVELS_MAX} a dimension", "others")
    if (parts < 2).any() or (parts > CELLS_MAX).any():
        raise corrupt(key, "column grid_parts", f"numbers from 2 to {CELLS_MAX}", "others")
    counts, depths = iter(parts.tolist()), iter(depth.tolist())
    return tuple(
        tuple(tuple(next(counts) for _ in range(next(depths))) for _ in range(dimensions))
        for dimensions in ndim.tolist()
    )


def _ensure_total(columns: Columns, ndim: index_checks.Ints, item_bytes: index_checks.Ints, key: str) -> None:
    """All tensors together have less than 2^62 bytes: then no sum over a file overflows."""
    total = float((index_checks.volumes(columns["shape"], ndim) * item_bytes).sum())
    if total >= float(index_checks.TENSOR_BYTES_LIMIT):
        raise corrupt(key, "column shape", "less than 2^62 bytes in all tensors together", f"{total:.3g}")


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
    # The cells of a grid cover their tensor by construction.
    is_listed = columns["grid"] < 0
    index_checks.ensure_complete(owner, chunk_volumes, np.where(is_listed, tensor_volumes, 0), refuse)
    return chunk_bytes
