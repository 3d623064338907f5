"""Shard files: plain safetensors, planned before a byte is written, parsed as hostile (FORMAT.md, 5)."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

from dckpt.errors import ConfigError
from dckpt.format.fields import Fields
from dckpt.format.fingerprint import box_runs
from dckpt.format.fingerprint_table import ChunkTable
from dckpt.format.layout import FILE_BYTES_MAX, is_tensor_name, shard_file_name
from dckpt.format.refusal import corrupt, shown
from dckpt.format.sealed_json import dump_json, load_json

DTYPES: dict[str, int] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2": 1,
    "F8_E5M2FNUZ": 1,
    "F8_E8M0": 1,
    "C64": 8,
}
"""safetensors' name of each dtype that can be stored, and its item size in bytes."""

HEADER_BYTES_MAX = 100_000_000
HEADER_ALIGNMENT = 4096
DIMENSIONS_MAX = 64
LENGTH_BYTES = 8
SHARDING_INFO = "DCP_SHARDING_INFO"

# The layers of a model are cut alike.
_known_runs = lru_cache(maxsize=16_384)(box_runs)


@dataclass(frozen=True, slots=True)
class ShardTensor:
    """One chunk in a shard file: its tensor's name, its own (local) shape, its offsets in the global one.

    global_shape: the tensor's, if whoever made this knows it; a header does not say. A file of which it is known has
    fingerprints in its sums.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    global_shape: tuple[int, ...] | None = field(default=None, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * DTYPES[self.dtype]


# Without slots: the table of chunks is made once per plan, which lasts from save to save, and kept in the instance's dict.
@dataclass(frozen=True)
class ShardFilePlan:
    """One shard file to be written: `header` goes to offset 0, the data of `tensors[i]` to `begins[i]`."""

    file: str
    header: bytes
    tensors: tuple[ShardTensor, ...]
    begins: tuple[int, ...]
    size: int
    is_separate: bool = False
    """Its tensors are not expected to change: a later save may reuse the whole file."""

    @cached_property
    def chunk_table(self) -> ChunkTable | None:
        """Folds fingerprints of the file's bytes; None if it is not known where every chunk lies in its tensor."""
        runs = []
        for tensor in self.tensors:
            if tensor.global_shape is None:
                return None
            runs.append(_known_runs(tensor.global_shape, tensor.offsets, tensor.shape, DTYPES[tensor.dtype]))
        return ChunkTable(self.begins, [tensor.nbytes for tensor in self.tensors], runs)


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """What the header of a shard file says; tensors in the order of their data, `begins` absolute."""

    data_begin: int
    tensors: tuple[ShardTensor, ...]
    begins: tuple[int, ...]
    metadata: dict[str, str]


def plan_shard_file(file: str, tensors: Sequence[ShardTensor]) -> ShardFilePlan:
    """Header and data offsets of a shard file; the order in which the tensors come does not matter."""
    ordered = sorted(tensors, key=lambda tensor: (-DTYPES.get(tensor.dtype, 0), tensor.name))
    for tensor in ordered:
        _ensure_storable(file, tensor)
    names: set[str] = set()
    for tensor in ordered:
        if tensor.name in names:
            raise ConfigError(f"Shard file {file}: tensor {tensor.name} twice. Use one file for each of its chunks.")
        names.add(tensor.name)
    relative = [0]
    for tensor in ordered:
        relative.append(relative[-1] + tensor.nbytes)
    metadata = {"format": "pt", "DCP_VERSION": "1.0", "dckpt": "1"}
    if any(any(tensor.offsets) for tensor in ordered):
        # Readers take offsets of 0 where it is missing; for thousands of small tensors it would be a tenth of the file.
        sharding_info = {tensor.name: {"saved_offsets": list(tensor.offsets)} for tensor in ordered}
        metadata[SHARDING_INFO] = dump_json(sharding_info).decode()
    entries: dict[str, Any] = {"__metadata__": metadata}
    for tensor, begin, end in zip(ordered, relative[:-1], relative[1:], strict=True):
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    header = _frame(file, dump_json(entries))
    size = len(header) + relative[-1]
    if size > FILE_BYTES_MAX:
        raise ConfigError(f"Shard file {file}: expected at most {FILE_BYTES_MAX} bytes, found {size}. Use more ranks.")
    begins = tuple(len(header) + begin for begin in relative[:-1])
    return ShardFilePlan(file=file, header=header, tensors=tuple(ordered), begins=begins, size=size)


