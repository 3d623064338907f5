"""The ranks of one load as peers: how they find each other, and how small files reach all of them from one read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from dckpt.blocks.frames import BLOB_BYTES_MAX
from dckpt.blocks.peers import Address, PeerLostError, Peers, PeersEndedError, new_token
from dckpt.format.values import dump_json, load_json
from dckpt.ranks.coordination import Coordination

log = logging.getLogger(__name__)

MESSAGE_BYTES_MAX = 2**20
RELAY_S = 10.0  # a rank that was not told by then reads for itself


class LoadPeers:
    """This rank's sockets for one load. `is_on` once all ranks have met; else every rank reads for itself.

    Call `offer`, exchange it, `meet` with the coordinator's `introduce`. Use it as a context manager.
    """

    def __init__(self, coordination: Coordination, *, is_wanted: bool) -> None:
        self._topology = coordination.topology
        self._peers: Peers | None = None
        self._relay_s = min(RELAY_S, coordination.deadline_s / 4)
        self.is_on = False
        if not is_wanted or self._topology.world_size == 1:
            return
        try:
            self._peers = Peers(self._topology.rank, coordination.hosts)
        except OSError as error:
            log.warning("no sockets for loading, every rank reads for itself: %s", error)

    def __enter__(self) -> LoadPeers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._peers is not None:
            self._peers.close()

    @property
    def peers(self) -> Peers:
        """The sockets; only while `is_on`."""
        assert self._peers is not None
        assert self.is_on
        return self._peers

    # -- meeting -------------------------------------------------------------------------------------------------------

    def offer(self) -> bytes:
        """What this rank tells the coordinator: where it listens, or nothing."""
        return b"" if self._peers is None else dump_json(self._peers.address.to_json())

    @staticmethod
    def introduce(offers: Sequence[bytes]) -> dict[str, Any] | None:
        """On the coordinator: what all ranks are told of each other; None if one of them does not listen. O(ranks)."""
        if len(offers) == 1 or not all(offers):
            return None
        found = [load_json(offer, key="address of a rank", limit=MESSAGE_BYTES_MAX) for offer in offers]
        # Ranks of one host differ by port and socket only.
        hosts = list(dict.fromkeys((hostname, *names) for hostname, names, _, _ in found))
        numbers = {host: number for number, host in enumerate(hosts)}
        ranks = [[numbers[(hostname, *names)], port, local] for hostname, names, port, local in found]
        return {"token": new_token().hex(), "hosts": hosts, "ranks": ranks}

    def meet(self, introduced: dict[str, Any] | None) -> None:
        """Begins to listen to the others, if all ranks can."""
        if introduced is None or self._peers is None:
            return
        hosts = introduced["hosts"]
        addresses = {
            rank: Address.from_json([hosts[host][0], hosts[host][1:], port, local])
            for rank, (host, port, local) in enumerate(introduced["ranks"])
        }
        self._peers.start(bytes.fromhex(introduced["token"]), addresses)
        self.is_on = True

    # -- small files ---------------------------------------------------------------------------------------------------

    def relay(self, number: int, item: int, read: Callable[[], bytes], is_right: Callable[[bytes], bool]) -> bytes:
        """The bytes that the coordinator gets from `read`, sent on along a tree of ranks.

        A rank that does not hear in time, or hears what `is_right` refuses, calls `read` itself. number, item: the same on
        every rank, and new for each call.
        """
        if not self.is_on:
            return read()
        data = b""
        try:
            if not self._topology.is_coordinator:
                data = self.peers.receiving.await_blob(number, item, self._relay_s) or b""
            if not data or not is_right(data):
                data = b""
                data = read()
        finally:
            # An empty message tells the others at once to read for themselves.
            self._pass_on(number, item, data if len(data) <= BLOB_BYTES_MAX else b"")
        return data

    def _pass_on(self, number: int, item: int, data: bytes) -> None:
        for child in children_of(self._topology.rank, self._topology.world_size):
            try:
                self.peers.send_blob(child, number, item, data, within_s=self._relay_s)
            except (PeerLostError, PeersEndedError) as error:
                # It reads for itself; whether it is alive shows where all ranks meet next.
                log.debug("relay to rank %d: %s", child, error)


def children_of(rank: int, world_size: int) -> list[int]:
    """To whom a rank passes on: a binomial tree, whose last and widest steps are between neighbours, mostly on one host."""
    reach = rank & -rank if rank else 1 << (world_size - 1).bit_length()
    found = []
    while reach > 1:
        reach >>= 1
        if rank + reach < world_size:
            found.append(rank + reach)
    return found
