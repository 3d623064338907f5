"""Files are hostile until parsed: each of these must end in a typed error, quickly, in little memory."""

import json
import resource
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest

from dckpt.errors import CorruptCheckpointError, FormatVersionError
from dckpt.format.checksum import encode_sums, parse_sums
from dckpt.format.generation import encode_generation, parse_generation
from dckpt.format.index import encode_index, parse_index
from dckpt.format.manifest import encode_manifest, parse_manifest
from dckpt.format.sealed_json import dump_json
from dckpt.format.shard_file import header_bytes_needed, parse_shard_header
from dckpt.format.values import decode_value, load_json
from tests.unit.format.builders import (
    ATTEMPT,
    a_generation,
    a_manifest,
    a_shard_plan,
    a_sums,
    an_index,
    forge_sealed,
    forge_shard,
    forge_trailer,
    pack_index,
)

KEY = "hostile.file"
SECONDS_MAX = 20.0
MEMORY_MAX = 700 * 2**20


def parse_shard(data: bytes) -> object:
    """As a reader does: 8 bytes first, then what they ask for."""
    needed = header_bytes_needed(data[:8], file_bytes=len(data), key=KEY)
    return parse_shard_header(data[:needed], file_bytes=len(data), key=KEY)


def parse_rank_values(data: bytes) -> object:
    """As a reader does with the bytes of `rank.<r>.values.<component>`."""
    return decode_value(load_json(data, key=KEY, limit=64 * 2**20), key=KEY, path="values")


PARSERS = {
    "manifest": lambda data: parse_manifest(data, key=KEY),
    "generation": lambda data: parse_generation(data, key=KEY),
    "sums": lambda data: parse_sums(data, key=KEY),
    "index": lambda data: parse_index(data, key=KEY),
    "shard": parse_shard,
    "values": parse_rank_values,
}


def valid_files() -> dict[str, bytes]:
    """One valid file of each kind."""
    plan = a_shard_plan()
    return {
        "manifest": encode_manifest(a_manifest()),
        "generation": encode_generation(a_generation()),
        "sums": encode_sums(a_sums()),
        "index": encode_index(an_index()),
        "shard": plan.header + bytes(plan.size - len(plan.header)),
        "values": dump_json({"a": {"$t": "tuple", "v": [1]}}),
    }


def manifest_with(text: str, **changes: object) -> bytes:
    """A sealed manifest in which the value `"HERE"` of `facts` was replaced by raw `text`."""
    found = json.loads(encode_manifest(a_manifest(facts={"x": "HERE"})))
    del found["sha256"]
    return forge_sealed(json.dumps(found | changes).replace('"HERE"', text).encode())


def file_named(path: str) -> bytes:
    """A sealed manifest whose first shard file has this path."""
    found = json.loads(encode_manifest(a_manifest()))
    del found["sha256"]
    found["files"][0]["path"] = path
    return forge_sealed(found)


def index_with(header: dict, tail: bytes = b"") -> bytes:
    """An index file with this header and these bytes as its columns."""
    text = json.dumps(header).encode()
    text = text.ljust((len(text) + 7) // 8 * 8)
    return pack_index(struct.pack("<8sHHI", b"\x89dckIDX\n", 1, 0, len(text)) + text + tail)


def index_of_counts(count: int) -> bytes:
    """An index that claims `count` chunks and has none of them."""
    header_room = 512
    table = [["names", "u1", 16 + header_room, count]]
    header = {"tensors": count, "chunks": count, "grids": 0, "files": [], "dtypes": [], "columns": table}
    text = json.dumps(header).encode().ljust(header_room)
    return pack_index(struct.pack("<8sHHI", b"\x89dckIDX\n", 1, 0, header_room) + text)


def index_bomb(claimed: int) -> bytes:
    """An index whose content decompresses to 256 MiB of zeros, and which claims `claimed` bytes."""
    stream = zlib.compress(bytes(2**28), 9)
    return forge_trailer(struct.pack("<8sHHIQ", b"\x89dckIDX\n", 1, 0, 8, claimed) + stream)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}

