"""Pieces between peers over real sockets: by shared memory and by TCP, with strangers, early senders and lost peers."""

from __future__ import annotations

import dataclasses
import mmap
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import xxhash

from dckpt.blocks.arena import Arena
from dckpt.blocks.frames import HELLO_BYTES, PAYLOAD, Frame, encode_hello
from dckpt.blocks.peers import PeerLostError, Peers, PeersEndedError, new_token

SLOT_BYTES = 16 * mmap.PAGESIZE
DATA = bytes(range(256)) * 100


class Collector:
    """Keeps what arrives: (source, begin, bytes)."""

    def __init__(self) -> None:
        self.found: list[tuple[int, int, bytes]] = []
        self.voids: list[int] = []
        self.damaged: list[int] = []
        self._places: dict[int, list[memoryview]] = {}

    def take_slot(self, source: int, frame: Frame, memory: memoryview) -> None:
        self.found.append((source, frame.begin, bytes(memory)))

    def places(self, source: int, frame: Frame) -> list[memoryview]:
        # In two parts, as a stripe that goes to two tensors.
        half = frame.length // 2
        self._places[source] = [memoryview(bytearray(half)), memoryview(bytearray(frame.length - half))]
        return self._places[source]

    def take_payload(self, source: int, frame: Frame, *, is_whole: bool) -> None:
        if is_whole:
            self.found.append((source, frame.begin, b"".join(self._places.pop(source))))
        else:
            self.damaged.append(frame.begin)

    def take_void(self, source: int) -> None:
        self.voids.append(source)


def wait_for(condition, within_s: float = 10.0) -> None:
    limit = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < limit, "it did not happen in time"
        time.sleep(0.005)


def meet(*peers: Peers, is_local: bool = True) -> None:
    """Lets them know each other; with `is_local=False` as if each were on a host of its own."""
    token = new_token()
    addresses = {peer.rank: peer.address for peer in peers}
    if not is_local:
        addresses = {r: dataclasses.replace(a, hostname=f"host{r}", hosts=("127.0.0.1",)) for r, a in addresses.items()}
    for peer in peers:
        peer.use_arena(Arena(4, SLOT_BYTES))
        peer.start(token, addresses)


@pytest.fixture
def pair() -> Iterator[tuple[Peers, Peers]]:
    peers = Peers(0, ()), Peers(1, ())
    yield peers
    for peer in peers:
        peer.close()


def send(peer: Peers, to: int, begin: int, data: bytes, *, round_number: int = 0, check: int | None = None) -> None:
    assert peer.arena is not None
    slot = peer.arena.take(5.0)
    assert slot is not None
    memory = slot.take(len(data))
    memory[:] = data
    right = xxhash.xxh3_64_intdigest(data)
    head = Frame(PAYLOAD, round_number, 3, begin, len(data))
    peer.send_stripe(to, head, slot, lambda: ([memory[:5], memory[5:]], right if check is None else check))
    slot.release()


@pytest.mark.parametrize("is_local", [True, False])
def test_stripes_arrive_as_they_were_sent_in_both_directions(pair, is_local):
    meet(*pair, is_local=is_local)
    sinks = Collector(), Collector()
    for peer, sink in zip(pair, sinks, strict=True):
        peer.receiving.open_round(0, sink, SLOT_BYTES)
    # More than there are slots: they come back by acknowledgements.
    for number in range(12):
        send(pair[0], 1, number, DATA)
        send(pair[1], 0, number, DATA[::-1])
    wait_for(lambda: len(sinks[0].found) == len(sinks[1].found) == 12)

    assert sinks[1].found == [(0, number, DATA) for number in range(12)]
    assert sinks[0].found == [(1, number, DATA[::-1]) for number in range(12)]
    wait_for(lambda: not pair[0].waiting_for())
    assert pair[0].receiving.lost == {}


def test_a_payload_that_is_not_what_was_sent_is_noticed(pair):
    meet(*pair, is_local=False)
    sink = Collector()
    pair[1].receiving.open_round(0, sink, SLOT_BYTES)
    send(pair[0], 1, 7, DATA, check=1)
    wait_for(lambda: sink.damaged == [7])

    assert sink.found == []


