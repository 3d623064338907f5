"""Block checksums, file digests and the sums file (FORMAT.md, sections 4 and 6)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

from dckpt.errors import FormatVersionError
from dckpt.format.fingerprint import FINGERPRINT_BYTES, decode_fingerprint, encode_fingerprint
from dckpt.format.layout import BLOCK_BYTES, FILE_BYTES_MAX, fingerprints_in_sums, is_hex32, sums_file_bytes
from dckpt.format.refusal import corrupt, shown

__all__ = [
    "BLOCK_BYTES",
    "SEGMENT_BYTES",
    "FileHasher",
    "Sums",
    "block_checksums",
    "combine_digests",
    "digest_bytes",
    "encode_sums",
    "parse_sums",
    "segment_digests",
    "sums_file_bytes",
]

SEGMENT_BYTES = 16 * 2**20
"""Bytes under one leaf of the file digest; a multiple of `BLOCK_BYTES`."""

Buffer: TypeAlias = bytes | bytearray | memoryview
Checksums: TypeAlias = npt.NDArray[np.uint64]

# Both hashes see a piece while it is in the processor's cache: twice as fast as one after the other over a segment.
_PIECE_BYTES = 2**20

_MAGIC = b"\x89dckSUM\n"
_MAJOR, _MINOR = 1, 0
_HEAD = struct.Struct("<8sHHIQQ16s")
_TRAILER_BYTES = 8


def _flat(data: Buffer) -> memoryview:
    view = memoryview(data)
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


def block_checksums(data: Buffer) -> Checksums:
    """One XXH3-64 per 64 KiB block of `data`, which begins at a block boundary; the last may be short."""
    view = _flat(data)
    size = len(view)
    hash_block = xxhash.xxh3_64_intdigest
    values = (hash_block(view[begin : begin + BLOCK_BYTES]) for begin in range(0, size, BLOCK_BYTES))
    return np.fromiter(values, dtype=np.uint64, count=-(-size // BLOCK_BYTES))


def segment_digests(data: Buffer) -> bytes:
    """The digests of the segments of `data`, 16 bytes each; it begins at a segment boundary of its file."""
    view = _flat(data)
    hash_segment = xxhash.xxh3_128_digest
    return b"".join(hash_segment(view[begin : begin + SEGMENT_BYTES]) for begin in range(0, len(view), SEGMENT_BYTES))


def combine_digests(segments: bytes) -> str:
    """The file digest from the concatenated digests of all its segments, in file order."""
    return xxhash.xxh3_128_hexdigest(segments)


def digest_bytes(data: Buffer) -> str:
    """The file digest of a file whose whole content is `data`."""
    return combine_digests(segment_digests(data))


class FileHasher:
    """Digest and block checksums of one file whose bytes pass by once, in order, in pieces of any size.

    `digest` and `checksums` may be asked at any time and do not disturb the stream.
    """

    def __init__(self) -> None:
        self._size = 0
        self._segments: list[bytes] = []
        self._segment = xxhash.xxh3_128()
        self._blocks: list[Checksums] = []
        self._block = xxhash.xxh3_64()

    @property
    def file_bytes(self) -> int:
        """Bytes seen so far."""
        return self._size

    def update(self, data: Buffer) -> None:
        """Takes the next bytes of the file."""
        view = _flat(data)
        while len(view):
            piece = view[: min(_PIECE_BYTES, SEGMENT_BYTES - self._size % SEGMENT_BYTES)]
            self._update_segment(piece)
            self._update_blocks(piece)
            self._size += len(piece)
            view = view[len(piece) :]

    def _update_segment(self, piece: memoryview) -> None:
        self._segment.update(piece)
        if (self._size + len(piece)) % SEGMENT_BYTES == 0:
            self._segments.append(self._segment.digest())
            self._segment.reset()

    def _update_blocks(self, piece: memoryview) -> None:
        begun = self._size % BLOCK_BYTES
        if begun:
            head = piece[: BLOCK_BYTES - begun]
            self._block.update(head)
            if begun + len(head) < BLOCK_BYTES:
                return
            self._blocks.append(np.array([self._block.intdigest()], dtype=np.uint64))
            self._block.reset()
            piece = piece[len(head) :]
        whole = len(piece) // BLOCK_BYTES * BLOCK_BYTES
        if whole:
            self._blocks.append(block_checksums(piece[:whole]))
        if whole < len(piece):
            self._block.update(piece[whole:])

    def segment_digests(self) -> bytes:
        """The digests of the segments so far, 16 bytes each; the last may be of a segment that is not full yet."""
        last = [self._segment.digest()] if self._size % SEGMENT_BYTES else []
        return b"".join(self._segments + last)

    def digest(self) -> str:
        """The file digest of the bytes so far."""
        return combine_digests(self.segment_digests())

    def checksums(self) -> Checksums:
        """The block checksums of the bytes so far."""
        last = [np.array([self._block.intdigest()], dtype=np.uint64)] if self._size % BLOCK_BYTES else []
        return np.concatenate([np.empty(0, dtype=np.uint64), *self._blocks, *last])


@dataclass(frozen=True, slots=True, eq=False)
class Sums:
    """What the sums file says about its shard file: size, file digest, checksum of every block.

    fingerprints: of each tensor's chunk, in the order of their data in the file; none if whoever wrote it had none.
    """

    file_bytes: int
    digest: str
    blocks: Checksums
    fingerprints: tuple[int, ...] = ()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sums):
            return NotImplemented
        same_file = (self.file_bytes, self.digest) == (other.file_bytes, other.digest)
        return same_file and self.fingerprints == other.fingerprints and np.array_equal(self.blocks, other.blocks)

    def __hash__(self) -> int:
        return hash((self.file_bytes, self.digest))


def encode_sums(sums: Sums) -> bytes:
    """The content of a sums file."""
    assert is_hex32(sums.digest), sums.digest
    assert sums_file_bytes(sums.file_bytes, 0) == _HEAD.size + 8 * len(sums.blocks) + _TRAILER_BYTES
    head = _HEAD.pack(
        _MAGIC, _MAJOR, _MINOR, BLOCK_BYTES, sums.file_bytes, len(sums.blocks), bytes.fromhex(sums.digest)
    )
    fingerprints = b"".join(map(encode_fingerprint, sums.fingerprints))
    body = head + sums.blocks.astype("<u8", copy=False).tobytes() + fingerprints
    return body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))


def parse_sums(data: Buffer, *, key: str) -> Sums:
    """The record in a sums file; any flipped, missing or additional byte is refused."""
    view = _flat(data)
    size = len(view)
    if bytes(view[: len(_MAGIC)]) != _MAGIC:
        raise corrupt(key, "magic", shown(_MAGIC), shown(bytes(view[: len(_MAGIC)])))
    if size < _HEAD.size + _TRAILER_BYTES:
        raise corrupt(key, "size", f"at least {_HEAD.size + _TRAILER_BYTES} bytes", f"{size} bytes")
    stated = int.from_bytes(view[-_TRAILER_BYTES:], "little")
    actual = xxhash.xxh3_64_intdigest(view[:-_TRAILER_BYTES])
    if stated != actual:
        raise corrupt(key, "trailing checksum", f"{stated:016x}", f"{actual:016x}")
    _, major, minor, block_bytes, file_bytes, count, digest = _HEAD.unpack_from(view)
    if major > _MAJOR:
        raise FormatVersionError(
            f"File {key}: expected version {_MAJOR} or older, found {major}.{minor}. Upgrade dckpt."
        )
    if major < 1:
        raise corrupt(key, "version", "1 or newer", major)
    if block_bytes != BLOCK_BYTES:
        raise corrupt(key, "block size", BLOCK_BYTES, block_bytes)
    if file_bytes > FILE_BYTES_MAX:
        raise corrupt(key, "file size", f"at most {FILE_BYTES_MAX}", file_bytes)
    num_fingerprints = fingerprints_in_sums(size, file_bytes)
    if num_fingerprints is None:
        expected = f"{sums_file_bytes(file_bytes, 0)} bytes, and {FINGERPRINT_BYTES} a tensor"
        raise corrupt(key, "size", expected, f"{size} bytes")
    if count != -(-file_bytes // BLOCK_BYTES):
        raise corrupt(key, "block count", -(-file_bytes // BLOCK_BYTES), count)
    blocks = np.frombuffer(view[_HEAD.size : -_TRAILER_BYTES], dtype="<u8", count=count).astype(np.uint64)
    begin = _HEAD.size + 8 * count
    fingerprints = tuple(
        decode_fingerprint(view[begin + place : begin + place + FINGERPRINT_BYTES])
        for place in range(0, num_fingerprints * FINGERPRINT_BYTES, FINGERPRINT_BYTES)
    )
    return Sums(file_bytes=file_bytes, digest=digest.hex(), blocks=blocks, fingerprints=fingerprints)
