"""The receiving side of the exchange: one thread that serves every connection as bytes come, and never waits for one."""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import xxhash

from dckpt.blocks.arena import map_arena
from dckpt.blocks.frames import (
    BLOB,
    FRAME_BYTES,
    HELLO_BYTES,
    PAYLOAD,
    SLOT,
    Frame,
    StrangerError,
    decode_hello,
    encode_ack,
)

log = logging.getLogger(__name__)

GREETING_S = 10.0  # for a connection to show the token
STRANGERS_MAX = 64  # connections that have not shown it, at once
READ_BYTES_MAX = 2**20  # from one connection before the others get their turn


class Sink(Protocol):
    """Takes what is received in one round; called in the receiving thread. Errors of its own it keeps to itself."""

    def take_slot(self, source: int, frame: Frame, memory: memoryview) -> None:
        """Copies what this rank wants out of a stripe that `source` has read; `memory` is the whole stripe."""
        ...

    def places(self, source: int, frame: Frame) -> Sequence[memoryview]:
        """Where the payload of a frame is to go: `frame.length` bytes together."""
        ...

    def take_payload(self, source: int, frame: Frame, *, is_whole: bool) -> None:
        """The payload is where `places` said; `is_whole` if its checksum is that of the frame."""
        ...

    def take_void(self, source: int) -> None:
        """Nothing more comes from `source`: it failed."""
        ...


class _Incoming:
    """One connection, as a script of what to read next; see `Receiver`."""

    def __init__(self, sock: socket.socket, owner: Receiver) -> None:
        self.sock = sock
        self.since = time.monotonic()
        self.rank: int | None = None
        self.wants_descriptor = False
        self.descriptor: int | None = None
        self._owner = owner
        self._script = self._follow()
        self.target: memoryview | None = next(self._script)
        self.is_within = False  # a frame has begun

    def advance(self) -> None:
        """The target is full: on to the next one. It is None while the script waits for its round to open."""
        self.target = next(self._script)

    def _follow(self) -> Iterator[memoryview | None]:
        greeting = bytearray(HELLO_BYTES)
        yield memoryview(greeting)
        rank, arena_bytes = decode_hello(greeting, self._owner.token, self._owner.rank)
        self.rank = rank
        arena = None
        if arena_bytes:
            self.wants_descriptor = True
            yield memoryview(bytearray(1))
            self.wants_descriptor = False
            if self.descriptor is None:
                raise StrangerError("no descriptor came")
            arena, self.descriptor = map_arena(self.descriptor, arena_bytes), None
        head = bytearray(FRAME_BYTES)
        while True:
            self.is_within = False
            yield memoryview(head)
            self.is_within = True
            yield from self._take(rank, Frame.decode(head), arena)

    def _take(self, rank: int, frame: Frame, arena: memoryview | None) -> Iterator[memoryview | None]:
        if frame.kind == BLOB:
            data = bytearray(frame.length)
            if data:
                yield memoryview(data)
            self._owner.keep_blob(frame, bytes(data))
            return
        while frame.round > self._owner.round:
            yield None
        sink = self._owner.sink if frame.round == self._owner.round else None
        if frame.kind == SLOT:
            if arena is None:
                raise StrangerError("a slot without an arena")
            begin = frame.slot * self._owner.slot_bytes + frame.offset
            if sink is not None:
                sink.take_slot(rank, frame, arena[begin : begin + frame.length])
            self.sock.sendall(encode_ack(frame.slot))
        elif frame.kind == PAYLOAD:
            yield from self._take_payload(rank, frame, sink)
        elif sink is not None:
            sink.take_void(rank)
        self._owner.bytes_received += frame.length

    def _take_payload(self, rank: int, frame: Frame, sink: Sink | None) -> Iterator[memoryview]:
        places = [memoryview(bytearray(frame.length))] if sink is None else sink.places(rank, frame)
        assert sum(map(len, places)) == frame.length
        hasher = xxhash.xxh3_64()
        for place in places:
            if len(place):
                yield place
                hasher.update(place)
        if sink is not None:
            sink.take_payload(rank, frame, is_whole=hasher.intdigest() == frame.check)


