"""Where a resharded checkpoint goes: a new run, a new generation of its source's run, or a stand-alone directory."""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import dataclass, replace

from dckpt.catalog.catalog import Catalog
from dckpt.catalog.generations import read_generation
from dckpt.catalog.line import ONE_CHECKPOINT, trace_line
from dckpt.dcp.location import split_checkpoint_url
from dckpt.errors import CommitConflictError, ConfigError
from dckpt.format.generation import Generation, Parent, Reason
from dckpt.format.layout import (
    GENERATIONS_DIR,
    MANIFEST_NAME,
    CheckpointId,
    checkpoint_name,
    is_trash_name,
    parse_checkpoint_name,
    parse_staging_name,
)
from dckpt.format.manifest import Manifest
from dckpt.storage.base import TEMPORARY_PREFIX, Storage
from dckpt.storage.opening import open_storage, split_url


@dataclass(frozen=True, slots=True)
class Destination:
    """The name under which the new checkpoint is committed, and the generation that it begins.

    generation: 0 for a stand-alone checkpoint. observed: the newest generation that was there; one that comes after it means
    that another job writes here. superseded: checkpoints that the new generation takes off the line.
    """

    storage: Storage
    checkpoint: str
    generation: int = 0
    observed: int = 0
    run_id: str | None = None
    parent: Parent | None = None
    superseded: tuple[str, ...] = ()
    is_new_run: bool = False

    def record(self, world_size: int, reason: Reason = "reshard") -> Generation:
        """The generation record to create just before the commit."""
        assert self.run_id is not None, "a stand-alone checkpoint has no generation"
        return Generation(
            number=self.generation,
            run_id=self.run_id,
            parent=self.parent,
            reason=reason,
            world_size=world_size,
            created_unix_s=time.time(),
            nonce=uuid.uuid4().hex,
        )


def open_destination(text: str, manifest: Manifest) -> Storage:
    """The storage in which attempts at `text` are staged; touches nothing."""
    if manifest.generation == 0:
        return open_storage(split_checkpoint_url(text)[0])
    return open_storage(text)


def choose_destination(text: str, manifest: Manifest, sha256: str, run: Storage | None) -> Destination:
    """What writing the checkpoint `manifest` to `text` means. `run`: the run that it lies in, None outside of one.

    An empty or missing place becomes a new run; the source's own run gets a new generation that descends from it. Anything
    else that is there is refused: `ConfigError`, or `CommitConflictError` for a stand-alone checkpoint's taken name.
    """
    if manifest.generation == 0:
        return _alone(text)
    storage = open_storage(text)
    step = manifest.step
    assert step is not None, "parse_manifest refuses a checkpoint of a run without a step"
    if run is not None and os.path.realpath(run.url) == os.path.realpath(storage.url):
        return _same_run(storage, manifest, sha256)
    _ensure_free(storage)
    observed = Catalog(storage).newest_generation()
    run_id = _begun_run(storage, observed) if observed else uuid.uuid4().hex
    name = checkpoint_name(step, observed + 1, manifest.micro_step)
    return Destination(storage, name, observed + 1, observed, run_id, is_new_run=True)


def choose_import(text: str, step: int, run_id: str) -> Destination:
    """The first checkpoint of a run at an empty or missing place; anything else that is there is refused with `ConfigError`."""
    storage = open_storage(text)
    _ensure_free(storage)
    observed = Catalog(storage).newest_generation()
    if observed:
        run_id = _begun_run(storage, observed)
    return Destination(storage, checkpoint_name(step, observed + 1), observed + 1, observed, run_id, is_new_run=True)


def _alone(text: str) -> Destination:
    root, name = split_checkpoint_url(text)
    storage = open_storage(root)
    if parse_checkpoint_name(name) is not None:
        raise ConfigError(
            f"DST {text}: expected a name of your own for a stand-alone checkpoint, found the name of a run's checkpoint. Choose "
            "another one."
        )
    if storage.exists() and name in {entry.name for entry in storage.list_dir()}:
        raise CommitConflictError(
            f"DST {storage.locate(name)}: expected a free name for a stand-alone checkpoint, found something there. Nothing is "
            "overwritten: choose another name, or remove it first."
        )
    return Destination(storage, name)


def _same_run(storage: Storage, manifest: Manifest, sha256: str) -> Destination:
    own = manifest.id
    assert own is not None
    assert manifest.run_id is not None
    catalog = Catalog(storage)
    observed = catalog.newest_generation()
    number = observed + 1
    found = Destination(
        storage,
        checkpoint_name(own.step, number, own.micro_step),
        number,
        observed,
        manifest.run_id,
        parent=Parent(own.name, own.step, own.micro_step, own.generation, sha256),
    )
    record = found.record(manifest.world_size)
    after = trace_line(
        [*catalog.checkpoints(), CheckpointId(own.step, own.micro_step, number)],
        number,
        lambda wanted: record if wanted == number else read_generation(storage, wanted),
    )
    superseded = tuple(item.name for item in catalog.line() if item not in after.on_line)
    return replace(found, superseded=superseded)


def _ensure_free(storage: Storage) -> None:
    """Nothing is there but what a reshard that was killed left behind."""
    name = split_url(storage.url)[1]
    if parse_checkpoint_name(name) is not None or name == GENERATIONS_DIR:
        raise ConfigError(
            f"DST {storage.url}: expected the directory of a run, found a part of one. Choose another place."
        )
    if not storage.exists():
        return
    entries = storage.list_dir()
    if any(entry.is_dir and parse_checkpoint_name(entry.name) is not None for entry in entries):
        raise ConfigError(
            f"DST {storage.url}: expected an empty or missing directory, or the run of SRC, found another run. Choose another "
            "place."
        )
    foreign = [entry.name for entry in entries if not (entry.name == GENERATIONS_DIR or _is_leftover(entry.name))]
    if foreign:
        found = "a checkpoint" if MANIFEST_NAME in foreign else foreign[0]
        raise ConfigError(
            f"DST {storage.url}: expected an empty or missing directory, or the run of SRC, found {found} in it. Choose another "
            "place."
        )


def _begun_run(storage: Storage, observed: int) -> str:
    """The id of a run that a reshard, repair or import began and did not commit to: it died after its generation record."""
    record = read_generation(storage, observed)
    if record.reason not in ONE_CHECKPOINT or record.parent is not None:
        raise ConfigError(
            f"DST {storage.url}: expected an empty or missing directory, or the run of SRC, found another run (generation "
            f"{observed}: {record.reason}). Choose another place."
        )
    return record.run_id


def _is_leftover(name: str) -> bool:
    return parse_staging_name(name) is not None or is_trash_name(name) or name.startswith(TEMPORARY_PREFIX)
