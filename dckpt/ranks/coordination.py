"""The store that the ranks of one job share, and what is opened on it.

Rank 0 serves; every rank, rank 0 included, is its client. Nothing here uses a collective or a process group, so it may
run on any thread and one time-out breaks nothing that comes later. A single process uses a dictionary instead.
"""

from __future__ import annotations

import json
import logging
import resource
import secrets
import socket
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch.distributed as dist

from dckpt.errors import ConfigError, CoordinationTimeoutError, PeerFailedError
from dckpt.ranks import messages
from dckpt.ranks.client import (
    PART_BYTES,
    ContactLostError,
    Link,
    LocalLink,
    NoAnswerError,
    RawStore,
    StoreLink,
    poll,
)
from dckpt.ranks.hosts import own_hosts
from dckpt.ranks.session import Session
from dckpt.ranks.topology import Topology

T = TypeVar("T")
logger = logging.getLogger(__name__)
_dist: Any = dist  # the store classes are missing from its type stubs

LOCALHOST = "127.0.0.1"
CONNECT_S = 10.0  # at most, for one attempt at one address
CONNECTIONS_A_RANK = 4
FILES_BESIDE = 512  # what the training process may have open beside the ranks' connections
SESSIONS_KEPT = 2  # of each kind, with all their keys
SESSIONS_REMEMBERED = 16  # of each kind, with their verdict and conclusion, for ranks that come much too late
IDS_REMEMBERED = 1024

_TOKEN_KEY = "token"  # tells our server from another one at a stale address; it guards nothing


