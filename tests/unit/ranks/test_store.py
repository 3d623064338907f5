"""The dictionary of a single process promises what torch's store does; the link to a store never hangs its caller."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from dckpt.ranks import client
from dckpt.ranks.client import (
    CLIENTS_MAX,
    PART_BYTES,
    ContactLostError,
    LocalStore,
    NoAnswerError,
    RawStore,
    StoreLink,
    put,
)


def tcp_store() -> Any:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture(params=[LocalStore, dist.HashStore, tcp_store], ids=["local", "hash", "tcp"])
def store(request: pytest.FixtureRequest) -> RawStore:
    return request.param()


def test_compare_set_lets_the_first_win(store: RawStore) -> None:
    assert store.compare_set("verdict", "", "abort") == b"abort"
    assert store.compare_set("verdict", "", "committing") == b"abort"
    assert store.get("verdict") == b"abort"


def test_bytes_of_any_value_come_back(store: RawStore) -> None:
    store.set("key", b"\x00\xff\x80")
    store.append("key", b"\x00,")

    assert store.get("key") == b"\x00\xff\x80\x00,"


def test_counters_start_at_zero_and_can_be_reset(store: RawStore) -> None:
    assert store.add("n", 0) == 0
    assert store.add("n", 2) == 2
    store.multi_set(["n", "m"], [b"0", b"0"])

    assert store.add("n", 1) == 1
    assert store.multi_get(["n", "m"]) == [b"1", b"0"]


def test_deleted_keys_are_absent(store: RawStore) -> None:
    store.set("key", b"1")

    assert store.check(["key"])
    assert store.delete_key("key")
    assert not store.delete_key("key")
    assert not store.check(["key"])


@pytest.mark.parametrize("make", [LocalStore, dist.HashStore], ids=["local", "hash"])
def test_wait_returns_once_another_thread_sets_the_key(make: Callable[[], RawStore]) -> None:
    store = make()
    timer = threading.Timer(0.05, lambda: store.set("key", b"1"))
    timer.start()

    store.wait(["key"], timedelta(seconds=10))

    assert store.check(["key"])


def test_a_value_above_the_servers_limit_is_put_in_parts() -> None:
    value = bytes(range(256)) * (12 * PART_BYTES // 256) + b"end"
    assert len(value) > 8 * 2**20
    store = tcp_store()

    put(store, "key", value)

    assert store.get("key") == value


@pytest.fixture
def served() -> Iterator[StoreLink]:
    server = tcp_store()
    link = StoreLink(lambda: dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False))
    yield link
    link.close()


def test_a_watch_does_not_occupy_the_client_of_other_calls(served: StoreLink) -> None:
    watch = served.watch("key")
    assert not watch.wait(0.05)

    served.call(lambda store: store.set("key", b"1"), 5)

    assert watch.wait(5)


def test_clients_are_reused(served: StoreLink) -> None:
    before = threading.active_count()

    for number in range(50):
        served.call(lambda store, number=number: store.set("key", str(number)), 5)

    assert threading.active_count() <= before + 1


def test_posts_arrive_in_order(served: StoreLink) -> None:
    for number in range(100):
        served.post(lambda store, number=number: store.append("list", f"{number},"))
    served.post(lambda store: store.set("end", b"1"))
    assert served.watch("end").wait(5)

    assert served.call(lambda store: store.get("list"), 5).decode() == "".join(f"{n}," for n in range(100))


def test_an_operation_without_answer_gives_its_caller_back_in_time(served: StoreLink) -> None:
    release = threading.Event()
    started = time.monotonic()

    with pytest.raises(NoAnswerError):
        served.call(lambda _: release.wait(30), 0.2)

    assert time.monotonic() - started < 1.5
    release.set()
    assert served.call(lambda store: store.add("n", 1), 5) == 1


def test_a_store_that_never_answers_does_not_cost_a_thread_for_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "GRACE_S", 0.01)
    release = threading.Event()

    def connect() -> RawStore:
        release.wait(30)
        return LocalStore()

    link = StoreLink(connect)
    before = threading.active_count()

    for _ in range(CLIENTS_MAX + 5):
        with pytest.raises(NoAnswerError):
            link.call(lambda store: store.get("x"), 0.0)

    assert threading.active_count() <= before + CLIENTS_MAX
    release.set()
    link.close()


def test_a_refused_connection_is_reported_and_tried_anew_by_the_next_call() -> None:
    attempts: list[int] = []

    def connect() -> RawStore:
        attempts.append(1)
        if len(attempts) == 1:
            raise dist.DistNetworkError("Connection refused\nwith a trace")
        return LocalStore()

    link = StoreLink(connect)
    with pytest.raises(ContactLostError, match=r"^Connection refused$"):
        link.call(lambda store: store.add("n", 1), 5)

    assert link.call(lambda store: store.add("n", 1), 5) == 1


def test_a_lost_connection_also_ends_calls_that_wait_for_a_new_one() -> None:
    """A connect to a server that just died retries for seconds; the loss is known at once."""
    stuck, lose = threading.Event(), threading.Event()
    connects: list[int] = []

    def connect() -> RawStore:
        connects.append(1)
        if len(connects) == 2:
            stuck.set()
            time.sleep(5)
        return LocalStore()

    def break_off(_: RawStore) -> None:
        lose.wait(5)
        raise dist.DistNetworkError("Connection reset by peer")

    link = StoreLink(connect)
    link.call(lambda store: store.add("n", 1), 5)
    watch = link._start(break_off)[0]
    threading.Thread(target=lambda: (stuck.wait(5), lose.set())).start()
    started = time.monotonic()

    with pytest.raises(ContactLostError, match="reset by peer"):
        link.call(lambda store: store.add("n", 1), 5)

    assert time.monotonic() - started < 2
    with pytest.raises(ContactLostError):
        watch.wait(5)


def test_a_closed_link_refuses_calls_and_ignores_posts(served: StoreLink) -> None:
    served.close()
    served.close()

    served.post(lambda store: store.set("key", b"1"))
    with pytest.raises(ContactLostError):
        served.call(lambda store: store.add("n", 1), 5)
