"""Checkpoints that are whole by every checksum and say something else than their writer said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dckpt.format.checksum import Sums, digest_bytes, encode_sums, parse_sums
from dckpt.format.manifest import encode_manifest, parse_manifest


def reseal_sums(checkpoint: Path, rank: int, change: Callable[[Sums], Sums]) -> None:
    """Changes the sums of all files of one rank, and the manifest accordingly. `checkpoint`: its directory."""
    path = checkpoint / "manifest.json"
    manifest = parse_manifest(path.read_bytes(), key="manifest.json")
    files = []
    for entry in manifest.files:
        if entry.kind == "sums" and entry.rank == rank:
            sums = checkpoint.parent / entry.key_in(checkpoint.name)
            data = encode_sums(change(parse_sums(sums.read_bytes(), key=entry.path)))
            sums.unlink()  # it may be a link
            sums.write_bytes(data)
            entry = replace(entry, size=len(data), digest=digest_bytes(data))
        files.append(entry)
    path.write_bytes(encode_manifest(replace(manifest, files=tuple(files))))


def without_fingerprints(sums: Sums) -> Sums:
    """As a writer leaves them that knows none."""
    return replace(sums, fingerprints=())


def with_one_more(sums: Sums) -> Sums:
    """A fingerprint of a chunk that is not there."""
    return replace(sums, fingerprints=(*sums.fingerprints, 7))
