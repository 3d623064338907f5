"""The records of one save on its way through the engine."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dckpt.blocks.source import FileSource
from dckpt.catalog.transaction import Transaction
from dckpt.engine.agreement import Known
from dckpt.engine.deferred import DeferredCopies
from dckpt.engine.pending import PendingSave
from dckpt.errors import ConfigError
from dckpt.format.manifest import FileEntry, Manifest
from dckpt.format.shard_file import ShardFilePlan
from dckpt.planning.indexing import RankReport
from dckpt.ranks.session import Session


@dataclass
class SaveJob:
    """What the writing thread needs. `files` refer to live state only while the caller of a blocking save waits.

    deferred: what is still being copied into the images behind the training. may_refer: the checkpoints in which unchanged
    files may stay, where the storage has no links. entries: the files of this rank, on the coordinator in the end of all.
    """

    pending: PendingSave
    session: Session
    checkpoint: str
    attempt: str
    files: list[tuple[ShardFilePlan, FileSource]]
    started_s: float
    transaction: Transaction | None = None  # the coordinator's
    manifest: Callable[[tuple[FileEntry, ...]], Manifest] | None = None
    known: Known | None = None  # the coordinator's
    report: RankReport | None = None  # if the coordinator asked for it
    deferred: DeferredCopies | None = None
    may_refer: frozenset[str] = frozenset()
    entries: list[FileEntry] = field(default_factory=list)
    bytes_done: int = 0
    storage_busy_since_s: float | None = (
        None  # None while it waits for other ranks: those waits have their own deadlines
    )
    claimed: threading.Lock = field(default_factory=threading.Lock)

    def note_storage(self) -> None:
        """The storage made progress, or is asked for something from now on."""
        self.storage_busy_since_s = time.monotonic()

    @contextlib.contextmanager
    def in_storage(self) -> Iterator[None]:
        """While the body runs, time without progress is held against the storage."""
        self.note_storage()
        try:
            yield
        finally:
            self.storage_busy_since_s = None

    def is_stuck(self, deadline_s: float) -> bool:
        """True if one call of the storage has not come back for `deadline_s`."""
        since = self.storage_busy_since_s
        return since is not None and time.monotonic() - since > deadline_s

    def claim(self) -> bool:
        """True for the first caller: either the saving thread finishes the job or an interrupted `start` ends it."""
        return self.claimed.acquire(blocking=False)


@dataclass
class Beginning:
    """How far `start` came: what is to be undone when it fails."""

    phase: str = "plan"
    session: Session | None = None
    transaction: Transaction | None = None
    manifest: Callable[[tuple[FileEntry, ...]], Manifest] | None = None
    known: Known | None = None
    deferred: DeferredCopies | None = None
    job: SaveJob | None = None


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """What the caller of `save` asked for."""

    step: int
    micro_step: int
    metrics: Mapping[str, float]
    refusal: ConfigError | None = None  # why this rank cannot save; all ranks raise it together
    failure: Exception | None = None  # what went wrong on this rank before: all ranks have a failed save
    stores_gradients: bool = False  # in the middle of an accumulation
    facts: Mapping[str, Any] = field(default_factory=dict)  # what the manifest says besides the facts of the state
    is_blocking: bool = False  # the caller waits for the outcome: the state needs no image