class Coordination:
    """This rank's end of the store. Made by `connect` on every rank; `close` it on every rank."""

    def __init__(
        self,
        link: Link,
        topology: Topology,
        deadline_s: float,
        server: Any = None,
        hosts: Sequence[str] = (),
    ) -> None:
        self.topology = topology
        self.hosts = tuple(hosts)
        """Under which names other hosts can reach this rank's, the best first."""
        self.deadline_s = deadline_s
        self._link = link
        self._deadline_s = deadline_s
        self._server = server
        self._lock = threading.Lock()
        self._uses: OrderedDict[str, int] = OrderedDict()
        self._recent: dict[str, deque[Session]] = {}
        self._ended: dict[str, deque[list[str]]] = {}
        self._is_closed = False

    @classmethod
    def connect(
        cls,
        topology: Topology,
        *,
        scope: str,
        deadline_s: float,
        group: dist.ProcessGroup | None = None,
    ) -> Coordination:
        """Called on every rank of `group`, with the same `scope` and, for one scope, in the same order.

        The address of rank 0's server travels through the default process group's store. Raises
        `CoordinationTimeoutError` when rank 0 did not come within `deadline_s`.
        """
        if not deadline_s > 0:
            raise ConfigError(f"deadline_s is {deadline_s}: expected a positive number of seconds")
        if topology.world_size == 1:
            return cls(LocalLink(), topology, deadline_s)
        rendezvous = _Rendezvous(default_store(), topology, scope, group, deadline_s)
        try:
            if not topology.is_coordinator:
                link = rendezvous.join()
                _warm_up(link)
                return cls(link, topology, deadline_s, hosts=own_hosts(rendezvous.server_host))
            _allow_connections(topology.world_size)
            server = rendezvous.serve()
            link = StoreLink(lambda: _client(LOCALHOST, server.port, deadline_s))
            _warm_up(link)
            hosts = own_hosts(rendezvous.server_host, is_named=True)
            return cls(link, topology, deadline_s, server, hosts)
        finally:
            rendezvous.close()

    def session(
        self,
        save_id: str,
        *,
        what: str,
        call: str,
        deadline_s: float | None = None,
        total_s: float | None = None,
        consequence: str | None = None,
    ) -> Session:
        """Opens the agreement `save_id`; every rank opens it with the same id.

        `what` begins every message ("save of step 100"); its first word is the session's kind. `call` is what the user
        must call on every rank ("save(step=100)"). `consequence` ends every message; the default says that the save is
        abandoned and the previous checkpoint stands, or for another kind that it is abandoned.

        An id may be used again; each use is a session of its own. Sessions of different kinds may run at the same time
        on different threads. Those of one kind follow each other, and all but the last two lose their keys.
        """
        kind = what.split(" ", 1)[0].split("(", 1)[0]
        if consequence is None:
            stands = "; the previous checkpoint stands" if kind == "save" else ""
            consequence = f"The {kind} is abandoned{stands}."
        with self._lock:
            use = self._uses.pop(save_id, 0) + 1
            self._uses[save_id] = use
            if len(self._uses) > IDS_REMEMBERED:
                self._uses.popitem(last=False)
        session = Session(
            self._link,
            self.topology,
            prefix=f"session/{save_id}#{use}",
            what=what,
            call=call,
            deadline_s=self._deadline_s if deadline_s is None else deadline_s,
            total_s=total_s,
            consequence=consequence,
        )
        self._forget_old(kind, session)
        return session

    def _forget_old(self, kind: str, session: Session) -> None:
        with self._lock:
            recent = self._recent.setdefault(kind, deque())
            ended = self._ended.setdefault(kind, deque())
            recent.append(session)
            keys: list[str] = []
            # A session that is still open keeps its keys, however many began after it: its ranks would wait for ghosts.
            while len(recent) > SESSIONS_KEPT and recent[0].is_closed:
                old = recent.popleft()
                keys += old.take_written()
                ended.append(old.lasting_keys())
            while len(ended) > SESSIONS_REMEMBERED:
                keys += ended.popleft()
        if keys:
            self._link.post(lambda store: [store.delete_key(key) for key in keys])

    # -- single keys, for signals between saves --------------------------------------------------------------------

    def publish(self, key: str, value: bytes) -> None:
        """Sets `key` for every rank to read; a later value replaces it. At most 1 MiB."""
        if len(value) > PART_BYTES:
            raise ConfigError(
                f"key {key}: {len(value):,} bytes, expected at most {PART_BYTES:,}; use a session for more"
            )

        def publish(store: RawStore) -> None:
            store.set(f"key/{key}", value)
            # A store's `set` does not wait for the server; a question on the same connection does.
            store.check([f"key/{key}"])

        self._call(f"publishing {key}", publish)

    def read(self, key: str) -> bytes | None:
        """The value of `key`, None while nobody has published it. Does not wait for it."""
        return self._call(f"reading {key}", lambda store: _get(store, f"key/{key}"))

    def await_key(self, key: str, deadline_s: float, waiting_for: str, ranks: Sequence[int]) -> bytes:
        """The value of `key` once it is published.

        After `deadline_s` a `CoordinationTimeoutError` that reads "<waiting_for>: ranks 1-3 gave no answer within .."
        """
        found: list[bytes] = []

        def look() -> bool:
            value = self.read(key)
            if value is not None:
                found.append(value)
            return value is not None

        if not poll(look, deadline_s):
            raise CoordinationTimeoutError(
                f"{waiting_for}: {messages.format_ranks(ranks)} gave no answer within {deadline_s:g} s.",
                ranks=sorted(ranks),
                phase=waiting_for,
            )
        return found[0]

    def delete(self, key: str) -> None:
        """Deletes a published key, some time soon."""
        self._link.post(lambda store: store.delete_key(f"key/{key}"))

    def _call(self, doing: str, operation: Callable[[RawStore], T]) -> T:
        try:
            return self._link.call(operation, self._deadline_s)
        except ContactLostError:
            raise PeerFailedError(
                f"{doing}: the coordinator (rank 0) cannot be reached. Its process ended, or the network failed.",
                rank=0,
                phase=doing,
                cause="ConnectionLost",
            ) from None
        except NoAnswerError:
            raise CoordinationTimeoutError(
                f"{doing}: the coordinator (rank 0) gave no sign for {self._deadline_s:g} s.",
                ranks=[0],
                phase=doing,
            ) from None

    # -- the end -------------------------------------------------------------------------------------------------

    def close(self, linger_s: float = 5.0) -> None:
        """Says goodbye; rank 0 serves until every rank has, at most `linger_s`. Idempotent, never raises."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        world = self.topology.world_size
        end = time.monotonic() + linger_s
        try:
            self._link.call(lambda store: store.add("byes", 1), linger_s)
            if self.topology.is_coordinator:
                everyone = poll(
                    lambda: self._link.call(lambda store: store.add("byes", 0), linger_s) >= world,
                    end - time.monotonic(),
                )
                if not everyone:
                    logger.debug("some ranks did not say goodbye within %g s", linger_s)
        except (ContactLostError, NoAnswerError) as error:
            logger.debug("rank %d closes without goodbye: %s", self.topology.rank, error)
        self._link.close(max(0.1, min(1.0, end - time.monotonic())))
        self._server = None


class _Rendezvous:
    """How the ranks find rank 0's server: its address under one key in the default process group's store."""

    def __init__(
        self, store: RawStore, topology: Topology, scope: str, group: dist.ProcessGroup | None, deadline_s: float
    ) -> None:
        self._store = store
        self._link = StoreLink(lambda: store)
        self._scope, self._group, self._deadline_s = scope, group, deadline_s
        self.server_host: str | None = None
        """Where rank 0's server was found, or on rank 0 where the others look for it."""
        self._prefix = f"dckpt/{scope}" if group is None else f"dckpt/{scope}/{group.group_name}"
        # Counted in the store itself: a process that joins a new process group starts anew with everyone else.
        self._uses_key = f"{self._prefix}/uses/{topology.rank}"
        self._key = f"{self._prefix}/{self._ask(lambda found: found.add(self._uses_key, 1))}/address"

    def serve(self) -> Any:
        """Rank 0: starts the server and publishes where it is; a failure is published too."""
        token = secrets.token_hex(16)
        try:
            server = _dist.TCPStore(
                LOCALHOST,
                0,
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=max(CONNECT_S, self._deadline_s)),
            )
            server.set(_TOKEN_KEY, token)
        except RuntimeError as error:
            reason = messages.sentence(error)
            self._publish({"failed": reason})
            raise ConfigError(f"Checkpointer for {self._scope}: rank 0 could not start its store: {reason}") from error
        self.server_host = self._store_host()
        hosts = [self.server_host, LOCALHOST, socket.gethostname()]
        self._publish(
            {
                "hosts": [host for host in hosts if host],
                "hostname": socket.gethostname(),
                "port": server.port,
                "token": token,
            }
        )
        return server

    def _publish(self, record: dict[str, Any]) -> None:
        text = json.dumps(record)
        self._ask(lambda store: store.set(self._key, text))

    def _ask(self, operation: Callable[[RawStore], T]) -> T:
        try:
            return self._link.call(operation, self._deadline_s)
        except (ContactLostError, NoAnswerError) as error:
            raise PeerFailedError(
                f"Checkpointer for {self._scope}: the process group's store does not answer: {error}. "
                "Its process (rank 0 or the launcher) ended, or the network failed.",
                rank=0,
                phase="connect",
                cause="ConnectionLost",
            ) from None

    def close(self) -> None:
        """The default store is needed no more; its client stays the process group's."""
        self._link.close()

    def join(self) -> StoreLink:
        """Another rank: waits for the address and connects to the first host that answers with the right token."""
        end = time.monotonic() + self._deadline_s
        record = self._await_address()
        if "failed" in record:
            raise PeerFailedError(
                f"Checkpointer for {self._scope}: rank 0 could not start its store: {record['failed']}",
                rank=0,
                phase="connect",
                cause="ConfigError",
            )
        port, token = int(record["port"]), str(record["token"])
        is_same_node = record["hostname"] == socket.gethostname()
        hosts = [host for host in dict.fromkeys(record["hosts"]) if is_same_node or host != LOCALHOST]
        refusals: list[str] = []
        for number, host in enumerate(hosts):
            share_s = max(0.5, (end - time.monotonic()) / (len(hosts) - number))
            link = _try_host(host, port, token, self._deadline_s, min(share_s, CONNECT_S), refusals)
            if link is not None:
                self.server_host = host
                return link
        raise PeerFailedError(
            f"Checkpointer for {self._scope}: the coordinator (rank 0) cannot be reached at port {port} of "
            f"{'; '.join(refusals)}. Every node must be able to connect to rank 0's node.",
            rank=0,
            phase="connect",
            cause="ConnectionLost",
        )

    def _await_address(self) -> dict[str, Any]:
        found: list[bytes] = []

        def look() -> bool:
            value = self._ask(lambda store: _get(store, self._key))
            found.extend([] if value is None else [value])
            return bool(found)

        if not poll(look, self._deadline_s, slowest_s=0.1):
            # Rank 0 has not used this number: a later attempt meets it there.
            self._ask(lambda store: store.add(self._uses_key, -1))
            raise CoordinationTimeoutError(
                f"Checkpointer for {self._scope}: rank 0 did not create a Checkpointer for it within "
                f"{self._deadline_s:g} s; every rank must create it.",
                ranks=[0],
                phase="connect",
            )
        record: dict[str, Any] = json.loads(found[0])
        return record

    def _store_host(self) -> str | None:
        """Where the default store's server runs: rank 0's node, when the group's rank 0 is the job's rank 0."""
        if self._group is not None and dist.get_global_rank(self._group, 0) != 0:
            return None
        store: Any = self._store
        while isinstance(store, _dist.PrefixStore):
            store = store.underlying_store
        return str(store.host) if isinstance(store, _dist.TCPStore) else None


