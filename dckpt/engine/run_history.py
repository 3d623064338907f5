"""The committed steps of a run, and pins on them: what needs the storage and no other rank."""

from __future__ import annotations

from dckpt.catalog.catalog import Catalog
from dckpt.storage.base import Storage


class RunHistory:
    """What a `Checkpointer` says of the run's past."""

    _storage: Storage

    def steps(self) -> list[int]:
        """Steps of the current line that are committed, ascending. Reads names only."""
        return sorted({item.step for item in Catalog(self._storage).line()})

    def pin(self, step: int | str = "latest") -> str:
        """Retention never expires the pinned checkpoint; returns its name. Any one rank may call it."""
        catalog = Catalog(self._storage)
        name = catalog.resolve(step).name
        catalog.pin(name)
        return name

    def unpin(self, step: int | str) -> str:
        """Takes the pin away; returns the checkpoint's name."""
        catalog = Catalog(self._storage)
        name = catalog.resolve(step).name
        catalog.unpin(name)
        return name
