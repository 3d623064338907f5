"""What identifies a data set that lies in files, so that a resume notices when it is another one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Literal

import xxhash

from dckpt.errors import ConfigError

SAMPLE_BYTES = 65536
SAMPLES = 16
_PIECE_BYTES = 2**20


def fingerprint_files(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], *, content: Literal["full", "sampled"] = "sampled"
) -> str:
    """32 hex digits for the files, and for every file below the folders, at `paths`; where they lie does not matter.

    Names (below a folder, or the file's own), sizes and contents enter. "sampled" reads 16 pieces of 64 KiB of each file, first
    and last included, so it sees every change of size and most rewrites; "full" reads all and sees every change. Raises
    `ConfigError` if a path leads nowhere or there are no files.
    """
    if content not in ("full", "sampled"):
        raise ConfigError(f"fingerprint_files(content={content!r}): expected 'full' or 'sampled'")
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    whole = xxhash.xxh3_128()
    found = 0
    for path in given:
        for name, place in _files_below(os.fspath(path)):
            digest, size = _file_digest(place, is_full=content == "full")
            whole.update(f"{len(os.fsencode(name))}|{size}|".encode() + os.fsencode(name) + digest)
            found += 1
    if not found:
        raise ConfigError(
            f"fingerprint_files: expected files, found none in {[os.fspath(path) for path in given]!r:.200}"
        )
    return whole.hexdigest()


def _files_below(path: str) -> Iterator[tuple[str, str]]:
    """(name, place) of the file, or of all files below the folder, in the order of their names."""
    if os.path.isfile(path):
        yield os.path.basename(path), path
        return
    if not os.path.isdir(path):
        raise ConfigError(f"fingerprint_files: expected a file or a folder, found none at {path}")
    places = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
    yield from sorted((os.path.relpath(place, path).replace(os.sep, "/"), place) for place in places)


def _file_digest(place: str, *, is_full: bool) -> tuple[bytes, int]:
    hasher = xxhash.xxh3_128()
    with open(place, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if is_full or size <= SAMPLES * SAMPLE_BYTES:
            while piece := file.read(_PIECE_BYTES):
                hasher.update(piece)
        else:
            for number in range(SAMPLES):
                file.seek((size - SAMPLE_BYTES) * number // (SAMPLES - 1))
                hasher.update(file.read(SAMPLE_BYTES))
    return hasher.digest(), size