@pytest.mark.parametrize("is_local", [True, False])
def test_frames_of_a_later_round_wait_and_those_of_an_earlier_one_are_dropped(pair, is_local):
    meet(*pair, is_local=is_local)
    first, second = Collector(), Collector()
    pair[1].receiving.open_round(0, first, SLOT_BYTES)
    send(pair[0], 1, 1, DATA, round_number=1)
    time.sleep(0.1)
    assert first.found == []
    pair[1].receiving.open_round(1, second, SLOT_BYTES)
    send(pair[0], 1, 2, DATA, round_number=0)
    send(pair[0], 1, 3, DATA, round_number=1)
    pair[0].send_void(1, 1)
    wait_for(lambda: second.voids == [0])

    assert [begin for _, begin, _ in second.found] == [1, 3]
    assert first.found == []


def test_blobs_wait_for_whoever_asks(pair):
    meet(*pair)
    pair[0].send_blob(1, 0, 4, DATA * 50, within_s=5.0)
    pair[0].send_blob(1, 0, 5, b"", within_s=5.0)

    assert pair[1].receiving.await_blob(0, 4, 5.0) == DATA * 50
    assert pair[1].receiving.await_blob(0, 5, 5.0) == b""
    assert pair[1].receiving.await_blob(0, 6, 0.05) is None


def is_dropped(sock: socket.socket) -> bool:
    sock.settimeout(5.0)
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def test_strangers_are_dropped_before_anything_else_is_read(pair):
    meet(*pair)
    sink = Collector()
    pair[1].receiving.open_round(0, sink, SLOT_BYTES)
    port = pair[1].address.port
    right = encode_hello(pair[1].receiving.token, 0, 1, 0)
    for greeting in (
        encode_hello(new_token(), 0, 1, 0),  # another job
        encode_hello(pair[1].receiving.token, 0, 2, 0),  # meant for another rank
        b"GET / HTTP/1.1\r\n" + bytes(HELLO_BYTES),
        right + bytes(64),  # no frame that there is
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as stranger:
            stranger.sendall(greeting)
            assert is_dropped(stranger)
    send(pair[0], 1, 1, DATA)
    wait_for(lambda: sink.found == [(0, 1, DATA)])


def test_a_sender_that_nobody_reads_from_is_seen_to_wait_and_can_be_ended():
    sender, silent = Peers(0, ()), Peers(1, ())
    address = dataclasses.replace(silent.address, hostname="elsewhere", hosts=("127.0.0.1",))
    sender.use_arena(Arena(4, SLOT_BYTES))
    sender.start(new_token(), {1: address})
    raised: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(1000):
                sender.send_blob(1, 0, 0, bytes(2**20), within_s=60.0)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    wait_for(lambda: time.monotonic() - sender.waiting_for().get(1, time.monotonic()) > 0.6)
    sender.end()
    thread.join(5)
    sender.close()
    silent.close()

    assert [type(error) for error in raised] == [PeersEndedError]


def test_a_sender_gives_up_a_blob_that_does_not_move():
    sender, silent = Peers(0, ()), Peers(1, ())
    address = dataclasses.replace(silent.address, hostname="elsewhere", hosts=("127.0.0.1",))
    sender.start(new_token(), {1: address})
    with pytest.raises(PeerLostError, match="rank 1"):
        sender.send_blob(1, 0, 0, bytes(2**26), within_s=0.3)
    sender.close()
    silent.close()


def test_a_killed_process_is_noticed_by_sender_and_receiver(pair):
    """The other end is a process of its own that stops reading and is then killed."""
    here, there = pair
    token = new_token()
    addresses = {0: here.address, 1: there.address}
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            there.use_arena(Arena(4, SLOT_BYTES))
            there.start(token, addresses)
            send(there, 0, 1, DATA)
            os.write(writing, b"!")
            time.sleep(60)
        finally:
            os._exit(0)
    there.close()  # this process's copies of its sockets
    here.use_arena(Arena(4, SLOT_BYTES))
    here.start(token, addresses)
    sink = Collector()
    here.receiving.open_round(0, sink, SLOT_BYTES)
    assert os.read(reading, 1) == b"!"
    wait_for(lambda: sink.found == [(1, 1, DATA)])
    send(here, 1, 2, DATA)  # of a round that it never opens: never acknowledged
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    wait_for(lambda: 1 in here.receiving.lost)

    assert 1 in here.waiting_for()
    with pytest.raises(PeerLostError, match="rank 1"):
        for _ in range(3):
            send(here, 1, 3, DATA)