def _warm_up(link: StoreLink) -> None:
    try:
        link.warm_up(CONNECT_S)
    except (ContactLostError, NoAnswerError) as error:
        # The first session says so in its own words.
        logger.debug("a connection to the coordinator could not be opened in advance: %s", error)


def _allow_connections(world_size: int) -> None:
    """Raises this process's soft limit of open files where the ranks' connections would exceed it."""
    needed = FILES_BESIDE + CONNECTIONS_A_RANK * world_size
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < needed:
        logger.warning(
            "rank 0 may hold %d open files and needs about %d for %d ranks: raise the hard limit (ulimit -Hn)",
            allowed,
            needed,
            world_size,
        )


def _try_host(
    host: str, port: int, token: str, deadline_s: float, within_s: float, refusals: list[str]
) -> StoreLink | None:
    link = StoreLink(lambda: _client(host, port, deadline_s))
    try:
        if link.call(lambda store: _get(store, _TOKEN_KEY), within_s) == token.encode("ascii"):
            return link
        refusals.append(f"{host} (another server answers there)")
    except (ContactLostError, NoAnswerError) as error:
        refusals.append(f"{host} ({error})")
    link.close(0.0)
    return None


def _client(host: str, port: int, deadline_s: float) -> RawStore:
    timeout = timedelta(seconds=min(CONNECT_S, max(1.0, deadline_s)))
    store = _dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    return cast(RawStore, store)


def _get(store: RawStore, key: str) -> bytes | None:
    return store.get(key) if store.check([key]) else None


def default_store() -> RawStore:
    """The store of the default process group; `ConfigError` if there is none."""
    try:
        return cast(RawStore, _dist.distributed_c10d._get_default_store())
    except (AttributeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"the default process group's store is not available ({messages.sentence(error)}): call "
            "torch.distributed.init_process_group() on every rank before creating a Checkpointer"
        ) from error
