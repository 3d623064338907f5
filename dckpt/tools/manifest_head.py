"""The few facts of a manifest that a listing shows: the seal is verified, the rest is not judged."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from dckpt.errors import CorruptCheckpointError, FormatVersionError, StorageError
from dckpt.format.layout import MANIFEST_NAME, CheckpointId
from dckpt.format.manifest import MANIFEST_BYTES_MAX
from dckpt.format.sealed_json import open_sealed_json
from dckpt.storage.base import Storage
from dckpt.tools.sharing import Copy, StoredFile, find_copies

ReadError: TypeAlias = CorruptCheckpointError | FormatVersionError | StorageError


@dataclass(frozen=True, slots=True)
class ManifestHead:
    """What `dckpt ls` shows of one checkpoint."""

    created_unix_s: float
    size_bytes: int
    world_size: int
    metrics: Mapping[str, float]
    files: tuple[StoredFile, ...]


def read_head(storage: Storage, key: str) -> ManifestHead:
    """Every byte is covered by the seal, so a flipped one is found here too; `dckpt verify` judges the rest.

    A listing of a hundred checkpoints must answer at once, and judging each of a thousand file entries takes
    most of the time of a complete parse.
    """
    record = open_sealed_json(storage.read_bytes(key, limit=MANIFEST_BYTES_MAX), key=key, limit=MANIFEST_BYTES_MAX)
    try:
        return ManifestHead(
            created_unix_s=float(record["created_unix_s"]),
            size_bytes=sum(int(entry["size"]) for entry in record["files"]),
            world_size=int(record["world_size"]),
            metrics={name: _number(value) for name, value in record["metrics"].items()},
            files=tuple(
                StoredFile(
                    str(entry["digest"]), int(entry["size"]), int(entry.get("reused", 0)), entry.get("checkpoint")
                )
                for entry in record["files"]
            ),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        # The seal holds, so this is what a writer meant: a newer format or a broken writer.
        raise CorruptCheckpointError(
            f"{storage.locate(key)}: expected the manifest of a checkpoint, found {type(error).__name__}: "
            f"{error}. Run `dckpt verify` to see what is wrong with it.",
            key=key,
            field=str(error),
        ) from error


def read_heads(storage: Storage, checkpoints: Collection[CheckpointId]) -> dict[str, ManifestHead | ReadError]:
    """The head of each, or why it cannot be read; in the order in which they were committed."""
    found: dict[str, ManifestHead | ReadError] = {}
    for item in sorted(checkpoints, key=lambda item: (item.generation, item.step, item.micro_step)):
        try:
            found[item.name] = read_head(storage, f"{item.name}/{MANIFEST_NAME}")
        except (CorruptCheckpointError, FormatVersionError, StorageError) as error:
            found[item.name] = error
    return found


def copies_of(heads: Mapping[str, ManifestHead | ReadError]) -> dict[str, dict[Copy, int]]:
    """What the readable ones lie on."""
    return find_copies({name: head.files for name, head in heads.items() if isinstance(head, ManifestHead)})


def _number(value: Any) -> float:
    """Metrics as numbers: inf and nan come tagged."""
    return float(value["v"]) if isinstance(value, dict) else float(value)
