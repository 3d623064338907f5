"""The peers' side of real saves: tickets, file reports and payloads of every rank, through real sessions of one store.

A thread with connections for each of thousands of ranks would measure this machine's scheduler. So a few *leaders* do all that
a rank does, waits included, on connections of their own, on which the bytes are counted. Each speaks for some *followers*:
they post what they have to say, and hear the answer from their leader.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import socket
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed as dist

from benchmarks.simulation.peers import Files, Peer, Role, peers_of
from dckpt.engine.agreement import decode_layout, decode_question
from dckpt.format.values import dump_json, load_json
from dckpt.planning.layout import Layout
from dckpt.ranks.client import StoreLink
from dckpt.ranks.coordination import Coordination
from dckpt.ranks.protocol import ExchangeKeys
from dckpt.ranks.session import Session
from dckpt.ranks.topology import Topology

PROCESSES = 2
LEADERS_A_PROCESS = 4
DEADLINE_S = 600.0  # as a Checkpointer's
ANSWER_BYTES_MAX = 2**31
_TCP_INFO_BYTES = 136
_TCP_INFO_COUNTERS = struct.Struct("<QQ")  # bytes acknowledged by the other side, bytes received
_TCP_INFO_COUNTERS_AT = 120


@dataclass(frozen=True)
class Casting:
    """What a process needs to play its ranks."""

    port: int
    root: str
    roles: list[Role]
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    files: Files
    ranks: range


@dataclass(frozen=True)
class Traffic:
    """Of one save: the largest payload and answer by phase, and all bytes of one rank's connections in both directions."""

    payload_bytes: dict[str, int]
    answer_bytes: dict[str, int]
    sent_bytes: int
    received_bytes: int


class _Voice(Session):
    """Posts its payloads and waits for nothing."""

    def exchange(
        self,
        phase: str,
        payload: bytes,
        decide: Callable[[list[bytes]], bytes],
        *,
        error: BaseException | None = None,
    ) -> bytes:
        del decide
        self._number += 1
        self._post_payload(ExchangeKeys(self._prefix, self._number, phase), payload, error)
        return b""


class _Leader:
    """Takes its own rank and its followers through the agreement of a save, exchange by exchange, as the saver does."""

    def __init__(self, casting: Casting, ranks: range) -> None:
        self._casting = casting
        self._world_size = math.prod(casting.shape)
        self.peers = list(peers_of(casting.roles, casting.axes, casting.shape, ranks))
        self._own_link, self._shared_link = link_to(casting.port), link_to(casting.port)
        own = Topology(self.peers[0].rank, self._world_size)
        self._coordination = Coordination(self._own_link, own, DEADLINE_S)
        self._tickets: list[bytes] = []
        self.payload_bytes: dict[str, int] = {}
        self.answer_bytes: dict[str, int] = {}

    def connect_own(self) -> None:
        """The connections of the leader's own rank."""
        self._own_link.warm_up(DEADLINE_S)

    def connect(self) -> None:
        """All connections."""
        self.connect_own()
        self._shared_link.warm_up(DEADLINE_S)

    def prepare(self, step: int) -> None:
        self._tickets = [peer.ticket(step).encode() for peer in self.peers]
        self.payload_bytes, self.answer_bytes = {}, {}

    def save(self, number: int, step: int) -> None:
        what, call = f"save of step {step}", f"save(step={step})"
        session = self._coordination.session(f"save-{number}", what=what, call=call)
        assert not session.was_missed(f"{step}.0", phase="plan")
        voices: list[Session] = [self._voice(peer, number, what, call) for peer in self.peers[1:]]
        sessions = [session, *voices]
        answer = self._exchange(sessions, "plan", self._tickets)
        question = decode_question(answer)
        if question is not None:
            details = [peer.details(step, question).encode() for peer in self.peers]
            answer = self._exchange(sessions, "layout", details)
            for peer in self.peers:
                peer.adopt(_layout(answer["layout"]), step, self._casting.files.report(peer.rank))
        self._exchange(sessions, "write", [self._write(peer, step, answer) for peer in self.peers])
        outcome, detail = session.await_conclusion()
        assert outcome == "committed", detail
        session.close()

    def _voice(self, peer: Peer, number: int, what: str, call: str) -> _Voice:
        return _Voice(
            self._shared_link,
            Topology(peer.rank, self._world_size),
            prefix=f"session/save-{number}#1",
            what=what,
            call=call,
            deadline_s=DEADLINE_S,
            total_s=None,
            consequence="",
        )

    def _write(self, peer: Peer, step: int, answer: dict[str, Any]) -> bytes:
        files, attempt = self._casting.files, answer["attempt"]
        rows = files.write(os.path.join(self._casting.root, f".tmp-{attempt}", attempt), attempt, peer.rank, step)
        return dump_json([rows, files.report(peer.rank).to_json() if answer["wants_report"] else None])

    def _exchange(self, sessions: list[Session], phase: str, payloads: list[bytes]) -> dict[str, Any]:
        for session, payload in zip(sessions[1:], payloads[1:], strict=True):
            session.exchange(phase, payload, _decide_nothing)
        found = sessions[0].exchange(phase, payloads[0], _decide_nothing)
        self.payload_bytes[phase], self.answer_bytes[phase] = max(map(len, payloads)), len(found)
        return load_json(found, key="answer", limit=ANSWER_BYTES_MAX) if found else {}

    def close(self) -> None:
        self._coordination.close(0.0)
        self._shared_link.close(0.0)


