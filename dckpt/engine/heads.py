"""A checkpoint's manifest and layout index: read once, by the coordinator, confirmed, and passed on to all ranks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

from dckpt.blocks.read import ByteTally, read_checked
from dckpt.catalog.catalog import Catalog
from dckpt.engine.load_peers import LoadPeers
from dckpt.errors import CorruptCheckpointError, StorageError, StorageMissingError, to_wire
from dckpt.format.checksum import digest_bytes
from dckpt.format.index import LayoutIndex, parse_index
from dckpt.format.layout import MANIFEST_NAME
from dckpt.format.manifest import MANIFEST_BYTES_MAX, Manifest, manifest_digest, parse_manifest
from dckpt.ranks.topology import Topology
from dckpt.storage.base import Storage

log = logging.getLogger(__name__)
T = TypeVar("T")

VISIBLE_WAIT_S = 30.0  # how long a committed manifest may stay hidden behind a client's cached directory (NFS)


class Heads:
    """Reads the heads of checkpoints for one rank of a job."""

    def __init__(self, storage: Storage, topology: Topology) -> None:
        self._storage = storage
        self._topology = topology

    def announce(self, name: str) -> dict[str, Any]:
        """On the coordinator: the digest of the manifest that all ranks are to load by, or its damage."""
        try:
            _, sha256 = self._read_confirmed(name)
        except CorruptCheckpointError as error:
            return {"corrupt": to_wire(error)}
        except StorageMissingError as error:
            if MANIFEST_NAME in {entry.name for entry in self._storage.list_dir(name)}:
                raise  # Listed, yet it cannot be opened (a stale handle): storage trouble, no proof of damage.
            # The directory is there and holds no manifest: what is not whole is damaged, not absent.
            corrupt = CorruptCheckpointError(
                f"{self._storage.locate(name)}: expected manifest.json, found none. The checkpoint is damaged; use an "
                "older step.",
                key=f"{name}/manifest.json",
                field="manifest",
            )
            log.debug("no manifest in %s", name, exc_info=error)
            return {"corrupt": to_wire(corrupt)}
        return {"sha256": sha256}

    def read_manifest(self, peers: LoadPeers, number: int, name: str, sha256: str) -> Manifest:
        """The manifest that the coordinator announced, as it read it, or read here if it could not be told.

        number: of the candidate. Waits a while for the file to become visible on this node.
        """
        key = f"{name}/{MANIFEST_NAME}"

        def read() -> bytes:
            return self._await_visible(lambda: self._storage.read_bytes(key, limit=MANIFEST_BYTES_MAX))

        data = peers.relay(number, 0, read, lambda found: manifest_digest(found) == sha256)
        if manifest_digest(data) == sha256:
            # A rank with another mount must say so now: later it would take missing shard files for damage.
            self._await_visible(lambda: self._storage.size(key))
            return parse_manifest(data, key=self._storage.locate(key))
        manifest, found = self._read_confirmed(name)
        if found != sha256:
            # Both are whole: no damage, and an older step would not mend it.
            raise StorageError(
                f"{self._storage.locate(name)}/manifest.json: expected sha256 {sha256} as rank 0 reads it, found "
                f"{found} on rank {self._topology.rank}. The ranks see different storage; mount the same one everywhere.",
                key=key,
            )
        return manifest

    def read_index(self, peers: LoadPeers, number: int, name: str, manifest: Manifest, tally: ByteTally) -> LayoutIndex:
        """The layout index that the manifest names, with its digest. `tally` counts what this rank reads of it."""
        entry = manifest.index_entry
        data = peers.relay(
            number,
            1,
            lambda: read_checked(self._storage, name, entry, tally=tally),
            lambda found: len(found) == entry.size and digest_bytes(found) == entry.digest,
        )
        return parse_index(data, key=f"{name}/{entry.path}")

    def _read_confirmed(self, name: str) -> tuple[Manifest, str]:
        """The manifest and its digest; damage counts only when a second read, past the page cache, sees it too."""
        catalog = Catalog(self._storage)
        try:
            return catalog.read_manifest(name)
        except CorruptCheckpointError as error:
            found = catalog.read_manifest(name, uncached=True)
            log.warning("%s A second, uncached read was right: memory or the page cache was not.", error)
            return found

    def _await_visible(self, look: Callable[[], T]) -> T:
        """The result of `look`; on other ranks than the coordinator a file may be missing for a while."""
        limit = time.monotonic() + VISIBLE_WAIT_S
        pause = 0.05
        while True:
            try:
                return look()
            except StorageMissingError:
                if self._topology.is_coordinator or time.monotonic() > limit:
                    raise
                time.sleep(pause)
                pause = min(2 * pause, 2.0)
