"""The connection to the coordination store: calls that cannot hang their caller, and no exception of torch's leaves it.

Facts about torch 2.13 that shaped this (measured):

* A store call has no time-out of its own while the server's process is stopped: even `check` and the connect block.
  So each client lives in a daemon thread, and the caller waits for the answer with a deadline.
* A `wait` that times out prints two warnings to stderr each time. So waits carry no time-out here: a `Watch` blocks
  until its key is set, and who gives up on a key sets it, which frees every thread that waits for it.
* One client serves one call at a time, also while it is blocked in `wait`. So a call leases a free client; threads may
  come and go, and a session may be handed from one thread to another.
* The server refuses values above 8 MiB by closing the connection, and takes quadratic time for values near it.
  So a large value is appended in parts of 1 MiB (32 MiB take 0.05 s).
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

PART_BYTES = 1 << 20
CLIENTS_MAX = 16  # more calls than this without an answer: the store is silent
POSTS_MAX = 256  # queued posts after which heartbeats are dropped
CLIENTS_WARM = 2  # a rank that waits blocks one and looks around with another
GRACE_S = 0.25
RECONNECT_S = 5.0  # a refused connection is tried anew for this long, by the first call after the loss
_FOREVER = timedelta(days=20)  # torch hands milliseconds to poll(2) as an int: 24 days is its limit


class ContactLostError(Exception):
    """The store's connection is closed or refused. Never leaves this package."""


class NoAnswerError(Exception):
    """The store did not answer in time. Never leaves this package."""


