"""What a save may take over: the files of the checkpoint that this process committed or loaded last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from dckpt.blocks.take_over import Reusable
from dckpt.format.layout import sums_file_name
from dckpt.format.manifest import FileEntry

REWRITE_EVERY = 10
"""A file that does not change is written anew in one of so many checkpoints: one bad sector harms no more than these."""


# Without slots: what is derived from the files is computed once and kept in the instance's dict.
@dataclass(frozen=True)
class ReusableFiles:
    """The shard files of one committed checkpoint by their content. Never those of a save that failed or is unknown."""

    files: Mapping[tuple[int, str], Sequence[Reusable]] = field(default_factory=dict)
    """(size, digest) -> the files with this content; those that are due to be written anew are left out."""

    @cached_property
    def places(self) -> frozenset[str]:
        """The checkpoints in which these files lie."""
        return frozenset(found.checkpoint for alike in self.files.values() for found in alike)

    @cached_property
    def sizes(self) -> frozenset[int]:
        """The sizes of these files: one of another size cannot be among them, and its content need not be looked at."""
        return frozenset(size for size, _ in self.files)

    def find(self, size: int, digest: str, name: str) -> Reusable | None:
        """A file with this content, the one of this name if there are several."""
        alike = self.files.get((size, digest), ())
        return next((found for found in alike if found.shard.name == name), alike[0] if alike else None)


def reusable_files(checkpoint: str, entries: Sequence[FileEntry], *, rewrite_every: int) -> ReusableFiles:
    """What the entries of `checkpoint`, or one rank's part of them, offer to the next save."""
    sums = {(entry.checkpoint, entry.path): entry for entry in entries if entry.kind == "sums"}
    files: dict[tuple[int, str], list[Reusable]] = {}
    for entry in entries:
        if entry.kind == "shard" and entry.reused + 1 < rewrite_every:
            place = entry.checkpoint or checkpoint
            found = Reusable(place, entry, sums[entry.checkpoint, sums_file_name(entry.path)])
            files.setdefault((entry.size, entry.digest), []).append(found)
    return ReusableFiles(files)
