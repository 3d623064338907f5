"""Agreement between real processes: whatever ends, hangs or comes late, all survivors raise the same error in time.

Every test is one job on a pool of ranks that import torch once. A rank answers with what it saw and how long it took.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from dckpt.errors import CorruptCheckpointError, DckptError
from dckpt.ranks.coordination import Coordination
from dckpt.ranks.session import Session
from dckpt.ranks.topology import Topology, detect_topology
from tests.support.ranks import RankLost, RankPool

pytestmark = pytest.mark.distributed

DEADLINE_S = 1.5
POLLING_S = 1.5  # what the promise allows beside the deadline, with room for two busy cores
STANDS = "The save is abandoned; the previous checkpoint stands."
Seen = dict[str, Any]


# -- what the jobs share ---------------------------------------------------------------------------------------------


def connect(deadline_s: float = DEADLINE_S) -> Coordination:
    return Coordination.connect(detect_topology(), scope="runs/a", deadline_s=deadline_s)


def open_save(coordination: Coordination, step: int = 100, **options: Any) -> Session:
    return coordination.session(f"save-{step}", what=f"save of step {step}", call=f"save(step={step})", **options)


def joined(payloads: list[bytes]) -> bytes:
    return b"|".join(payloads)


def watch(action: Callable[[], Any]) -> Seen:
    """What `action` returned, or its error; and the seconds that it took."""
    started = time.monotonic()
    seen: Seen = {"value": None, "type": None, "message": None, "fields": {}}
    try:
        seen["value"] = action()
    except DckptError as error:
        seen |= {"type": type(error).__name__, "message": error.message, "fields": error.fields()}
    seen["seconds"] = time.monotonic() - started
    return seen


def agree_again(coordination: Coordination, step: int = 101) -> bytes:
    """A later session: it must work whatever became of the one before."""
    session = open_save(coordination, step, deadline_s=20.0)
    return session.exchange("plan", b"%d" % coordination.topology.rank, joined)


def share_pids(coordination: Coordination) -> list[int]:
    session = coordination.session("pids", what="pids of the test", call="share_pids", deadline_s=30.0)
    return [int(pid) for pid in session.exchange("pids", b"%d" % os.getpid(), joined).split(b"|")]


def same_error(seen: list[Seen]) -> Seen:
    """Asserts that all these ranks raised the same error, and returns it."""
    assert len({(one["type"], one["message"], str(one["fields"])) for one in seen}) == 1, seen
    assert seen[0]["type"] is not None
    return seen[0]


def in_time(seen: list[Seen], deadline_s: float = DEADLINE_S) -> None:
    assert max(one["seconds"] for one in seen) < deadline_s + POLLING_S


# -- the normal path -------------------------------------------------------------------------------------------------


def job_save(rank: int, world_size: int, large_bytes: int) -> Seen:
    coordination = connect(30.0)
    session = open_save(coordination)
    plan = session.exchange("plan", b"rank %d" % rank, joined)
    large = session.exchange("write", bytes([rank]) * large_bytes, joined)
    if rank == 0:
        session.try_commit()
        session.conclude("committed", b"x" * 3_000_000)
        outcome = ("committed", b"x" * 3_000_000)
    else:
        outcome = session.await_conclusion()
    session = open_save(coordination)
    again = session.exchange("plan", b"second use of the id", lambda payloads: payloads[-1])

    def loop() -> None:
        for number in range(100):
            signals = coordination.session(f"check-{number}", what="check of it", call="step(state)")
            signals.exchange("signals", b"", joined)
            signals.close()

    session.exchange("ready", b"", joined)
    small = watch(loop)
    keys = coordination._server.num_keys() if rank == 0 else 0
    coordination.close(5.0)
    return {
        "plan": plan,
        "large": len(large) == large_bytes * world_size + world_size - 1 and large[-1] == world_size - 1,
        "outcome": outcome,
        "again": again,
        "seconds": small["seconds"],
        "error": small["message"],
        "keys": keys,
    }


def test_payloads_of_any_size_decisions_and_the_conclusion_reach_every_rank(ranks: RankPool) -> None:
    """Also: a session id is used twice, and keys of past sessions go away."""
    seen = ranks.run(job_save, 3, 12_000_000)

    for one in seen:
        assert one["plan"] == b"rank 0|rank 1|rank 2"
        assert one["large"]
        assert one["outcome"] == ("committed", b"x" * 3_000_000)
        assert one["again"] == b"second use of the id"
        assert one["error"] is None
    assert seen[0]["keys"] < 200


def test_an_exchange_adds_no_polling_delay(ranks: RankPool) -> None:
    seen = ranks.run(job_save, 2, 10)

    # 100 sessions of one exchange each; the time slice of a wait is 0.5 s.
    assert max(one["seconds"] for one in seen) < 10


def job_two_threads(rank: int, world_size: int) -> list[Any]:
    """The saver thread takes a session over while the main thread exchanges signals."""
    coordination = connect(30.0)
    session = open_save(coordination)
    session.exchange("plan", b"", joined)
    saved: list[Any] = []

    def write() -> None:
        for number in range(30):
            session.beat(number)
            saved.append(session.exchange(f"write-{number}", b"%d" % rank, joined))
        if rank == 0:
            session.try_commit()
            session.conclude("committed")
            saved.append("committed")
        else:
            saved.append(session.await_conclusion()[0])

    saver = threading.Thread(target=write)
    saver.start()
    signals = []
    for number in range(30):
        check = coordination.session(f"check-{number}", what="check of it", call="step(state)")
        signals.append(check.exchange("signals", b"s%d" % rank, joined))
        check.close()
        if rank == 0:
            coordination.publish(f"key-{number}", b"%d" % number)
        signals.append(coordination.await_key(f"key-{number}", 20.0, "step(state)", [0]))
    saver.join(30)
    coordination.close(5.0)
    return [saved, signals]


def test_two_threads_agree_on_different_things_at_the_same_time(ranks: RankPool) -> None:
    for saved, signals in ranks.run(job_two_threads, 2):
        assert saved == [b"0|1"] * 30 + ["committed"]
        assert signals == [item for n in range(30) for item in (b"s0|s1", b"%d" % n)]


def job_tcp(rank: int, world_size: int, port: int) -> Any:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    coordination = connect(20.0)
    value = agree_again(coordination)
    # Rank 0 says goodbye first and must still serve the others.
    if rank != 0:
        time.sleep(0.5)
        late = watch(lambda: coordination.read("nothing"))
        assert late["type"] is None, late
    started = time.monotonic()
    coordination.close(10.0)
    return value, time.monotonic() - started


def test_ranks_find_each_other_through_a_tcp_rendezvous_and_rank_0_leaves_last(ranks: RankPool) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    seen = ranks.run(job_tcp, 2, port, has_group=False)

    assert [value for value, _ in seen] == [b"0|1"] * 2
    assert 0.4 < seen[0][1] < 5


def job_rank_0_never_connects(rank: int, world_size: int) -> Seen:
    if rank == 0:
        time.sleep(DEADLINE_S + 0.5)
        connect(10.0).close(10.0)
        return {}
    seen = watch(connect)
    again = watch(lambda: connect(10.0).close(5.0))
    return seen | {"again": again["type"]}


def test_a_missing_coordinator_is_named_while_connecting(ranks: RankPool) -> None:
    seen = ranks.run(job_rank_0_never_connects, 3)[1:]

    assert same_error(seen)["message"] == (
        "Checkpointer for runs/a: rank 0 did not create a Checkpointer for it within 1.5 s; every rank must create it."
    )
    assert seen[0]["fields"]["ranks"] == [0]
    in_time(seen)
    assert [one["again"] for one in seen] == [None, None]


# -- ranks that report a failure -------------------------------------------------------------------------------------


def fails_with_odd_text(rank: int, session: Session) -> bytes:
    error = ValueError("not \udcff encodable\nin one line") if rank == 1 else None
    return session.exchange("plan", b"", joined, error=error)


def two_fail(rank: int, session: Session) -> bytes:
    return session.exchange("write", b"", joined, error=OSError(f"disk of {rank}") if rank in (1, 2) else None)


def decide_raises_ours(rank: int, session: Session) -> bytes:
    def decide(_: list[bytes]) -> bytes:
        raise CorruptCheckpointError("File f: broken.", key="f", expected=1, found=2)

    return session.exchange("plan", b"", decide)


def decide_raises_other(rank: int, session: Session) -> bytes:
    return session.exchange("plan", b"", lambda _: b"%d" % (1 // 0))


def aborts_while_others_wait(rank: int, session: Session) -> bytes:
    if rank == 2:
        time.sleep(0.3)
        session.abort(OSError("no space"))
    return session.exchange("write", b"", joined)


def aborts_before_the_commit(rank: int, session: Session) -> Any:
    session.exchange("write", b"", joined)
    if rank == 1:
        assert session.abort(OSError("too late a thought")) == "abort"
    if rank == 0:
        while session.verdict().state == "open":
            time.sleep(0.01)
        session.try_commit()
    return session.await_conclusion()


def job_failing(rank: int, world_size: int, names: list[str]) -> list[tuple[Seen, Any]]:
    coordination = connect(20.0)
    seen = []
    for number, name in enumerate(names):
        session = open_save(coordination, number)
        one = watch(lambda name=name, session=session: globals()[name](rank, session))
        seen.append((one, agree_again(coordination, 1000 + number)))
    coordination.close(5.0)
    return seen


def test_a_reported_failure_is_one_error_on_every_rank_and_the_next_session_works(ranks: RankPool) -> None:
    expected = {
        "fails_with_odd_text": (
            "PeerFailedError",
            f"save of step 0: rank 1 failed in phase plan: ValueError: not \udcff encodable in one line. {STANDS}",
        ),
        "two_fail": (
            "PeerFailedError",
            "save of step 1: rank 1 failed in phase write: OSError: disk of 1; "
            f"rank 2 failed in phase write: OSError: disk of 2. {STANDS}",
        ),
        "decide_raises_ours": ("CorruptCheckpointError", "File f: broken."),
        "decide_raises_other": (
            "PeerFailedError",
            f"save of step 3: rank 0 failed in phase plan: ZeroDivisionError: integer division or modulo by zero. {STANDS}",
        ),
        "aborts_while_others_wait": (
            "PeerFailedError",
            f"save of step 4: rank 2 failed in phase start: OSError: no space. {STANDS}",
        ),
        "aborts_before_the_commit": (
            "PeerFailedError",
            f"save of step 5: rank 1 failed in phase write: OSError: too late a thought. {STANDS}",
        ),
    }

    by_rank = ranks.run(job_failing, 3, list(expected))

    for number, (kind, message) in enumerate(expected.values()):
        error = same_error([seen[number][0] for seen in by_rank])
        assert (error["type"], error["message"]) == (kind, message)
        # The deadline is 20 s: failures are noticed by looking, not by waiting for it.
        assert max(seen[number][0]["seconds"] for seen in by_rank) < 3
        assert {seen[number][1] for seen in by_rank} == {b"0|1|2"}
    first = by_rank[0][0][0]["fields"]
    assert first == {"rank": 1, "phase": "plan", "cause": "ValueError"}


# -- ranks that do not come, stand still or come late ----------------------------------------------------------------


def job_missing(rank: int, world_size: int, absent: int) -> list[Any]:
    coordination = connect()
    share_pids(coordination)
    if rank == absent:
        time.sleep(DEADLINE_S + 1.0)
    seen = watch(lambda: open_save(coordination).exchange("plan", b"", joined))
    after = agree_again(coordination)
    coordination.close(5.0)
    return [seen, after]


@pytest.mark.parametrize("absent", [2, 0])
def test_a_rank_that_did_not_call_is_named_and_hears_the_same_error_when_it_comes(ranks: RankPool, absent: int) -> None:
    by_rank = ranks.run(job_missing, 3, absent)

    seen = [one for one, _ in by_rank]
    assert same_error(seen)["message"] == (
        f"save of step 100: rank {absent} did not call save(step=100) within 1.5 s; every rank must call it. {STANDS}"
    )
    assert seen[0]["fields"] == {"ranks": [absent], "phase": "plan"}
    in_time(seen)
    assert seen[absent]["seconds"] < 1.0
    assert {after for _, after in by_rank} == {b"0|1|2"}


def job_all_but_one_missing(rank: int, world_size: int) -> Seen:
    coordination = connect()
    share_pids(coordination)
    if rank != 1:
        time.sleep(DEADLINE_S + 1.0)
    return watch(lambda: open_save(coordination).exchange("plan", b"", joined))


def test_whoever_misses_the_coordinator_names_the_other_absent_ranks_too(ranks: RankPool) -> None:
    error = same_error(ranks.run(job_all_but_one_missing, 3))

    assert error["message"].startswith("save of step 100: ranks 0 and 2 did not call save(step=100) within 1.5 s;")


def job_slow(rank: int, world_size: int, slow: int, beats: bool, total_s: float | None) -> Seen:
    """Rank `slow` takes two deadlines for its write phase."""
    coordination = connect()
    session = open_save(coordination, total_s=total_s)
    session.exchange("plan", b"", joined)
    end = time.monotonic() + 2 * DEADLINE_S

    def write(payloads: list[bytes] | None = None) -> bytes:
        progress = 0
        while time.monotonic() < end:
            time.sleep(0.02)
            progress += 1
            session.beat(progress if beats else 7)
        return b""

    if rank == slow and slow != 0:
        write()
    seen = watch(lambda: session.exchange("write", b"", write if slow == 0 else joined))
    coordination.close(2.0)
    return seen


@pytest.mark.parametrize("slow", [1, 0])
def test_progress_extends_the_deadline(ranks: RankPool, slow: int) -> None:
    seen = ranks.run(job_slow, 2, slow, True, None)

    assert [one["type"] for one in seen] == [None, None], seen
    assert seen[1 - slow]["seconds"] > 1.5 * DEADLINE_S


@pytest.mark.parametrize("slow", [1, 0])
def test_a_rank_without_progress_is_named_also_when_it_coordinates(ranks: RankPool, slow: int) -> None:
    seen = ranks.run(job_slow, 2, slow, False, None)

    assert same_error(seen)["message"] == (
        f"save of step 100: rank {slow} made no progress in phase write for 1.5 s. {STANDS}"
    )
    in_time([seen[1 - slow]])


def test_a_total_ends_a_session_that_makes_progress(ranks: RankPool) -> None:
    seen = ranks.run(job_slow, 2, 1, True, 1.0)

    assert same_error(seen)["message"] == (
        "save of step 100: rank 1 did not finish phase write, 1 s after the start, which is the limit. " + STANDS
    )


def job_stopped(rank: int, world_size: int, victim: int) -> list[Any]:
    """Rank 1 stops the victim in the middle of a phase and lets it continue after the deadline."""
    coordination = connect()
    pids = share_pids(coordination)
    session = open_save(coordination)
    session.exchange("plan", b"", joined)
    if rank == 1:
        time.sleep(0.2)  # the others come out of the phase before
        os.kill(pids[victim], signal.SIGSTOP)
        resume = threading.Timer(DEADLINE_S + 2.0, os.kill, (pids[victim], signal.SIGCONT))
        resume.start()
    elif rank == victim:
        time.sleep(0.7)
    seen = watch(lambda: session.exchange("write", b"", joined))
    if rank == 1:
        resume.join()
    after = agree_again(coordination)
    coordination.close(5.0)
    return [seen, after]


@pytest.mark.parametrize("victim", [2, 0])
def test_a_stopped_rank_is_named_and_raises_the_same_error_when_it_continues(ranks: RankPool, victim: int) -> None:
    by_rank = ranks.run(job_stopped, 3, victim)

    seen = [one for one, _ in by_rank]
    expected = {
        2: "rank 2 made no progress in phase write for 1.5 s",
        0: "the coordinator (rank 0) gave no sign in phase write for 1.5 s",
    }
    assert same_error(seen)["message"] == f"save of step 100: {expected[victim]}. {STANDS}"
    assert seen[1]["fields"] == {"ranks": [victim], "phase": "write"}
    in_time([one for rank, one in enumerate(seen) if rank != victim])
    assert {after for _, after in by_rank} == {b"0|1|2"}


# -- processes that end ----------------------------------------------------------------------------------------------


def end_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def job_killed(rank: int, world_size: int, victim: int, moment: str) -> Any:
    coordination = connect()
    session = open_save(coordination)
    session.exchange("plan", b"", joined)

    def decide(payloads: list[bytes]) -> bytes:
        if moment == "deciding":
            time.sleep(0.3)
            end_process()
        return b""

    if rank == victim and moment == "writing":
        time.sleep(0.2)  # the others come out of the phase before
        end_process()
    seen = watch(lambda: session.exchange("write", b"", decide))
    if seen["type"] is None:
        if rank == 0:
            time.sleep(0.3)
            if moment == "before_commit":
                end_process()
            session.try_commit()
            time.sleep(0.3)
            end_process()
        seen = watch(session.await_conclusion)
    return seen | {"open": session.outcome_is_open}


def test_a_killed_rank_is_named_by_the_survivors(ranks: RankPool) -> None:
    seen = ranks.run(job_killed, 3, 1, "writing", allow_loss=True)

    assert isinstance(seen.pop(1), RankLost)
    assert same_error(seen)["message"] == (
        f"save of step 100: rank 1 made no progress in phase write for 1.5 s. {STANDS}"
    )
    in_time(seen)


def test_a_killed_coordinator_is_named_at_once_in_every_phase_and_unknown_once_it_was_committing(
    ranks: RankPool,
) -> None:
    for moment, phase, ending in (
        ("writing", "write", STANDS),
        ("deciding", "write", STANDS),
        (
            "before_commit",
            "commit",
            "Whether the checkpoint was committed is not known here; the next resume finds out.",
        ),
        ("committing", "commit", ""),
    ):
        seen = ranks.run(job_killed, 3, 0, moment, allow_loss=True)

        assert isinstance(seen.pop(0), RankLost), moment
        in_time(seen)
        if moment == "committing":
            assert [one["value"] for one in seen] == [("unknown", b"")] * 2, seen
            continue
        error = same_error(seen)
        assert (
            error["message"]
            == f"save of step 100: the coordinator (rank 0) cannot be reached in phase {phase}. {ending}"
        )
        assert error["fields"] == {"rank": 0, "phase": phase, "cause": "ConnectionLost"}
        if moment == "before_commit":
            assert all(one["open"] for one in seen)


def job_silent_while_committing(rank: int, world_size: int) -> Any:
    coordination = connect()
    session = open_save(coordination)
    session.exchange("write", b"", joined)
    if rank == 0:
        session.try_commit()
        time.sleep(DEADLINE_S + 1.0)
        session.conclude("committed")
        coordination.close(2.0)
        return "committed"
    seen = watch(session.await_conclusion)
    coordination.close(2.0)
    return seen


def test_a_commit_that_takes_longer_than_the_deadline_is_unknown_never_failed(ranks: RankPool) -> None:
    first, *seen = ranks.run(job_silent_while_committing, 3)

    assert first == "committed"
    assert [one["value"] for one in seen] == [("unknown", b"")] * 2, seen
    in_time(seen)


def job_failed_conclusion(rank: int, world_size: int) -> Any:
    coordination = connect(20.0)
    session = open_save(coordination)
    session.exchange("write", b"", joined)
    if rank == 0:
        time.sleep(0.2)
        session.conclude("failed", b"reason")
        coordination.close(5.0)
        return "failed", b"reason"
    outcome = session.await_conclusion()
    coordination.close(5.0)
    return outcome


def test_a_failed_conclusion_brings_its_detail(ranks: RankPool) -> None:
    assert ranks.run(job_failed_conclusion, 2) == [("failed", b"reason")] * 2


def test_one_process_is_its_own_world() -> None:
    assert detect_topology() == Topology(0, 1)