def link_to(port: int) -> StoreLink:
    """A link of one rank to the store."""
    store: Any = dist.TCPStore  # type: ignore[attr-defined]
    return StoreLink(lambda: store("127.0.0.1", port, is_master=False, wait_for_workers=False))


def _decide_nothing(payloads: list[bytes]) -> bytes:
    raise AssertionError(f"only the coordinator decides; {len(payloads)} payloads came here")


@functools.lru_cache(maxsize=1)
def _layout(text: str) -> Layout:
    # Each real rank decodes its own; here those of a process share one.
    return decode_layout(text)


def _sockets_to(port: int) -> set[int]:
    """The descriptors of this process's connections to `port`."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(name))) as end:
                if end.family in (socket.AF_INET, socket.AF_INET6) and end.getpeername()[1] == port:
                    found.add(int(name))
        except OSError:
            continue  # no socket, or not a connected one
    return found


def _bytes_on(descriptors: set[int]) -> tuple[int, int]:
    """(sent and acknowledged, received) over these connections so far, as the kernel counts them."""
    sent = received = 0
    for descriptor in descriptors:
        with socket.socket(fileno=os.dup(descriptor)) as end:
            info = end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        up, down = _TCP_INFO_COUNTERS.unpack_from(info, _TCP_INFO_COUNTERS_AT)
        sent, received = sent + up, received + down
    return sent, received


def _play(casting: Casting, pipe: Connection) -> None:
    """The main function of a process: connects its ranks, then takes part in one save a message."""
    size = -(-len(casting.ranks) // LEADERS_A_PROCESS)
    shares = [casting.ranks[begin : begin + size] for begin in range(0, len(casting.ranks), size)]
    leaders = [_Leader(casting, share) for share in shares]
    leaders[0].connect_own()
    counted = _sockets_to(casting.port)  # of one rank that does all by itself
    with ThreadPoolExecutor(len(leaders)) as threads:
        list(threads.map(_Leader.connect, leaders))
        pipe.send("connected")
        while (order := pipe.recv()) is not None:
            number, step = order
            for leader in leaders:
                leader.prepare(step)
            before = _bytes_on(counted)
            pipe.send("ready")
            pipe.recv()
            list(threads.map(lambda leader: leader.save(number, step), leaders))  # noqa: B023 - ends before the next
            after = _bytes_on(counted)
            pipe.send(
                Traffic(
                    payload_bytes=_largest([leader.payload_bytes for leader in leaders]),
                    answer_bytes=_largest([leader.answer_bytes for leader in leaders]),
                    sent_bytes=after[0] - before[0],
                    received_bytes=after[1] - before[1],
                )
            )
        for leader in leaders:
            leader.close()
    pipe.send("gone")


def _largest(found: list[dict[str, int]]) -> dict[str, int]:
    return {name: max(one[name] for one in found) for name in found[0]}


class Crowd:
    """All ranks but the coordinator, in processes of their own. Use it in a `with` block."""

    def __init__(self, make_casting: Callable[[range], Casting], world_size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Any] = []
        self._processes: list[Any] = []
        size = -(-(world_size - 1) // PROCESSES)
        for first in range(1, world_size, size):
            ours, theirs = context.Pipe()
            ranks = range(first, min(world_size, first + size))
            process = context.Process(target=_play, args=(make_casting(ranks), theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Crowd:
        self._hear("connected")
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            try:
                pipe.send(None)
                pipe.recv()
            except (OSError, EOFError):
                continue  # it died, and its error was shown by `_hear`
        for process in self._processes:
            process.join(30)
            process.kill()

    def prepare(self, number: int, step: int) -> None:
        """Every rank has its ticket for save number `number` ready when this returns."""
        self._tell((number, step))
        self._hear("ready")

    def start(self) -> None:
        """Every rank calls `save` now."""
        self._tell("go")

    def finish(self) -> Traffic:
        """What the save that was started took, over all processes."""
        found = [pipe.recv() for pipe in self._pipes]
        return Traffic(
            payload_bytes=_largest([one.payload_bytes for one in found]),
            answer_bytes=_largest([one.answer_bytes for one in found]),
            sent_bytes=max(one.sent_bytes for one in found),
            received_bytes=max(one.received_bytes for one in found),
        )

    def _tell(self, message: object) -> None:
        for pipe in self._pipes:
            pipe.send(message)

    def _hear(self, expected: str) -> None:
        for pipe in self._pipes:
            found = pipe.recv()
            assert found == expected, found
