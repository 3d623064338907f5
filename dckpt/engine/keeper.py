"""Applies the retention policy after each commit. On the coordinator, in the saving thread."""

from __future__ import annotations

import logging
from dataclasses import replace

from dckpt.catalog.catalog import Catalog
from dckpt.catalog.prune import expire
from dckpt.catalog.references import References, plan_deletion
from dckpt.catalog.retention import Candidate, Retention, plan_retention
from dckpt.errors import CommitConflictError, CorruptCheckpointError, StorageError
from dckpt.format.layout import parse_checkpoint_name
from dckpt.storage.base import Storage

log = logging.getLogger(__name__)


class Keeper:
    """Keeps what the policy keeps. A failure to delete is reported and never a failure of the save that went before."""

    def __init__(self, storage: Storage, policy: Retention) -> None:
        self._storage = storage
        self._policy = policy
        self._metrics: dict[str, tuple[dict[str, float], float]] = {}
        self._references = References(storage)
        self._told: set[str] = set()

    def apply(self, committed: str) -> int:
        """After the commit of `committed`: expires what the policy does not keep; returns how many of the line remain."""
        try:
            return self._apply(committed)
        except (StorageError, CommitConflictError, CorruptCheckpointError) as error:
            log.warning("retention was not applied: %s Checkpoints pile up until it can be.", error)
            return 0

    def _apply(self, committed: str) -> int:
        catalog = Catalog(self._storage)
        traced = catalog.trace()
        line = traced.on_line
        if self._policy == Retention():
            return len(line)
        pins = catalog.pins()
        candidates = []
        for item in line:
            metrics, created = self._facts(catalog, item.name)
            candidates.append(
                Candidate(
                    id=item,
                    metrics=metrics,
                    is_pinned=item.name in pins,
                    created_unix_s=created,
                    is_leg_end=item in traced.leg_ends,
                )
            )
        best = self._policy.best
        if best is not None and not any(best.metric in candidate.metrics for candidate in candidates):
            log.warning(
                "no checkpoint has the metric %r that Retention(best=) asks for; pass metrics= to step()", best.metric
            )
            if replace(self._policy, best=None) == Retention():
                return len(line)
        plan = plan_retention(candidates, self._policy)
        return len(line) - self._expire([item.name for item in plan.expire], committed)

    def _expire(self, names: list[str], committed: str) -> int:
        """Deletes what nobody refers to; returns how many went."""
        self._references.forget(committed)
        if not names:
            return 0
        free, held = plan_deletion(names, self._references.read())
        for name in sorted(held.keys() - self._told):
            self._told.add(name)
            log.info("%s stays for as long as files of %s lie in it", name, ", ".join(held[name]))
        own = parse_checkpoint_name(committed)
        # A zombie must not delete what the job that replaced it may resume from.
        generation = own.generation if own is not None else None
        return len(expire(self._storage, free, generation=generation, references=self._references))

    def _facts(self, catalog: Catalog, name: str) -> tuple[dict[str, float], float]:
        if name not in self._metrics:
            try:
                manifest, _ = catalog.read_manifest(name)
            except (CorruptCheckpointError, StorageError) as error:
                # A damaged one takes part without metrics: `last` and `every` still count it, `best` never prefers it.
                log.warning("%s cannot be read for retention: %s", name, error)
                return {}, 0.0
            self._metrics[name] = (dict(manifest.metrics), manifest.created_unix_s)
        return self._metrics[name]