# Built when the test runs, not when it is collected: some are large.
HOSTILE = {
    "manifest, '..'": ("manifest", lambda: file_named("../../../etc/passwd")),
    "manifest, '..' inside": ("manifest", lambda: file_named(f"{ATTEMPT}/../x.safetensors")),
    "manifest, absolute path": ("manifest", lambda: file_named("/dev/zero")),
    "manifest, NUL in a path": ("manifest", lambda: file_named(f"{ATTEMPT}/rank00000.safetensors\0.txt")),
    "manifest, endless path": ("manifest", lambda: file_named("a/" * 5_000_000)),
    "manifest, NaN": ("manifest", lambda: manifest_with("NaN")),
    "manifest, Infinity": ("manifest", lambda: manifest_with("-Infinity")),
    "manifest, 1e999": ("manifest", lambda: manifest_with("1e999")),
    "manifest, huge integer": ("manifest", lambda: manifest_with("9" * 30_000_000)),
    "manifest, duplicate key": ("manifest", lambda: manifest_with('{"a":1,"a":2}')),
    "manifest, deep": ("manifest", lambda: manifest_with("[" * 1_000_000 + "]" * 1_000_000)),
    "manifest, deep objects": ("manifest", lambda: manifest_with('{"a":' * 100_000 + "1" + "}" * 100_000)),
    "manifest, many empty lists": ("manifest", lambda: manifest_with("[" + "[]," * 20_000_000 + "[]]")),
    "manifest, many nested lists": ("manifest", lambda: manifest_with("[" + "[[]]," * 1_000_000 + "[]]", files=1)),
    "manifest, too large": ("manifest", lambda: manifest_with('"' + "x" * (64 * 2**20) + '"')),
    "manifest, many files": ("manifest", lambda: manifest_with("0", files=[0] * 2_500_000)),
    "manifest, huge world": ("manifest", lambda: manifest_with("0", world_size=2**62)),
    "manifest, no seal": ("manifest", lambda: b'{"dckpt":"manifest"}\n'),
    "manifest, lone surrogate": ("manifest", lambda: manifest_with('"\\ud800"')),
    "manifest, NUL in a name": ("manifest", lambda: manifest_with("0", parts=["a\0b"])),
    "generation, its own parent": (
        "generation",
        lambda: forge_sealed(encode_generation(a_generation())[:-79].replace(b'"number":8', b'"number":7') + b"}"),
    ),
    "sums, huge count": (
        "sums",
        lambda: forge_trailer(struct.pack("<8sHHIQQ16s", b"\x89dckSUM\n", 1, 0, 65536, 2**62 - 1, 2**46, b"")),
    ),
    "sums, count and size disagree": (
        "sums",
        lambda: forge_trailer(struct.pack("<8sHHIQQ16s", b"\x89dckSUM\n", 1, 0, 65536, 0, 2**60, b"")),
    ),
    "index, huge counts": ("index", lambda: index_of_counts(2**61)),
    "index, counts that overflow": ("index", lambda: index_of_counts(2**64)),
    "index, negative counts": ("index", lambda: index_of_counts(-1)),
    "index, huge header": ("index", lambda: pack_index(struct.pack("<8sHHI", b"\x89dckIDX\n", 1, 0, 2**32 - 8))),
    "index, no content": ("index", lambda: forge_trailer(struct.pack("<8sHHI", b"\x89dckIDX\n", 1, 0, 8))),
    "index, bomb": ("index", lambda: index_bomb(2**28)),
    "index, bomb that claims little": ("index", lambda: index_bomb(1024)),
    "index, bomb that claims all": ("index", lambda: index_bomb(2**64 - 1)),
    "index, deep header": (
        "index",
        lambda: pack_index(struct.pack("<8sHHI", b"\x89dckIDX\n", 1, 0, 2_000_000) + b"[" * 2_000_000),
    ),
    "index, no columns": (
        "index",
        lambda: index_with({"tensors": 0, "chunks": 0, "grids": 0, "files": [], "dtypes": [], "columns": []}),
    ),
    "index, columns of another kind": (
        "index",
        lambda: index_with(
            {"tensors": 0, "chunks": 0, "grids": 0, "files": [], "dtypes": [], "columns": [None, {}, 1]}
        ),
    ),
    "index, not an object": ("index", lambda: index_with([])),
    "shard, header length 2^60": ("shard", lambda: struct.pack("<Q", 2**60) + b"{}"),
    "shard, header length 2^64 - 1": ("shard", lambda: struct.pack("<Q", 2**64 - 1) + b"{}"),
    "shard, overlapping": (
        "shard",
        lambda: forge_shard({"a": ENTRY, "b": ENTRY | {"data_offsets": [4, 12]}}, bytes(12)),
    ),
    "shard, same bytes twice": ("shard", lambda: forge_shard({"a": ENTRY, "b": ENTRY}, bytes(8))),
    "shard, gap": ("shard", lambda: forge_shard({"a": ENTRY | {"data_offsets": [8, 16]}}, bytes(16))),
    "shard, tail": ("shard", lambda: forge_shard({"a": ENTRY}, bytes(9))),
    "shard, wrong dtype": ("shard", lambda: forge_shard({"a": ENTRY | {"dtype": "PICKLE"}}, bytes(8))),
    "shard, wrong shape": ("shard", lambda: forge_shard({"a": ENTRY | {"shape": [2**62, 2**62]}}, bytes(8))),
    "shard, duplicate keys": (
        "shard",
        lambda: forge_shard(b'{"a":' + dump_json(ENTRY) + b',"a":' + dump_json(ENTRY) + b"}", bytes(8)),
    ),
    "shard, NUL in a name": ("shard", lambda: forge_shard({"a\0b": ENTRY}, bytes(8))),
    "shard, NaN": ("shard", lambda: forge_shard(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', bytes(8))),
    "shard, deep": ("shard", lambda: forge_shard(b'{"a":' * 1_000_000)),
    "shard, deep sharding info": (
        "shard",
        lambda: forge_shard({"__metadata__": {"DCP_SHARDING_INFO": "[" * 1_000_000}, "a": ENTRY}, bytes(8)),
    ),
    "shard, many empty objects": ("shard", lambda: forge_shard(b'{"a":[' + b"{}," * 10_000_000 + b"{}]}")),
    "values, code": ("values", lambda: b'{"a":{"$t":"code","v":"import os"}}'),
    "values, huge int": ("values", lambda: b'{"$t":"int","v":"' + b"9" * 50_000_000 + b'"}'),
    "values, huge array": (
        "values",
        lambda: b'{"$t":"ndarray","dtype":"float64","shape":[1152921504606846976],"v":""}',
    ),
    "values, object array": ("values", lambda: b'{"$t":"ndarray","dtype":"object","shape":[0],"v":""}'),
    "values, deep": ("values", lambda: b'{"$t":"tuple","v":[' * 100 + b"]}" * 100),
    "values, deep lists": ("values", lambda: b"[" * 200 + b"]" * 200),
    "values, unhashable key": ("values", lambda: b'{"$t":"dict","v":[[{},1]]}'),
    "nothing, manifest": ("manifest", lambda: b""),
    "nothing, generation": ("generation", lambda: b""),
    "nothing, sums": ("sums", lambda: b""),
    "nothing, index": ("index", lambda: b""),
    "nothing, shard": ("shard", lambda: b""),
    "zeros, manifest": ("manifest", lambda: bytes(4096)),
    "zeros, sums": ("sums", lambda: bytes(4096)),
    "zeros, index": ("index", lambda: bytes(4096)),
    "zeros, shard": ("shard", lambda: bytes(4096)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_by_name_in_bounded_time(name):
    kind, make = HOSTILE[name]
    data = make()
    begin = time.perf_counter()
    with pytest.raises(CorruptCheckpointError) as caught:
        PARSERS[kind](data)
    seconds = time.perf_counter() - begin

    assert caught.value.key is not None
    assert caught.value.key.startswith(KEY)
    assert caught.value.field
    assert len(caught.value.field) < 600
    assert len(str(caught.value)) < 2000
    assert "\n" not in str(caught.value)
    assert "\0" not in str(caught.value)
    assert seconds < SECONDS_MAX


def refuse_all_within(room_bytes: int) -> int:
    """Runs in a process of its own: parses every hostile file with so much address space left; how many it refused."""
    num_refused = 0
    for kind, make in HOSTILE.values():
        data = make()
        with open("/proc/self/statm", encoding="ascii") as statm:
            used = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + room_bytes, resource.RLIM_INFINITY))
        try:
            PARSERS[kind](data)
        except CorruptCheckpointError:
            num_refused += 1
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return num_refused


def test_all_hostile_files_are_refused_in_bounded_memory():
    """A real limit on a real process: more memory than this is a MemoryError, which is not the refusal it expects."""
    code = f"from tests.unit.format import test_hostile_files as t; print(t.refuse_all_within({MEMORY_MAX}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)

    assert found.stderr == ""
    assert int(found.stdout) == len(HOSTILE)


@pytest.mark.parametrize("kind", ["manifest", "generation", "sums", "index", "shard"])
def test_every_truncation_and_every_extension_is_refused(kind):
    data = valid_files()[kind]
    PARSERS[kind](data)
    lengths = {length for length in range(len(data)) if length < 200 or length > len(data) - 200 or length % 97 == 0}
    for length in lengths:
        with pytest.raises(CorruptCheckpointError):
            PARSERS[kind](data[:length])
    for tail in (b"\0", b"\n", b" ", data):
        with pytest.raises(CorruptCheckpointError):
            PARSERS[kind](data + tail)


@pytest.mark.parametrize("kind", ["manifest", "generation", "sums", "index"])
def test_every_flipped_bit_is_found_where_the_file_has_its_own_checksum(kind):
    data = valid_files()[kind]
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << (place % 8)
        with pytest.raises(CorruptCheckpointError):
            PARSERS[kind](bytes(changed))


@pytest.mark.parametrize("one", ["manifest", "generation", "sums", "index", "shard"])
@pytest.mark.parametrize("other", ["manifest", "generation", "sums", "index", "shard"])
def test_a_swapped_file_is_refused(one, other):
    if one != other:
        with pytest.raises(CorruptCheckpointError):
            PARSERS[one](valid_files()[other])


@pytest.mark.parametrize("kind", ["sums", "index"])
def test_a_newer_binary_version_with_a_right_checksum_asks_for_an_upgrade(kind):
    body = bytearray(valid_files()[kind][:-8])
    struct.pack_into("<H", body, 8, 7)
    with pytest.raises(FormatVersionError):
        PARSERS[kind](forge_trailer(bytes(body)))


def test_an_index_of_the_largest_claims_allocates_nothing_of_them():
    """ndim of 64 and a shape near 2^62 in each dimension: products must not wrap into something plausible."""
    num = 1000
    names = b"".join(b"%04d" % place for place in range(num))
    columns = [
        np.frombuffer(names, "u1"),
        (np.arange(num, dtype="<u8") + 1) * 4,
        np.zeros(num, "u1"),
        np.full(num, 64, "u1"),
        np.full(num * 64, 2**62, "<i8"),
        np.zeros(num, "<u8"),
        *(np.zeros(0, kind) for kind in ("<i4", "<u8", "<i8", "<i8")),
        np.full(num, -1, "<i4"),
        *(np.zeros(0, kind) for kind in ("<u8", "u1", "u1", "<i8", "<u8", "<i4")),
    ]
    kinds = ["u1", "u8", "u1", "u1", "i8", "u8", "i4", "u8", "i8", "i8", "i4", "u8", "u1", "u1", "i8", "u8", "i4"]
    labels = ["names", "name_ends", "dtype", "ndim", "shape", "chunk_ends", "file", "begin", "offsets", "sizes"]
    labels += ["grid", "data_begin", "grid_ndim", "grid_levels", "grid_parts", "cell_ends", "cells"]
    room = 1024
    table, tail, end = [], b"", 16 + room
    for label, kind, column in zip(labels, kinds, columns, strict=True):
        table.append([label, kind, end, len(column)])
        raw = column.tobytes()
        tail += raw.ljust((len(raw) + 7) // 8 * 8, b"\0")
        end = 16 + room + len(tail)
    header = json.dumps(
        {"tensors": num, "chunks": 0, "grids": 0, "files": [], "dtypes": ["F32"], "columns": table}
    ).encode()
    data = pack_index(struct.pack("<8sHHI", b"\x89dckIDX\n", 1, 0, room) + header.ljust(room) + tail)

    with pytest.raises(CorruptCheckpointError) as caught:
        parse_index(data, key=KEY)
    assert caught.value.field == "0000"
