"""Where this process stands in the run's history: which generation it saw, and what its first commit descends from."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable

from dckpt import failpoint
from dckpt.catalog.catalog import Catalog
from dckpt.catalog.generations import create_generation, ensure_not_fenced, read_generation
from dckpt.errors import ConfigError
from dckpt.format.generation import Generation, Parent, Reason
from dckpt.format.layout import CheckpointId
from dckpt.storage.base import Storage


class Lineage:
    """The coordinator's record of the run's chain. Other ranks keep none: they are told the generation with each save.

    A generation is created just before the first commit after a start, a resume or a load, and only if nobody else
    created one since this process looked: that is the fence against two jobs on one run.
    """

    def __init__(self, storage: Storage, clock: Callable[[], float] = time.time) -> None:
        self._storage = storage
        self._clock = clock
        self._observed: int | None = None
        self._parent: Parent | CheckpointId | None = None
        self._reason: Reason = "start"
        self._run_id = uuid.uuid4().hex
        self._unfinished: Generation | None = None
        self.generation: int | None = None

    @property
    def run_id(self) -> str:
        """128 random bits that name the run; kept over all its generations."""
        return self._run_id

    def adopt(
        self, observed: int, parent: CheckpointId, manifest_sha256: str, run_id: str | None, reason: Reason
    ) -> None:
        """State was loaded from `parent`: what is committed from now on descends from it."""
        self._observed = observed
        self._parent = Parent(
            checkpoint=parent.name,
            step=parent.step,
            micro_step=parent.micro_step,
            generation=parent.generation,
            manifest_sha256=manifest_sha256,
        )
        self._reason = reason
        self._run_id = run_id or self._run_id
        self._unfinished = None
        self.generation = None

    def begin_leg(self, end: CheckpointId) -> None:
        """The next commit begins a new leg. `end`: the checkpoint that this process loaded or committed last."""
        self._reason = "leg"
        if self.generation is not None:
            # Committed by this process: the newest generation is its own, and the parent's digest is read when it is needed.
            self._observed, self._parent, self._unfinished = self.generation, end, None
            self.generation = None

    def start_fresh(self, observed: int) -> None:
        """Nothing to resume was found: the first commit starts the run."""
        self._observed = observed

    def ensure_generation(self, world_size: int) -> int:
        """The number under which to commit now; creates the generation if this is the first commit of it.

        Raises `ConfigError` if the run has checkpoints and nothing was resumed, `CommitConflictError` if another job
        took the run over.
        """
        if self.generation is not None:
            ensure_not_fenced(self._storage, self.generation)
            return self.generation
        newest = Catalog(self._storage).newest_generation()
        if self._observed is None:
            self._ensure_empty(newest)
            self._observed = newest
        failpoint.reach("before_generation")
        record = self._next_record(self._observed + 1, world_size)
        create_generation(self._storage, record, expected_newest=self._observed)
        failpoint.reach("after_generation")
        self._unfinished = None
        self.generation = record.number
        return record.number

    def _next_record(self, number: int, world_size: int) -> Generation:
        """The record to create; the same one again after a create whose answer was lost: its nonce proves it ours."""
        if self._unfinished is not None and self._unfinished.number == number:
            return self._unfinished
        if self._parent is None and self._observed:
            # An earlier start died before its first commit: the same run, and `verify` looks for a single id.
            self._run_id = read_generation(self._storage, self._observed).run_id
        if isinstance(self._parent, CheckpointId):
            self._parent = self._pinned_down(self._parent)
        self._unfinished = Generation(
            number=number,
            run_id=self._run_id,
            parent=self._parent,
            reason=self._reason,
            world_size=world_size,
            created_unix_s=self._clock(),
            nonce=uuid.uuid4().hex,
        )
        return self._unfinished

    def _pinned_down(self, parent: CheckpointId) -> Parent:
        _, sha256 = Catalog(self._storage).read_manifest(parent.name)
        return Parent(parent.name, parent.step, parent.micro_step, parent.generation, sha256)

    def _ensure_empty(self, newest: int) -> None:
        found = Catalog(self._storage).checkpoints()
        if newest == 0 and not found:
            return
        latest = max(found).name if found else "none"
        raise ConfigError(
            f"Run {self._storage.locate('')}: expected an empty root for a new run, found {len(found)} "
            f"checkpoint{'s' * (len(found) != 1)} (newest "
            f"{latest}) of {newest} generation{'s' * (newest > 1)}. "
            "Saving here without loading would start a second history: call "
            "checkpointer.resume(state) first, or choose another root."
        )