class RawStore(Protocol):
    """What this package uses of a c10d store."""

    def set(self, key: str, value: Any, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def multi_get(self, keys: list[str], /) -> list[bytes]: ...
    def multi_set(self, keys: list[str], values: Any, /) -> None: ...
    def check(self, keys: list[str], /) -> bool: ...
    def wait(self, keys: list[str], timeout: timedelta, /) -> None: ...
    def add(self, key: str, amount: int, /) -> int: ...
    def append(self, key: str, value: Any, /) -> None: ...
    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...
    def delete_key(self, key: str, /) -> bool: ...


class Watch(Protocol):
    """Waits for one key to be set."""

    def wait(self, seconds: float) -> bool:
        """True once the key is set; False after `seconds`. Raises `ContactLostError`."""
        ...


class Link(Protocol):
    """A store as the rest of the package sees it."""

    def call(self, operation: Callable[[RawStore], T], within_s: float) -> T:
        """Runs `operation` on a client of its own. Raises `ContactLostError`, or `NoAnswerError` after `within_s`."""
        ...

    def post(self, operation: Callable[[RawStore], Any], *, droppable: bool = False) -> None:
        """Runs `operation` later, in order with other posts; never blocks. A failure shows at the next `call`."""
        ...

    def watch(self, key: str) -> Watch:
        """Starts waiting for `key`. Who stops waiting must set the key, or the client stays occupied."""
        ...

    def close(self, within_s: float = 1.0) -> None:
        """Gives posted operations up to `within_s`, then disconnects. Idempotent."""
        ...


def put(store: RawStore, key: str, value: bytes) -> None:
    """Sets a key that nobody set before, of any size."""
    if len(value) <= PART_BYTES:
        store.set(key, value)
        return
    for begin in range(0, len(value), PART_BYTES):
        store.append(key, value[begin : begin + PART_BYTES])


class _Job:
    """One operation on its way through a client's thread."""

    def __init__(self, operation: Callable[[RawStore], Any]) -> None:
        self.operation = operation
        self.done = threading.Event()
        self.result: Any = None
        self.error: Exception | None = None

    def run(self, store: RawStore) -> None:
        try:
            self.result = self.operation(store)
        except (RuntimeError, OSError) as error:
            # torch's DistNetworkError and DistStoreError are RuntimeErrors; no operation here times out by itself.
            self.error = ContactLostError(str(error).splitlines()[0] if str(error) else type(error).__name__)
        except Exception as error:  # noqa: BLE001 - handed to the caller, who raises it
            self.error = error

    def wait(self, seconds: float) -> bool:
        """True once done; False after `seconds`. Raises what the operation raised."""
        if not self.done.wait(max(seconds, 0.0)):
            return False
        if self.error is not None:
            raise self.error
        return True


class _Client:
    """One store client and the only thread that uses it. The connection is made in that thread, by the first job."""

    def __init__(
        self,
        connect: Callable[[], RawStore],
        *,
        became_idle: Callable[[_Client], None] | None,
        was_lost: Callable[[_Client, Exception], None],
    ) -> None:
        self._connect, self._became_idle, self._was_lost = connect, became_idle, was_lost
        self._lock = threading.Lock()
        self._current: _Job | None = None
        self.jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self.is_connected = False
        self.is_broken = False
        self.thread = threading.Thread(target=self._serve, name="dckpt-ranks", daemon=True)
        self.thread.start()

    def submit(self, job: _Job) -> bool:
        """False when the connection is gone and nobody would run the job."""
        with self._lock:
            if self.is_broken:
                return False
            self.jobs.put(job)
            return True

    def _serve(self) -> None:
        store: RawStore | None = None
        while (job := self.jobs.get()) is not None:
            self._current = job
            if store is None:
                connecting = _Job(lambda _: self._connect())
                connecting.run(_NOTHING)
                store, job.error = connecting.result, connecting.error
                self.is_connected = store is not None
            if store is not None:
                job.run(store)
            if job.error is not None and (store is None or isinstance(job.error, ContactLostError)):
                self.give_up(job.error)
                self._was_lost(self, job.error)
                return
            self._current = None
            # Idle before done: the caller's next call finds this client free and opens no second connection.
            if self._became_idle is not None:
                self._became_idle(self)
            job.done.set()
            del job

    def give_up(self, error: Exception) -> None:
        """Every job that waits here ends with `error`, also one that waits for the connection."""
        with self._lock:
            self.is_broken = True
            waiting = [self._current]
            while not self.jobs.empty():
                waiting.append(self.jobs.get())
        for job in waiting:
            if job is not None:
                job.error = error
                job.done.set()


class StoreLink:
    """A link to a c10d store in this or another process. `connect` makes a client; it runs in the client's thread."""

    def __init__(self, connect: Callable[[], RawStore]) -> None:
        self._connect = connect
        self._lock = threading.Lock()
        self._free: list[_Client] = []
        self._clients: set[_Client] = set()
        self._poster: _Client | None = None
        self._is_lost = False
        self._is_closed = False

    def warm_up(self, within_s: float) -> None:
        """Opens the connections that a save needs, so that no save's deadline pays for it: torch asks the DNS for the
        peer's name, which takes seconds where nobody answers. What is not open by then opens when it is needed."""
        self.post(lambda store: store.check(["warm"]))
        jobs = [self._start(lambda store: store.check(["warm"]))[0] for _ in range(CLIENTS_WARM)]
        end = time.monotonic() + within_s
        for job in jobs:
            job.wait(end - time.monotonic())

    def call(self, operation: Callable[[RawStore], T], within_s: float) -> T:
        job, client = self._start(operation)
        if self._is_lost and not client.is_connected:
            within_s = min(within_s, RECONNECT_S)
        # A process that was stopped and continued finds its time used up although the answer is a moment away.
        if not job.wait(within_s) and not job.wait(GRACE_S):
            if self._is_lost:
                raise ContactLostError(f"no new connection within {within_s:g} s")
            raise NoAnswerError(f"no answer within {within_s:g} s")
        self._is_lost = False
        result: T = job.result
        return result

    def watch(self, key: str) -> Watch:
        return self._start(lambda store: store.wait([key], _FOREVER))[0]

    def post(self, operation: Callable[[RawStore], Any], *, droppable: bool = False) -> None:
        with self._lock:
            if self._is_closed:
                return
            poster = self._poster
            if droppable and (self._is_lost or (poster is not None and poster.jobs.qsize() > POSTS_MAX)):
                return
            if poster is None or poster.is_broken:
                poster = self._poster = _Client(self._connect, became_idle=None, was_lost=self._lose)
        poster.submit(_Job(operation))

    def _start(self, operation: Callable[[RawStore], Any]) -> tuple[_Job, _Client]:
        job = _Job(operation)
        while True:
            with self._lock:
                if self._is_closed:
                    raise ContactLostError("this connection was closed")
                self._clients = {client for client in self._clients if not client.is_broken}
                if self._free:
                    client = self._free.pop()
                elif len(self._clients) >= CLIENTS_MAX:
                    raise NoAnswerError(f"{CLIENTS_MAX} calls are still without an answer")
                else:
                    client = _Client(self._connect, became_idle=self._take_back, was_lost=self._lose)
                    self._clients.add(client)
            if client.submit(job):
                return job, client

    def _take_back(self, client: _Client) -> None:
        with self._lock:
            if self._is_closed:
                client.jobs.put(None)
            elif not client.is_broken:
                self._free.append(client)

    def _lose(self, lost: _Client, error: Exception) -> None:
        """One connection is gone: those that are only being made would try in vain until their time is up."""
        with self._lock:
            self._is_lost = True
            others = [*self._clients, *([] if self._poster is None else [self._poster])]
        for client in others:
            if client is not lost and not client.is_connected:
                client.give_up(error)

    def close(self, within_s: float = 1.0) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            idle, self._free = self._free, []
            poster, self._poster = self._poster, None
        for client in idle:
            client.jobs.put(None)
        if poster is not None:
            poster.jobs.put(None)
            poster.thread.join(within_s)


class LocalStore:
    """The store of a single process: a dictionary with the same operations."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()

    def set(self, key: str, value: Any, /) -> None:
        with self._changed:
            self._values[key] = _as_bytes(value)
            self._changed.notify_all()

    def get(self, key: str, /) -> bytes:
        with self._changed:
            if key not in self._values:
                raise LookupError(f"key {key} was read before it was set")
            return self._values[key]

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        return [self.get(key) for key in keys]

    def multi_set(self, keys: list[str], values: Any, /) -> None:
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)

    def check(self, keys: list[str], /) -> bool:
        with self._changed:
            return all(key in self._values for key in keys)

    def wait(self, keys: list[str], timeout: timedelta, /) -> None:
        if not self.wait_for(keys, timeout.total_seconds()):
            raise RuntimeError(f"keys {keys} were not set in time")

    def wait_for(self, keys: list[str], seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: all(key in self._values for key in keys), seconds)

    def add(self, key: str, amount: int, /) -> int:
        with self._changed:
            total = int(self._values.get(key, b"0")) + amount
            self.set(key, str(total))
            return total

    def append(self, key: str, value: Any, /) -> None:
        with self._changed:
            self.set(key, self._values.get(key, b"") + _as_bytes(value))

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        with self._changed:
            current = self._values.get(key)
            if current is None and expected:
                return expected.encode()
            if current is None or current == expected.encode():
                self.set(key, desired)
            return self._values[key]

    def delete_key(self, key: str, /) -> bool:
        with self._changed:
            return self._values.pop(key, None) is not None


class _LocalWatch:
    def __init__(self, store: LocalStore, key: str) -> None:
        self._store, self._key = store, key

    def wait(self, seconds: float) -> bool:
        return self._store.wait_for([self._key], seconds)


class LocalLink:
    """The link of a single process: no thread, no socket."""

    def __init__(self) -> None:
        self._store = LocalStore()

    def call(self, operation: Callable[[RawStore], T], within_s: float) -> T:  # noqa: ARG002 - never waits
        return operation(self._store)

    def post(self, operation: Callable[[RawStore], Any], *, droppable: bool = False) -> None:  # noqa: ARG002
        operation(self._store)

    def watch(self, key: str) -> Watch:
        return _LocalWatch(self._store, key)

    def close(self, within_s: float = 1.0) -> None:
        """Nothing to disconnect."""


_NOTHING: RawStore = LocalStore()


def _as_bytes(value: Any) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)


def poll(condition: Callable[[], bool], within_s: float, *, slowest_s: float = 0.05) -> bool:
    """Asks `condition` often at first, then less, until it holds or `within_s` has passed; asks at least once."""
    end = time.monotonic() + within_s
    pause = 0.0005
    while not condition():
        left = end - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(pause, left))
        pause = min(pause * 1.5, slowest_s)
    return True
