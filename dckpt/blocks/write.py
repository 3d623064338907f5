"""Writes one shard file and its checksum file, checksummed in the stream and durable when the call returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from dckpt import failpoint
from dckpt.format.checksum import BLOCK_BYTES, FileHasher, Sums, digest_bytes, encode_sums
from dckpt.format.layout import sums_file_name
from dckpt.format.manifest import FileEntry

if TYPE_CHECKING:
    from dckpt.storage.base import FileWriter, Storage

PIECE_BYTES = 8 * 2**20  # one write call; a multiple of the block


def _piece_bytes(size: int) -> int:
    """At least two pieces a file, so that a crash in the middle of a small one can be rehearsed too."""
    half = -(-size // 2)
    return max(BLOCK_BYTES, min(PIECE_BYTES, -(-half // BLOCK_BYTES) * BLOCK_BYTES))


def _write_pieces(
    writer: FileWriter, image: memoryview, hasher: FileHasher, on_bytes: Callable[[int], None]
) -> None:
    step = _piece_bytes(len(image))
    for begin in range(0, len(image), step):
        piece = image[begin : begin + step]
        hasher.update(piece)
        writer.write_at(begin, piece)
        on_bytes(len(piece))
        if begin == 0:
            failpoint.reach("mid_shard_write")


def write_shard_file(
    storage: Storage,
    directory: str,
    attempt: str,
    rank: int,
    name: str,
    image: memoryview,
    on_bytes: Callable[[int], None],
) -> list[FileEntry]:
    """Writes `image` as `directory/name` with its sums beside it; both are fsynced when this returns.

    Returns the manifest's entries of the two files, their paths relative to the checkpoint. `on_bytes` is told of every
    piece that was handed to the kernel. The directory is *not* synced: the caller does that once after its last file.
    Raises `StorageError` and its kin; then the attempt is condemned and the files must not be used.
    """
    failpoint.reach("before_shard_write")
    hasher = FileHasher()
    writer = storage.create_file(f"{directory}/{name}")
    try:
        _write_pieces(writer, image, hasher, on_bytes)
        failpoint.reach("after_shard_write")
        writer.finish(len(image))
    except BaseException:
        writer.abandon()
        raise
    failpoint.reach("after_shard_sync")
    digest = hasher.digest()
    sums = encode_sums(Sums(file_bytes=len(image), digest=digest, blocks=hasher.checksums()))
    sums_name = sums_file_name(name)
    _write_small(storage, f"{directory}/{sums_name}", sums)
    return [
        FileEntry(path=f"{attempt}/{name}", size=len(image), digest=digest, kind="shard", rank=rank),
        FileEntry(
            path=f"{attempt}/{sums_name}", size=len(sums), digest=digest_bytes(sums), kind="sums", rank=rank
        ),
    ]


def _write_small(storage: Storage, key: str, data: bytes) -> None:
    writer = storage.create_file(key)
    try:
        writer.write_at(0, memoryview(data))
        writer.finish(len(data))
    except BaseException:
        writer.abandon()
        raise
