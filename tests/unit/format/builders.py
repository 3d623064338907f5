"""Valid records of every kind, for the tests of this directory to round-trip, damage and forge."""

from __future__ import annotations

import hashlib
import itertools
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import xxhash

from dckpt.format.checksum import Sums, block_checksums, digest_bytes
from dckpt.format.generation import Generation, Parent
from dckpt.format.index import Chunk, LayoutIndex, build_index
from dckpt.format.layout import index_file_name, shard_file_name, sums_file_bytes, sums_file_name
from dckpt.format.manifest import FileEntry, Manifest, Mesh
from dckpt.format.origin import Origin
from dckpt.format.sealed_json import dump_json
from dckpt.format.shard_file import ShardFilePlan, ShardTensor, plan_shard_file

ATTEMPT = "7f3a9c21" * 4
DIGEST = "0123456789abcdef" * 2


def a_manifest(*, world_size: int = 2, **changes: Any) -> Manifest:
    """A manifest of a run with one shard file per rank; `changes` replace fields."""
    files = []
    for rank in range(world_size):
        shard = f"{ATTEMPT}/{shard_file_name(rank)}"
        files.append(FileEntry(shard, 100_000, DIGEST, "shard", rank))
        files.append(FileEntry(sums_file_name(shard), sums_file_bytes(100_000, 3), DIGEST, "sums", rank))
    files.append(FileEntry(index_file_name(DIGEST), 4096, DIGEST, "index", None))
    fields: dict[str, Any] = {
        "run_id": "run-1",
        "step": 1200,
        "micro_step": 0,
        "generation": 7,
        "attempt": ATTEMPT,
        "created_unix_s": 1700000000.25,
        "world_size": world_size,
        "mesh": Mesh(axes=("dp",), shape=(world_size,)),
        "coordinates": tuple((rank,) for rank in range(world_size)),
        "parts": ("model", "optim"),
        "values": {"progress": {"step": 1200, "seen": {"$t": "tuple", "v": [1, 2.5]}}},
        "planner_data": None,
        "rank_tensors": ("model.bn.running_mean",),
        "rank_values": ("rng",),
        "aliases": {"model.head.weight": "model.embed.weight"},
        "rng": {"torch": ("dp",), "numpy": ()},
        "facts": {"batch": {"micro": 8}},
        "metrics": {"loss": 2.5, "grad_norm": float("inf")},
        "writer": {"dckpt": "0.1.0"},
        "lineage": None,
        "files": tuple(files),
    }
    return Manifest(**(fields | changes))


def an_origin(**changes: Any) -> Origin:
    """Where a resharded checkpoint comes from; `changes` replace fields."""
    fields: dict[str, Any] = {
        "how": "reshard",
        "run_id": "run-0",
        "checkpoint": "step-0000001200.g0003",
        "step": 1200,
        "micro_step": 0,
        "generation": 3,
        "manifest_sha256": "cd" * 32,
        "world_size": 8,
        "carried": ("model.bn.running_mean",),
    }
    return Origin(**(fields | changes))


def a_generation(**changes: Any) -> Generation:
    """The record of a generation that resumed; `changes` replace fields."""
    fields: dict[str, Any] = {
        "number": 8,
        "run_id": "run-1",
        "parent": Parent("step-0000001200.g0007", 1200, 0, 7, "ab" * 32),
        "reason": "resume",
        "world_size": 2,
        "created_unix_s": 1700000000.5,
        "nonce": "n" * 32,
    }
    return Generation(**(fields | changes))


def a_sums(size: int = 200_000) -> Sums:
    """Sums of a file of `size` bytes."""
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    fingerprints = (2**128 - 1, 0, 0x0123456789ABCDEF << 32)
    return Sums(file_bytes=size, digest=digest_bytes(data), blocks=block_checksums(data), fingerprints=fingerprints)


def a_shard_plan() -> ShardFilePlan:
    """A shard file of several dtypes, among them one of 0 dimensions."""
    return plan_shard_file(
        "rank00000.safetensors",
        [
            ShardTensor("model.bias", "F32", (3,), (5,)),
            ShardTensor("model.flag", "BOOL", (), ()),
            ShardTensor("model.weight", "BF16", (2, 3), (4, 0)),
            ShardTensor("optim.step", "F64", (), ()),
        ],
    )


def shard_names(count: int) -> list[str]:
    """Names of the first shard files of `count` ranks."""
    return [shard_file_name(rank) for rank in range(count)]


def grid_chunks(shape: Sequence[int], parts: Sequence[int], *, begin: int = 4096) -> list[Chunk]:
    """`shape` cut into a grid with `parts` pieces along each dimension; piece i lies in file i."""
    steps = [size // count for size, count in zip(shape, parts, strict=True)]
    places = itertools.product(*(range(count) for count in parts))
    return [
        Chunk(tuple(a * b for a, b in zip(place, steps, strict=True)), tuple(steps), file, begin)
        for file, place in enumerate(places)
    ]


def pack_index(plain: bytes) -> bytes:
    """The index file for a head, a JSON header and columns as they stand in the decompressed content."""
    return forge_trailer(plain[:16] + struct.pack("<Q", len(plain) - 16) + zlib.compress(plain[16:]))


def unpack_index(data: bytes) -> bytes:
    """Head and content of an index file."""
    return data[:16] + zlib.decompress(data[24:-8])


def an_index() -> LayoutIndex:
    """Tensors of 0, 1 and 2 dimensions, one of them empty, one with an empty chunk, over four files."""
    return build_index(
        shard_names(4),
        {
            "a.weight": ("F32", (8, 6), grid_chunks((8, 6), (2, 2))),
            "b.bias": ("BF16", (5,), [Chunk((0,), (5,), 0, 4144), Chunk((5,), (0,), -1, 0)]),
            "c.scalar": ("F64", (), [Chunk((), (), 1, 5000)]),
            "d.empty": ("I64", (0, 4), []),
        },
    )


def forge_sealed(found: dict[str, Any] | bytes) -> bytes:
    """A sealed file whose seal is right, whatever it says: damage that only the checks behind the seal can see."""
    body = (found if isinstance(found, bytes) else dump_json(found))[:-1]
    return body + b',"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


def forge_trailer(body: bytes) -> bytes:
    """`body` with the trailing checksum that belongs to it."""
    return body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))


def forge_shard(header: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    """A shard file with this header, whatever it says."""
    text = header if isinstance(header, bytes) else dump_json(header)
    return struct.pack("<Q", len(text)) + text + data
