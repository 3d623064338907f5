"""What `RUN`, `RUN@STEP` and a checkpoint directory on a command line mean."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dckpt.catalog.catalog import Catalog
from dckpt.errors import CheckpointNotFoundError
from dckpt.format.layout import MANIFEST_NAME, parse_checkpoint_name
from dckpt.storage.base import Entry, Storage
from dckpt.storage.opening import open_storage, split_url

_WITH_STEP = re.compile(r"(?P<place>.+)@(?P<step>latest|\d+|step-[0-9a-z.-]+)")


@dataclass(frozen=True, slots=True)
class Target:
    """A place in a storage. `checkpoint` is the name of one checkpoint's directory, None for a whole run."""

    storage: Storage
    is_run: bool
    """False for a checkpoint that stands alone: it has no generations and no line."""
    checkpoint: str | None


def split_step(text: str) -> tuple[str, str | None]:
    """The place and the step of `RUN@STEP`; an `@` inside a path stays there."""
    found = _WITH_STEP.fullmatch(text)
    return (found["place"], found["step"]) if found else (text, None)


def open_run(text: str) -> Storage:
    """The run at `text`; an error unless a generation or a checkpoint is there."""
    storage = open_storage(text)
    if not _is_run(_list_root(storage)):
        raise CheckpointNotFoundError(
            f"Run {storage.url}: expected generations/ or step-* directories, found none. "
            "Check the path: a run is the directory that was given to Checkpointer."
        )
    return storage


def open_target(text: str) -> Target:
    """`RUN`, `RUN@STEP` or a checkpoint directory. A directory that has the whole text as its name wins."""
    place, step = split_step(text)
    if step is not None and not open_storage(text).exists():
        storage = open_run(place)
        choice: str | int = int(step) if step.isdigit() else step
        return Target(storage, is_run=True, checkpoint=Catalog(storage).resolve(choice).name)
    storage = open_storage(text)
    entries = _list_root(storage)
    # By its name too: a checkpoint that lost its manifest must be reported as such, not as a mistyped path.
    has_name = parse_checkpoint_name(split_url(storage.url)[1]) is not None
    if has_name or any(entry.name == MANIFEST_NAME for entry in entries):
        return _open_checkpoint(storage)
    if _is_run(entries):
        return Target(storage, is_run=True, checkpoint=None)
    raise CheckpointNotFoundError(
        f"{storage.url}: expected a run (generations/ or step-* directories) or a checkpoint "
        f"({MANIFEST_NAME}), found neither. Check the path."
    )


def _open_checkpoint(inside: Storage) -> Target:
    """Keys of a checkpoint begin with its name, so its parent directory is the storage, run or not."""
    parent, name = split_url(inside.url)
    storage = open_storage(parent or "/")
    is_run = parse_checkpoint_name(name) is not None and _is_run(_list_root(storage))
    return Target(storage, is_run=is_run, checkpoint=name)


def _list_root(storage: Storage) -> list[Entry]:
    if not storage.exists():
        raise CheckpointNotFoundError(f"{storage.url}: expected a directory, found nothing there. Check the path.")
    return storage.list_dir()


def _is_run(entries: list[Entry]) -> bool:
    return any(
        entry.is_dir and (entry.name == "generations" or parse_checkpoint_name(entry.name) is not None)
        for entry in entries
    )