class Receiver:
    """Serves the listeners' connections in a thread of its own. Strangers, who do not show `token`, are dropped."""

    def __init__(self, rank: int, token: bytes, listeners: Sequence[socket.socket]) -> None:
        self.rank, self.token = rank, token
        self.round = -1
        self.sink: Sink | None = None
        self.slot_bytes = 0
        self.bytes_received = 0
        self.lost: dict[int, str] = {}
        """Ranks whose connection ended in the middle of something, and how."""
        self._listeners = listeners
        self._selector = selectors.DefaultSelector()
        self._connections: set[_Incoming] = set()
        self._paused: list[_Incoming] = []
        self._blobs: dict[tuple[int, int], bytes] = {}
        self._changed = threading.Condition()
        self._wake_reading, self._wake_writing = socket.socketpair()
        self._wake_writing.setblocking(False)
        self._is_closed = False
        self._todo: list[Callable[[], None]] = []
        self._thread = threading.Thread(target=self._serve, name="dckpt-peers", daemon=True)

    # -- from other threads --------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begins to serve."""
        for listener in self._listeners:
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake_reading, selectors.EVENT_READ, None)
        self._thread.start()

    def open_round(self, number: int, sink: Sink, slot_bytes: int) -> None:
        """From here on frames of round `number` go to `sink`; frames of later rounds wait, earlier ones are thrown away."""

        def open_in_thread() -> None:
            self.round, self.sink, self.slot_bytes = number, sink, slot_bytes
            paused, self._paused = self._paused, []
            for incoming in paused:
                self._go_on(incoming)

        self._do(open_in_thread)

    def watch(self, sock: socket.socket, on_readable: Callable[[], bool]) -> None:
        """Calls `on_readable` in the serving thread when the socket has something; no more once it returns False."""
        self._do(lambda: self._register(sock, on_readable))

    def await_blob(self, round_number: int, number: int, within_s: float) -> bytes | None:
        """The bytes that were sent under these numbers; None if they do not come in time."""
        key = (round_number, number)
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._blobs, within_s):
                return None
            return self._blobs.pop(key)

    def note_lost(self, rank: int, reason: str) -> None:
        """A connection with this rank ended in the middle of something."""
        self.lost.setdefault(rank, reason)

    def close(self) -> None:
        """Ends the thread and closes what it served."""
        if self._is_closed:
            return
        self._is_closed = True
        self._do(lambda: None)
        if self._thread.ident is not None:
            self._thread.join(5.0)
        self._wake_writing.close()

    def _do(self, action: Callable[[], None]) -> None:
        with self._changed:
            self._todo.append(action)
        with contextlib.suppress(OSError):  # a full pipe wakes as well; a closed one has nobody to wake
            self._wake_writing.send(b"!")

    # -- in the serving thread -----------------------------------------------------------------------------------------

    def keep_blob(self, frame: Frame, data: bytes) -> None:
        """Keeps bytes until `await_blob` takes them."""
        with self._changed:
            self._blobs[frame.round, frame.begin] = data
            self._changed.notify_all()

    def _serve(self) -> None:
        try:
            while not self._is_closed:
                for key, _ in self._selector.select(1.0):
                    self._handle(key.fileobj, key.data)
                self._drop_strangers()
        finally:
            for incoming in list(self._connections):
                self._drop(incoming)
            self._selector.close()
            self._wake_reading.close()

    def _handle(self, fileobj: Any, data: Any) -> None:
        if data is None:
            fileobj.recv(4096)
            with self._changed:
                todo, self._todo = self._todo, []
            for action in todo:
                action()
        elif isinstance(data, _Incoming):
            self._receive(data)
        elif data == self._accept:
            self._accept(fileobj)
        elif not data():
            self._selector.unregister(fileobj)

    def _register(self, sock: socket.socket, data: Any) -> None:
        if sock.fileno() >= 0:
            self._selector.register(sock, selectors.EVENT_READ, data)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            sock, _ = listener.accept()
            strangers = [one for one in self._connections if one.rank is None]
            if len(strangers) >= STRANGERS_MAX:
                sock.close()
                return
            sock.setblocking(False)
            incoming = _Incoming(sock, self)
            self._connections.add(incoming)
            self._register(sock, incoming)

    def _drop_strangers(self) -> None:
        limit = time.monotonic() - GREETING_S
        for incoming in [one for one in self._connections if one.rank is None and one.since < limit]:
            self._drop(incoming)

    def _receive(self, incoming: _Incoming) -> None:
        left = READ_BYTES_MAX
        try:
            while left > 0 and incoming.target is not None:
                count = self._read_some(incoming, incoming.target)
                if count is None:
                    return
                if count == 0:
                    self._end(incoming, "its connection ended")
                    return
                left -= count
                incoming.target = incoming.target[count:]
                if not len(incoming.target):
                    self._step(incoming)
        except (OSError, ValueError, StrangerError) as error:
            self._end(incoming, f"{type(error).__name__}: {error}")

    def _read_some(self, incoming: _Incoming, target: memoryview) -> int | None:
        """Bytes read, 0 at the end, None if there are none now."""
        try:
            if not incoming.wants_descriptor:
                return incoming.sock.recv_into(target)
            data, descriptors, _, _ = socket.recv_fds(incoming.sock, 1, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return None
        incoming.descriptor = descriptors[0] if descriptors else None
        target[: len(data)] = data
        return len(data)

    def _step(self, incoming: _Incoming) -> None:
        incoming.advance()
        if incoming.target is None:
            self._selector.unregister(incoming.sock)
            self._paused.append(incoming)

    def _go_on(self, incoming: _Incoming) -> None:
        try:
            self._register(incoming.sock, incoming)
            self._step(incoming)
        except (OSError, ValueError, StrangerError) as error:
            self._end(incoming, f"{type(error).__name__}: {error}")

    def _end(self, incoming: _Incoming, reason: str) -> None:
        if incoming.rank is None:
            log.debug("a connection without the job's token was dropped: %s", reason)
        else:
            # Between frames it may be the regular end; whoever still waits for this rank says that it is not.
            self.note_lost(incoming.rank, reason)
        self._drop(incoming)

    def _drop(self, incoming: _Incoming) -> None:
        self._connections.discard(incoming)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(incoming.sock)
        incoming.sock.close()
