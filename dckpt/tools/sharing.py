"""Which bytes on the medium each checkpoint of a run lies on: files that were taken over are there once. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Content: TypeAlias = tuple[str, int]
Copy: TypeAlias = tuple[str, Content]
"""One copy of a content, named by the first checkpoint that has it."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """What a manifest says of one file's place: see `FileEntry`."""

    digest: str
    size: int
    reused: int
    checkpoint: str | None


def find_copies(files: Mapping[str, Sequence[StoredFile]]) -> dict[str, dict[Copy, int]]:
    """Checkpoint -> the copies that it lies on, with their bytes. `files` by checkpoint, in the order of the commits.

    A file that was taken over shares the newest copy of its content; if the checkpoints before it are gone, it keeps that
    copy alone. Sums of a linked file count as its own: they may be, and are small.
    """
    newest: dict[Content, Copy] = {}
    held: dict[tuple[str, Content], Copy] = {}
    found: dict[str, dict[Copy, int]] = {}
    for name, entries in files.items():
        copies = found[name] = {}
        for entry in entries:
            content = (entry.digest, entry.size)
            if entry.checkpoint is not None:
                copy = held.get((entry.checkpoint, content), (entry.checkpoint, content))
            elif entry.reused:
                copy = newest.get(content, (name, content))
            else:
                copy = (name, content)
            newest[content] = held[name, content] = copy
            copies[copy] = entry.size
    return found


def total_bytes(copies: Mapping[str, Mapping[Copy, int]]) -> int:
    """Bytes of all of them together, each copy once."""
    return sum({copy: size for held in copies.values() for copy, size in held.items()}.values())


def shared_bytes(copies: Mapping[str, Mapping[Copy, int]]) -> dict[str, int]:
    """Checkpoint -> how many of its bytes an earlier one has too."""
    seen: set[Copy] = set()
    shared = {}
    for name, held in copies.items():
        shared[name] = sum(size for copy, size in held.items() if copy in seen)
        seen |= held.keys()
    return shared


def freed_bytes(copies: Mapping[str, Mapping[Copy, int]], removed: Collection[str]) -> int:
    """Bytes that are free when the checkpoints `removed` are gone: what the others share with them stays."""
    kept = {copy for name, held in copies.items() if name not in removed for copy in held}
    going = {copy: size for name in removed for copy, size in copies.get(name, {}).items()}
    return sum(size for copy, size in going.items() if copy not in kept)
