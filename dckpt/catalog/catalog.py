"""The checkpoints of a run: listing, lineage, look-up by step or name, pins. Reads afresh at each call."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Literal

from dckpt.catalog.generations import list_generations, read_generation
from dckpt.catalog.line import Line, trace_line
from dckpt.catalog.references import hold
from dckpt.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    KeyExistsError,
    StorageMissingError,
)
from dckpt.format.layout import MANIFEST_NAME, PINS_DIR, CheckpointId, parse_checkpoint_name, pin_key
from dckpt.format.manifest import MANIFEST_BYTES_MAX, Manifest, manifest_digest, parse_manifest
from dckpt.storage.base import Storage

if TYPE_CHECKING:
    from dckpt.format.index import LayoutIndex

logger = logging.getLogger(__name__)

_SHOWN_MAX = 5


class Catalog:
    """The run at the root of `storage`."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def checkpoints(self) -> list[CheckpointId]:
        """Every directory with a checkpoint's name, ascending; whether it is intact is not looked at."""
        if not self._storage.exists():
            return []
        found = (parse_checkpoint_name(entry.name) for entry in self._storage.list_dir() if entry.is_dir)
        return sorted(item for item in found if item is not None)

    def newest_generation(self) -> int:
        """The highest generation that a record or a checkpoint's name states; 0 for none.

        The names count too, so that a run that lost its records never gives a number out twice.
        """
        recorded = list_generations(self._storage)
        return max([*recorded, *(item.generation for item in self.checkpoints())], default=0)

    def trace(self) -> Line:
        """The line and what is off it, with notes where the lineage could not be followed."""
        # Generations before checkpoints: a commit in between then shows as a newer generation, not as an
        # orphan.
        recorded = list_generations(self._storage)
        checkpoints = self.checkpoints()
        newest = max([*recorded, *(item.generation for item in checkpoints)], default=0)
        traced = trace_line(checkpoints, newest, lambda number: read_generation(self._storage, number))
        for note in traced.notes:
            logger.warning("%s: %s", self._storage.url, note)
        return traced

    def line(self) -> list[CheckpointId]:
        """What `latest` may mean, newest first: the newest generation's checkpoints, then their ancestors."""
        return list(self.trace().on_line)

    def superseded(self) -> list[CheckpointId]:
        """What is off the line, ascending: never resolved by step, never expired by a policy."""
        return list(self.trace().superseded)

    def resolve(self, which: str | int) -> CheckpointId:
        """`"latest"` or a step on the line, or the full name of any checkpoint.

        A step means the checkpoint after that optimizer step; one in the middle of an accumulation is taken
        only if there is no other at that step. Of several generations the newest wins.
        """
        if isinstance(which, str) and which.isdigit():
            which = int(which)
        if isinstance(which, int):
            return self._resolve_step(which)
        if which == "latest":
            line = self.line()
            if not line:
                raise self._not_found("latest", line)
            return line[0]
        wanted = parse_checkpoint_name(which)
        if wanted is None or wanted not in self.checkpoints():
            raise self._not_found(which, self.checkpoints()[::-1])
        return wanted

    def find_best(self, metric: str, mode: Literal["min", "max"] = "min") -> CheckpointId:
        """The checkpoint of the line with the lowest or highest finite `metric`; the newest of equal ones."""
        best: tuple[float, CheckpointId] | None = None
        line = self.line()
        for item in line:
            try:
                manifest, _ = self.read_manifest(item.name)
            except (CorruptCheckpointError, StorageMissingError) as error:
                # A damaged checkpoint is no candidate; verify reports it, and the next best can be used
                # meanwhile.
                logger.warning("%s is not considered for the best %s: %s", item.name, metric, error)
                continue
            value = manifest.metrics.get(metric, math.nan)
            rank = value if mode == "min" else -value
            if math.isfinite(rank) and (best is None or rank < best[0]):
                best = (rank, item)
        if best is None:
            raise self._not_found(f"with a finite metric {metric!r}", line)
        return best[1]

    def read_manifest(self, name: str, *, uncached: bool = False) -> tuple[Manifest, str]:
        """The manifest in the directory `name`, and the SHA-256 of its bytes. `uncached` asks the medium.

        `StorageMissingError` if there is none; `CorruptCheckpointError` if it is damaged or belongs under
        another name.
        """
        key = f"{name}/{MANIFEST_NAME}"
        place = self._storage.locate(key)
        data = self._storage.read_bytes(key, limit=MANIFEST_BYTES_MAX, uncached=uncached)
        manifest = parse_manifest(data, key=place)
        stated = parse_checkpoint_name(name)
        # A stand-alone checkpoint has a name of its user's choice; a name of ours is a claim that must hold.
        if stated is not None and manifest.id is not None and manifest.id != stated:
            raise CorruptCheckpointError(
                f"{place}: expected the manifest of {name}, found that of {manifest.id.name}. The directory "
                "was renamed or overwritten; restore its name, or load another step.",
                key=place,
                field="step",
                expected=name,
                found=manifest.id.name,
            )
        return manifest, manifest_digest(data)

    def read_index(self, name: str, manifest: Manifest) -> LayoutIndex:
        """The layout index of the checkpoint, after its size and digest agree with the manifest."""
        # Imported here: both need numpy, which commands that only list checkpoints should not wait for.
        from dckpt.format.checksum import digest_bytes
        from dckpt.format.index import parse_index

        entry = manifest.index_entry
        key = entry.key_in(name)
        place = self._storage.locate(key)
        data = self._storage.read_bytes(key, limit=entry.size)
        if len(data) != entry.size or digest_bytes(data) != entry.digest:
            raise CorruptCheckpointError(
                f"{place}: expected {entry.size:,} bytes with digest {entry.digest}, found {len(data):,} "
                f"bytes with digest {digest_bytes(data)}. The layout index is damaged; load an older step.",
                key=place,
                field="digest",
                expected=entry.digest,
                found=digest_bytes(data),
            )
        return parse_index(data, key=place)

    def pins(self) -> set[str]:
        """The names of pinned checkpoints, whether or not they are still there."""
        if not self._storage.exists():
            return set()
        if PINS_DIR not in {entry.name for entry in self._storage.list_dir() if entry.is_dir}:
            return set()
        names = (entry.name for entry in self._storage.list_dir(PINS_DIR))
        return {name for name in names if parse_checkpoint_name(name) is not None}

    def pin(self, name: str) -> None:
        """The checkpoint `name` is never expired from now on, durably. Pinning it twice is fine.

        `CheckpointNotFoundError` if it is not there, or was deleted meanwhile; nothing is then pinned.
        """
        self.resolve(name)
        try:
            self._storage.create(pin_key(name), b"{}\n")
        except KeyExistsError:
            # Possibly pinned by a process that died before its sync.
            self._storage.sync_dir(PINS_DIR)
        # As one who refers to it (FORMAT.md, section 8.3): the pin was shown first, so whoever deletes sees it or is seen here.
        if not hold(self._storage, [name]):
            self.unpin(name)
            raise self._not_found(name, self.checkpoints()[::-1])

    def unpin(self, name: str) -> None:
        """The checkpoint `name` may be expired again. Nothing happens if it is not pinned."""
        self._storage.discard(pin_key(name))

    def _resolve_step(self, step: int) -> CheckpointId:
        traced = self.trace()
        found = [item for item in traced.on_line if item.step == step]
        if found:
            return next((item for item in found if item.micro_step == 0), found[0])
        beside = [item for item in traced.superseded if item.step == step]
        if beside:
            names = ", ".join(item.name for item in beside)
            raise CheckpointNotFoundError(
                f"Run {self._storage.url}: expected step {step} on the current line, found only {names}, "
                "which a later generation superseded. Give the full name to load it all the same."
            )
        raise self._not_found(f"at step {step}", list(traced.on_line))

    def _not_found(self, what: str, existing: list[CheckpointId]) -> CheckpointNotFoundError:
        if not existing:
            others = self.checkpoints()
            shown = f"only superseded ones ({others[-1].name}, ...)" if others else "none at all"
        else:
            shown = ", ".join(item.name for item in existing[:_SHOWN_MAX])
            if len(existing) > _SHOWN_MAX:
                shown += f" and {len(existing) - _SHOWN_MAX} older"
        return CheckpointNotFoundError(
            f"Run {self._storage.url}: expected a checkpoint {what}, found {shown}. `dckpt ls` lists all of them."
        )
