"""A single process takes the same path as many, without threads and sockets."""

from __future__ import annotations

import threading

import pytest

from dckpt.errors import (
    ConfigError,
    CoordinationTimeoutError,
    CorruptCheckpointError,
    PeerFailedError,
)
from dckpt.ranks.coordination import Coordination
from dckpt.ranks.session import Session
from dckpt.ranks.topology import Topology, detect_topology


@pytest.fixture
def coordination() -> Coordination:
    return Coordination.connect(Topology(0, 1), scope="runs/a", deadline_s=2.0)


def open_save(coordination: Coordination, save_id: str = "1") -> Session:
    return coordination.session(save_id, what="save of step 100", call="save(step=100)")


def test_without_a_process_group_there_is_one_rank() -> None:
    topology = detect_topology()

    assert topology == Topology(0, 1)
    assert topology.is_coordinator


def test_a_save_passes_all_phases_without_a_thread(coordination: Coordination) -> None:
    threads = threading.active_count()
    session = open_save(coordination)

    assert session.exchange("plan", b"p", lambda payloads: payloads[0] + b"!") == b"p!"
    session.beat(1)
    assert session.exchange("write", b"w" * 9_000_000, lambda payloads: payloads[0]) == b"w" * 9_000_000
    assert session.verdict().state == "open"
    session.try_commit()
    session.try_commit()
    assert session.abort(ValueError("late")) == "committing"
    session.conclude("committed", b"detail\nof it")
    assert session.await_conclusion() == ("committed", b"detail\nof it")
    assert threading.active_count() == threads


def test_a_failure_is_told_in_the_shared_words_and_keeps_its_cause(coordination: Coordination) -> None:
    session = open_save(coordination)
    cause = ValueError("bad")

    with pytest.raises(PeerFailedError) as raised:
        session.exchange("plan", b"", lambda _: b"", error=cause)

    assert str(raised.value) == (
        "save of step 100: rank 0 failed in phase plan: ValueError: bad. "
        "The save is abandoned; the previous checkpoint stands."
    )
    assert raised.value.__cause__ is cause


def test_an_error_of_ours_in_decide_keeps_type_message_and_fields(coordination: Coordination) -> None:
    def decide(_: list[bytes]) -> bytes:
        raise CorruptCheckpointError("File f: broken.", key="f")

    with pytest.raises(CorruptCheckpointError, match=r"^File f: broken\.$") as raised:
        open_save(coordination).exchange("plan", b"", decide)

    assert raised.value.key == "f"
    assert isinstance(raised.value.__cause__, CorruptCheckpointError)


def test_an_aborted_session_refuses_to_commit_and_to_go_on(coordination: Coordination) -> None:
    session = open_save(coordination)
    assert session.abort(OSError("disk")) == "abort"
    assert session.abort(OSError("second")) == "abort"

    assert session.verdict().state == "abort"
    for go_on in (
        session.raise_if_aborted,
        session.try_commit,
        session.await_conclusion,
        lambda: session.exchange("write", b"", lambda _: b""),
    ):
        with pytest.raises(PeerFailedError, match="OSError: disk"):
            go_on()


def test_ctrl_c_in_decide_passes_through_and_aborts(coordination: Coordination) -> None:
    def decide(_: list[bytes]) -> bytes:
        raise KeyboardInterrupt

    session = open_save(coordination)
    with pytest.raises(KeyboardInterrupt):
        session.exchange("plan", b"", decide)

    assert session.verdict().state == "abort"


def test_a_session_id_may_be_used_again(coordination: Coordination) -> None:
    first = open_save(coordination, "same")
    first.abort(OSError("disk"))

    second = open_save(coordination, "same")

    assert second.exchange("plan", b"x", lambda payloads: payloads[0]) == b"x"
    assert second.verdict().state == "open"


def test_keys_of_past_sessions_are_deleted(coordination: Coordination) -> None:
    store = coordination._link._store
    counts = []
    for number in range(60):
        session = open_save(coordination, str(number))
        session.exchange("plan", b"", lambda _: b"")
        session.beat(number)
        session.try_commit()
        session.conclude("committed")
        counts.append(len(store._values))

    assert counts[-1] == counts[30]
    assert counts[-1] < 100


def test_an_open_session_keeps_its_keys_while_others_of_another_kind_come_and_go(
    coordination: Coordination,
) -> None:
    save = open_save(coordination)
    save.exchange("plan", b"", lambda _: b"")
    for number in range(40):
        with_signals = coordination.session(f"s{number}", what="check of step 1", call="step(state)")
        with_signals.exchange("signals", b"", lambda _: b"")
        with_signals.close()

    assert save.exchange("write", b"w", lambda payloads: payloads[0]) == b"w"
    assert coordination._link._store.check(["session/1#1/1.plan/door"])


def test_published_keys_are_read_awaited_and_deleted(coordination: Coordination) -> None:
    assert coordination.read("signal") is None
    coordination.publish("signal", b"TERM")

    assert coordination.read("signal") == b"TERM"
    assert coordination.await_key("signal", 1.0, "signal", [0]) == b"TERM"
    coordination.delete("signal")
    with pytest.raises(CoordinationTimeoutError, match=r"^step\(state\): rank 0 gave no answer within 0.05 s"):
        coordination.await_key("signal", 0.05, "step(state)", [0])


def test_close_is_idempotent(coordination: Coordination) -> None:
    coordination.close(1.0)
    coordination.close(1.0)


def test_a_deadline_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="deadline_s"):
        Coordination.connect(Topology(0, 1), scope="runs/a", deadline_s=0)


def test_several_ranks_without_a_process_group_are_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match="init_process_group"):
        Coordination.connect(Topology(0, 2), scope="runs/a", deadline_s=1)