def _frame(file: str, text: bytes) -> bytes:
    padded = -(-(LENGTH_BYTES + len(text)) // HEADER_ALIGNMENT) * HEADER_ALIGNMENT - LENGTH_BYTES
    if padded > HEADER_BYTES_MAX:
        raise ConfigError(
            f"Shard file {file}: expected a header of at most {HEADER_BYTES_MAX} bytes, found {padded}. "
            "Spread the tensors over more files."
        )
    return padded.to_bytes(LENGTH_BYTES, "little") + text.ljust(padded)


def _ensure_storable(file: str, tensor: ShardTensor) -> None:
    if not is_tensor_name(tensor.name):
        raise ConfigError(
            f"Shard file {file}: tensor name {shown(tensor.name)}: expected 1 to 4096 bytes without control "
            "characters, and not __metadata__. Rename it."
        )
    if tensor.dtype not in DTYPES:
        raise ConfigError(
            f"Shard file {file}: tensor {tensor.name}: expected a dtype of {', '.join(DTYPES)}, "
            f"found {shown(tensor.dtype)}. Store a view of it in one of them."
        )
    if len(tensor.shape) > DIMENSIONS_MAX or len(tensor.offsets) != len(tensor.shape):
        raise ConfigError(
            f"Shard file {file}: tensor {tensor.name}: expected as many offsets as dimensions, "
            f"at most {DIMENSIONS_MAX}, found shape {shown(tensor.shape)} and offsets {shown(tensor.offsets)}. "
            "Reshape it."
        )
    if min(tensor.shape, default=1) < 1 or min(tensor.offsets, default=0) < 0:
        raise ConfigError(
            f"Shard file {file}: tensor {tensor.name}: expected at least one element and offsets from 0, "
            f"found shape {tensor.shape} and offsets {tensor.offsets}. "
            "Empty chunks are recorded in the index only."
        )


def plan_shard_files(
    rank: int, tensors: Sequence[ShardTensor], *, separate: Collection[str] = ()
) -> list[ShardFilePlan]:
    """The shard files of one rank: each holds at most one chunk of a tensor.

    Names in `separate` (tensors that did not change) go to files of their own after the others, so that a
    later save can reuse those files whole.
    """
    groups: dict[tuple[bool, int], list[ShardTensor]] = {}
    num_seen: dict[str, int] = {}
    for tensor in tensors:
        occurrence = num_seen.get(tensor.name, 0)
        num_seen[tensor.name] = occurrence + 1
        groups.setdefault((tensor.name in separate, occurrence), []).append(tensor)
    return [
        replace(plan_shard_file(shard_file_name(rank, part), groups[group]), is_separate=group[0])
        for part, group in enumerate(sorted(groups))
    ]


def header_bytes_needed(first8: bytes, *, file_bytes: int, key: str) -> int:
    """How many bytes from the file's beginning `parse_shard_header` needs, by the first 8 of them."""
    if len(first8) < LENGTH_BYTES or file_bytes < LENGTH_BYTES:
        raise corrupt(key, "header length", "8 bytes", f"{min(len(first8), file_bytes)} bytes")
    length = int.from_bytes(first8[:LENGTH_BYTES], "little")
    if length > min(HEADER_BYTES_MAX, file_bytes - LENGTH_BYTES):
        limit = min(HEADER_BYTES_MAX, file_bytes - LENGTH_BYTES)
        raise corrupt(key, "header length", f"at most {limit} in a file of {file_bytes} bytes", str(length))
    return LENGTH_BYTES + length


def parse_shard_header(prefix: bytes, *, file_bytes: int, key: str) -> ShardHeader:
    """The header of a shard file of `file_bytes` bytes; gaps, overlaps and wrong ranges are refused."""
    data_begin = header_bytes_needed(prefix[:LENGTH_BYTES], file_bytes=file_bytes, key=key)
    if len(prefix) < data_begin:
        raise corrupt(key, "header", f"{data_begin} bytes", f"{len(prefix)} bytes")
    text = memoryview(prefix)[LENGTH_BYTES:data_begin]
    if bytes(text[:1]) != b"{":
        raise corrupt(key, "header", "an object that begins with '{'", shown(bytes(text[:1])))
    found = Fields(load_json(text, key=key, limit=HEADER_BYTES_MAX), key=key, path="header")
    names = [name for name in found.names_of_fields() if name != "__metadata__"]
    metadata = found.texts("__metadata__") if "__metadata__" in found else {}
    offsets = _parse_sharding_info(metadata, names, key)
    rows = sorted(_parse_entry(found, name, offsets, key) for name in names)
    end = 0
    for begin, next_end, name, _ in rows:
        if begin != end:
            raise corrupt(key, f"header.{name}", f"data to begin at {end}, without gap or overlap", str(begin))
        end = next_end
    if data_begin + end != file_bytes:
        raise corrupt(key, "size", f"{data_begin + end} bytes, as the header says", f"{file_bytes} bytes")
    return ShardHeader(
        data_begin=data_begin,
        tensors=tuple(row[3] for row in rows),
        begins=tuple(data_begin + row[0] for row in rows),
        metadata=metadata,
    )


def _parse_sharding_info(metadata: dict[str, str], names: list[str], key: str) -> dict[str, tuple[int, ...]] | None:
    if SHARDING_INFO not in metadata:
        return None
    path = f"header.__metadata__.{SHARDING_INFO}"
    # The limit is that of the header, in which this text lies.
    text = metadata[SHARDING_INFO].encode("utf-8")
    info = Fields(load_json(text, key=f"{key} ({SHARDING_INFO})", limit=HEADER_BYTES_MAX), key=key, path=path)
    if set(info.names_of_fields()) != set(names):
        raise corrupt(key, path, "exactly the tensors of the file", "other names")
    return {
        name: _integers(Fields(info.value(name), key=key, path=f"{path}.{name}"), "saved_offsets") for name in names
    }


def _integers(fields: Fields, name: str) -> tuple[int, ...]:
    found = fields.items(name, limit=DIMENSIONS_MAX)
    for item in found:
        if type(item) is not int or not 0 <= item <= FILE_BYTES_MAX:
            raise fields.refuse(name, f"integers from 0 to {FILE_BYTES_MAX}", shown(item))
    return tuple(found)


def _parse_entry(
    header: Fields, name: str, offsets: dict[str, tuple[int, ...]] | None, key: str
) -> tuple[int, int, str, ShardTensor]:
    if not is_tensor_name(name):
        raise corrupt(key, "header", "a tensor name", shown(name))
    fields = Fields(header.value(name), key=key, path=f"header.{name}")
    fields.ensure_known(("dtype", "shape", "data_offsets"), is_newer=False)
    dtype = fields.choice("dtype", DTYPES)
    shape = _integers(fields, "shape")
    tensor = ShardTensor(
        name=name, dtype=dtype, shape=shape, offsets=(0,) * len(shape) if offsets is None else offsets[name]
    )
    if len(tensor.offsets) != len(shape):
        raise fields.refuse("shape", f"{len(tensor.offsets)} dimensions, as many as offsets", str(len(shape)))
    extent = _integers(fields, "data_offsets")
    if len(extent) != 2 or extent[1] - extent[0] != tensor.nbytes:
        raise fields.refuse("data_offsets", f"a range of {shown(tensor.nbytes)} bytes", shown(str(extent)))
    return extent[0], extent[1], name, tensor
