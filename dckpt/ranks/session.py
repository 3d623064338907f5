"""One agreement between all ranks: payloads gathered and a decision returned, the verdict of a save, its conclusion.

Keys, under a prefix that no other session has:

* `joined`            ranks that opened the session, as "0,3,"
* `subject`           what the rank that came first is about, such as its step
* `beat/<rank>`       a counter that moves while the rank makes progress
* `<n>/payload/<r>`   what rank r contributes to the n-th exchange; `<n>/arrived` lists the ranks ("3!," failed), `<n>/count`
                      counts them, `<n>/all` wakes the coordinator
* `<n>/door`          wakes the waiting ranks: the result, an error, or "look at the verdict"; a large result is in `<n>/result`
* `verdict`           "committing", or the error of an abort as JSON: set once by compare-and-set, the first wins
* `commit`, `done`    doors of the commit: the verdict is set; the conclusion is known

Whoever gives up on a door opens it, so no thread stays behind in a wait.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal, NoReturn

from dckpt.errors import CoordinationTimeoutError, DckptError, PeerFailedError
from dckpt.ranks import messages
from dckpt.ranks.client import (
    ContactLostError,
    Link,
    NoAnswerError,
    RawStore,
    Watch,
    put,
)
from dckpt.ranks.progress import Heartbeat, StallWatch
from dckpt.ranks.protocol import (
    COMMITTING,
    ERROR,
    LARGE,
    OUTCOMES,
    RESULT,
    SEE_VERDICT,
    AbortedError,
    ExchangeKeys,
    Outcome,
    Verdict,
    announce,
    is_abort,
)
from dckpt.ranks.topology import Topology

log = logging.getLogger(__name__)

WARN_AFTER_S = 30.0  # a mistake such as `if rank == 0: save()` should not stay silent until the deadline
SLICE_S = 0.5  # between two looks at verdict and heartbeats while a rank waits
LOOKS_PER_S = 1024  # of all waiting ranks together: what a wait costs the coordinator must not grow with the ranks
ERROR_GRACE_S = 1.0  # how long the coordinator waits for further ranks once one has reported a failure
_COMMIT_PHASE = "commit"


def slice_s(topology: Topology, deadline_s: float) -> float:
    """Seconds between two looks of a waiting rank. A door that opens wakes it at once; only trouble is seen this late."""
    crowded = 0.0 if topology.is_coordinator else topology.world_size / LOOKS_PER_S
    return min(max(SLICE_S, crowded), deadline_s / 6)


class Session:
    """One save, load or other agreement, opened by `Coordination.session` on every rank.

    Phases run in the same order on every rank, from one thread at a time; it may be handed from thread to thread.
    `beat`, `abort`, `verdict` and `raise_if_aborted` may be called from any thread at any time. Nobody waits longer
    than `deadline_s` (and about a second of polling) for a rank that shows no progress.
    """

    def __init__(
        self,
        link: Link,
        topology: Topology,
        *,
        prefix: str,
        what: str,
        call: str,
        deadline_s: float,
        total_s: float | None,
        consequence: str,
    ) -> None:
        self.what = what
        self.is_closed = False
        self.outcome_is_open = False
        """True when this rank lost sight of the coordinator and its last payload may have arrived: it raised an error, yet
        the coordinator may have gone on. If that was the last phase before the commit, the checkpoint may exist."""
        self.error: DckptError | None = None
        """The error in force, once this rank aborted the session or heard of its abort: the same on every rank."""
        self._link, self._topology, self._prefix = link, topology, prefix
        self._call, self.deadline_s, self._total_s = call, deadline_s, total_s
        self.consequence = consequence
        self._opened_at = time.monotonic()
        self._slice_s = slice_s(topology, deadline_s)
        self._heartbeat = Heartbeat(deadline_s, topology.world_size)
        self._number = 0
        self.phase = "start"
        self._committing_seen = False
        self._payload_may_be_there = False
        self._verdict_key, self._joined_key = f"{prefix}/verdict", f"{prefix}/joined"
        self._subject_key = f"{prefix}/subject"
        self._commit_door, self._done_door = f"{prefix}/commit", f"{prefix}/done"
        self._lock = threading.Lock()
        self._written = [self._beat_key(topology.rank)]
        if topology.is_coordinator:
            self._written.append(self._joined_key)
        me = f"{topology.rank},"
        link.post(lambda store: store.append(self._joined_key, me))

    def was_missed(self, subject: str, *, phase: str) -> bool:
        """True if the others gave this session up without this rank, and it was about another subject than `subject`.

        Sessions are numbered by their calls: a rank that left one out calls the next too early, finds this, and goes on
        to the following number. A rank that is only late finds its own subject and hears the error of the others. Asked
        at the beginning of the first `phase`; raises as its exchange does when the store cannot be reached.
        """
        self.phase = phase

        def claim(store: RawStore) -> bool:
            first = store.compare_set(self._subject_key, "", subject).decode("utf-8")
            return is_abort(self._read_verdict(store)) and first != subject

        try:
            return self._link.call(claim, self.deadline_s)
        except ContactLostError:
            self._close_with(messages.coordinator_lost(self.what, phase, self.consequence))
        except NoAnswerError:
            try:
                self._give_up_on_silence()
            except AbortedError as aborted:
                self._close_with(aborted.error)

    def _close_with(self, error: DckptError) -> NoReturn:
        self.is_closed = True
        self.error = error
        raise error from None

    # -- exchanges -----------------------------------------------------------------------------------------------

    def exchange(
        self,
        phase: str,
        payload: bytes,
        decide: Callable[[list[bytes]], bytes],
        *,
        error: BaseException | None = None,
    ) -> bytes:
        """Returns `decide(payloads by rank)`, which the coordinator alone computes, on every rank.

        A rank that failed passes its `error` instead of a payload: then every rank raises one `PeerFailedError` that
        names all failed ranks. Missing ranks: `CoordinationTimeoutError`, named, on every rank that came. A `DckptError`
        of `decide` is raised on every rank with its type and message. Any of these aborts the session.
        """
        self.phase = phase
        self._number += 1
        keys = ExchangeKeys(self._prefix, self._number, phase)
        with self._lock:
            self._written.append(keys.payload(self._topology.rank))
            if self._topology.is_coordinator:
                self._written += [keys.arrived, keys.count, keys.all, keys.door, keys.result]
        try:
            return self._run_exchange(keys, payload, decide, error)
        except AbortedError as aborted:
            self.is_closed = True
            self.error = aborted.error
            raise aborted.error from messages.cause_to_show(aborted.error, error or aborted.__cause__)
        except (KeyboardInterrupt, SystemExit) as interrupt:
            # This process ends; the others learn why instead of waiting for their deadline.
            self.abort(interrupt)
            raise

    def _run_exchange(
        self,
        keys: ExchangeKeys,
        payload: bytes,
        decide: Callable[[list[bytes]], bytes],
        error: BaseException | None,
    ) -> bytes:
        try:
            if self._topology.is_coordinator:
                return self._gather_and_decide(keys, payload, decide, error)
            self._post_payload(keys, payload, error)
            result = self._await_door(keys.door, keys.result)
        except ContactLostError:
            self.outcome_is_open = self._payload_may_be_there
            raise AbortedError(messages.coordinator_lost(self.what, self.phase, self.consequence)) from None
        except NoAnswerError:
            # A payload that is still on its way arrives when the coordinator continues.
            self.outcome_is_open = error is None and not self._topology.is_coordinator
            self._give_up_on_silence()
        # The coordinator has read it, nobody else does, and payloads may be large.
        own = keys.payload(self._topology.rank)
        self._link.post(lambda store: store.delete_key(own))
        return result

    def _post_payload(self, keys: ExchangeKeys, payload: bytes, error: BaseException | None) -> None:
        rank, world = self._topology.rank, self._topology.world_size
        record = RESULT + payload if error is None else ERROR + messages.failure_to_bytes(error)
        mark = f"{rank}," if error is None else f"{rank}!,"

        self._payload_may_be_there = False

        def post(store: RawStore) -> str:
            put(store, keys.payload(rank), record)
            self._payload_may_be_there = error is None
            store.append(keys.arrived, mark)
            if store.add(keys.count, 1) == world or error is not None:
                store.set(keys.all, b"1")
            return self._read_verdict(store)

        self._raise_abort(self._link.call(post, self.deadline_s))

    def _gather_and_decide(
        self,
        keys: ExchangeKeys,
        payload: bytes,
        decide: Callable[[list[bytes]], bytes],
        error: BaseException | None,
    ) -> bytes:
        try:
            self._post_payload(keys, payload, error)
            records = self._gather(keys)
            failures = {
                rank: messages.failure_from_bytes(record[1:]) for rank, record in records.items() if record[:1] == ERROR
            }
            if failures:
                self._abort_with(messages.peers_failed(self.what, self.phase, failures, self.consequence))
            result = self._decide(decide, [records[rank][1:] for rank in sorted(records)])
            self._raise_abort(
                self._link.call(lambda store: self._announce_result(store, keys, result), self.deadline_s)
            )
        except AbortedError as aborted:
            text = messages.error_to_text(aborted.error).encode("ascii")
            self._link.call(lambda store: self._announce_error(store, keys, text), self.deadline_s)
            raise
        return result

    def _announce_result(self, store: RawStore, keys: ExchangeKeys, result: bytes) -> str:
        """The result is out unless an abort is in force: `decide` may have taken so long that the others gave up."""
        verdict = self._read_verdict(store)
        if not is_abort(verdict):
            announce(store, keys.door, keys.result, RESULT, result)
        return verdict

    def _announce_error(self, store: RawStore, keys: ExchangeKeys, text: bytes) -> None:
        store.set(keys.all, b"1")
        announce(store, keys.door, keys.result, ERROR, text)

    def _decide(self, decide: Callable[[list[bytes]], bytes], payloads: list[bytes]) -> bytes:
        try:
            return decide(payloads)
        except DckptError as error:
            self._abort_with(error, cause=error)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must hear of it
            failure = (type(error).__name__, messages.sentence(error))
            shared = messages.peers_failed(self.what, self.phase, {0: failure}, self.consequence)
            self._abort_with(shared, cause=error)

    def _gather(self, keys: ExchangeKeys) -> dict[int, bytes]:
        """All ranks' records; only those that arrived when one of them is a failure. Raises when ranks do not come."""
        world = self._topology.world_size
        everyone = range(world)
        stalls = StallWatch(everyone, time.monotonic(), self.deadline_s)
        watch = self._link.watch(keys.all)
        woken, failed_at = False, None
        warn_at = time.monotonic() + WARN_AFTER_S
        while True:
            if woken:
                time.sleep(min(0.02, self._slice_s))
            else:
                woken = watch.wait(self._slice_s)
            now = time.monotonic()
            arrived, verdict = self._link.call(lambda store: self._look_at_arrivals(store, keys), self.deadline_s)
            self._raise_abort(verdict)
            if len(arrived) == world:
                break
            if now >= warn_at:
                warn_at = float("inf")
                named = messages.format_ranks([rank for rank in everyone if rank not in arrived])
                log.warning("%s: still waiting for %s; every rank must call %s", self.what, named, self._call)
            if any(arrived.values()):
                failed_at = now if failed_at is None else failed_at
                if now - failed_at >= min(ERROR_GRACE_S, self.deadline_s / 3):
                    break
            missing = [rank for rank in everyone if rank not in arrived]
            self.tick(now)
            stalls.observe(self.read_ticks(missing), now)
            late = stalls.stalled(missing, now)
            if late:
                self._abort_with(self.late_error(late))
            if self._total_s is not None and now - self._opened_at >= self._total_s:
                self._abort_with(
                    messages.total_exceeded(self.what, self.phase, missing, self._total_s, self.consequence)
                )
        return self._read_records(keys, sorted(rank for rank in arrived if arrived[rank] or len(arrived) == world))

    def _read_records(self, keys: ExchangeKeys, ranks: list[int]) -> dict[int, bytes]:
        names = [keys.payload(rank) for rank in ranks]

        def read(store: RawStore) -> tuple[list[bytes], str]:
            # A rank that gave this session up long ago has deleted its payload, and reading that would block.
            found = store.multi_get(names) if store.check(names) else []
            return found, self._read_verdict(store)

        found, verdict = self._link.call(read, self.deadline_s)
        if not found:
            self._raise_abort(verdict)
            self._abort_with(self.late_error(ranks))
        return dict(zip(ranks, found, strict=True))

    def _look_at_arrivals(self, store: RawStore, keys: ExchangeKeys) -> tuple[dict[int, bool], str]:
        """Ranks that arrived, each with whether it failed; and the verdict."""
        text = store.get(keys.arrived).decode("ascii")
        marks = text.split(",")[:-1]
        return {int(mark.rstrip("!")): mark.endswith("!") for mark in marks}, self._read_verdict(store)

    def read_ticks(self, ranks: Sequence[int]) -> dict[int, int]:
        """The heartbeat counter of each of `ranks`."""
        names = [self._beat_key(rank) for rank in ranks]

        def read(store: RawStore) -> list[bytes]:
            if not store.check(names):
                # Reading an absent key would block; one that exists by now only restarts its count.
                store.multi_set(names, [b"0"] * len(names))
                with self._lock:
                    self._written += names
            return store.multi_get(names)

        found = self._link.call(read, self.deadline_s)
        return {rank: int(value) for rank, value in zip(ranks, found, strict=True)}

    def late_error(self, ranks: list[int]) -> CoordinationTimeoutError:
        """The error for ranks that do not come. Tells ranks that never opened the session from ranks that stand still in it."""

        def read(store: RawStore) -> bytes:
            return store.get(self._joined_key) if store.check([self._joined_key]) else b""

        text = self._link.call(read, self.deadline_s).decode("ascii")
        joined = {int(mark) for mark in text.split(",")[:-1]} | {self._topology.rank}
        absent = [rank for rank in ranks if rank not in joined]
        if absent and not self._topology.is_coordinator:
            # A rank that misses the coordinator says at once who else is missing.
            absent = [rank for rank in range(self._topology.world_size) if rank not in joined]
        return messages.ranks_late(
            self.what,
            self.phase,
            absent=absent,
            stalled=[rank for rank in ranks if rank not in absent],
            call=self._call,
            deadline_s=self.deadline_s,
            consequence=self.consequence,
        )

    # -- waiting for the coordinator -----------------------------------------------------------------------------

    def _await_door(self, door: str, large: str) -> bytes:
        """What the coordinator announced at `door`; raises the error it announced, or that is in force."""
        self._wait_open(self._link.watch(door), door)

        def read(store: RawStore) -> tuple[bytes, bytes, str]:
            # The door of a session long past may be gone; the verdict of an abort outlives it.
            record = store.get(door) if store.check([door]) else SEE_VERDICT
            return record, store.get(large) if record == LARGE else b"", self._read_verdict(store)

        record, large_value, verdict = self._link.call(read, self.deadline_s)
        kind = record[:1]
        if kind == ERROR:
            raise AbortedError(messages.error_from_text(record[1:].decode("ascii")))
        if kind == SEE_VERDICT:
            self._raise_abort(verdict)
            raise AbortedError(self.late_error([0]))
        return large_value if kind == LARGE else record[1:]

    def _wait_open(self, watch: Watch, door: str) -> None:
        """Returns when `door` is open. Raises the error in force, or makes one when the coordinator stands still."""
        stalls = StallWatch([0], time.monotonic(), self.deadline_s)
        while not watch.wait(self._slice_s):
            # Taken before looking: time that passes while this process is stopped is not held against rank 0.
            now = time.monotonic()
            try:
                verdict, tick = self._link.call(self._look_at_coordinator, stalls.left_s(0, now))
            except NoAnswerError:
                self._open(door)
                raise
            if is_abort(verdict):
                self._open(door)
                self._raise_abort(verdict)
            stalls.observe({0: tick}, now)
            if stalls.stalled([0], now):
                error: DckptError = self.late_error([0])
            elif self._total_s is not None and now - self._opened_at >= self._total_s + 2 * SLICE_S:
                error = messages.total_exceeded(self.what, self.phase, [0], self._total_s, self.consequence)
            else:
                continue
            try:
                self._abort_with(error)
            finally:
                # While the save is committing, others may still hear the conclusion at this door.
                if not self._committing_seen:
                    self._open(door)

    def _look_at_coordinator(self, store: RawStore) -> tuple[str, int]:
        return self._read_verdict(store), store.add(self._beat_key(0), 0)

    def _open(self, door: str) -> None:
        self._link.post(lambda store: store.compare_set(door, "", SEE_VERDICT.decode("ascii")))

    def _give_up_on_silence(self) -> NoReturn:
        error = messages.coordinator_silent(self.what, self.phase, self.deadline_s, self.consequence)
        text = messages.error_to_text(error)
        # Takes effect when the store answers again: a coordinator that was only stopped finds the abort.
        self._link.post(lambda store: store.compare_set(self._verdict_key, "", text))
        raise AbortedError(error)

    # -- heartbeat -----------------------------------------------------------------------------------------------

    def beat(self, progress: int) -> None:
        """Tells the others that this rank moves: `progress` is any number that changes with it. Cheap, never blocks."""
        if self._heartbeat.due(progress, time.monotonic()):
            self._post_beat()

    def tick(self, now: float) -> None:
        """A beat of a rank whose only work is to wait for others."""
        if self._heartbeat.tick(now):
            self._post_beat()

    def _post_beat(self) -> None:
        name = self._beat_key(self._topology.rank)
        self._link.post(lambda store: store.add(name, 1), droppable=True)

    def _beat_key(self, rank: int) -> str:
        return f"{self._prefix}/beat/{rank}"

    # -- the verdict ---------------------------------------------------------------------------------------------

    def verdict(self) -> Verdict:
        """What is in force now. Raises as `exchange` does when the store cannot be reached."""
        text = self._guarded(self._read_verdict)
        if not text:
            return Verdict("open")
        if text == COMMITTING:
            return Verdict("committing")
        return Verdict("abort", messages.error_from_text(text))

    def raise_if_aborted(self) -> None:
        """Raises the error of an abort that is in force. One round trip: for a pause in long work, not for each block."""
        error = self.verdict().error
        if error is not None:
            raise error

    def try_commit(self) -> None:
        """The coordinator's last word before the commit point: from here on the save can no longer be aborted.

        Raises the error of the abort when one came first.
        """
        self.phase = _COMMIT_PHASE
        text = self._guarded(lambda store: self._set_verdict(store, COMMITTING))
        if text != COMMITTING:
            self.is_closed = True
            raise messages.error_from_text(text)

    def abort(self, error: BaseException, *, phase: str | None = None) -> Literal["abort", "committing"]:
        """Aborts the session unless it is committing; returns what is in force. Any rank may, the first error stands.

        An error that is not already one about ranks becomes a `PeerFailedError` that names this rank and `phase` (default:
        that of the last exchange). What is in force is then in `error`. When the store cannot be reached the answer is
        this rank's own knowledge.
        """
        if isinstance(error, PeerFailedError | CoordinationTimeoutError):
            shared: DckptError = error
        else:
            failure = (type(error).__name__, messages.sentence(error))
            failures = {self._topology.rank: failure}
            shared = messages.peers_failed(self.what, phase or self.phase, failures, self.consequence)
        try:
            self._abort_with(shared)
        except AbortedError as aborted:
            if self._committing_seen:
                return COMMITTING
            self.error = aborted.error
        self.is_closed = True
        return "abort"

    def _abort_with(self, error: DckptError, *, cause: BaseException | None = None) -> NoReturn:
        """Sets the verdict to `error` and raises what is in force: an earlier abort wins."""
        text = messages.error_to_text(error)
        try:
            in_force = self._link.call(lambda store: self._set_verdict(store, text), min(self.deadline_s, 1.0))
        except (ContactLostError, NoAnswerError):
            in_force = text
            self.outcome_is_open = self.phase == _COMMIT_PHASE or self._payload_may_be_there
        if in_force == COMMITTING:
            self.outcome_is_open = True
        # When committing is in force the session cannot be aborted, and this rank's error is its own.
        raise AbortedError(error if in_force == COMMITTING else messages.error_from_text(in_force)) from cause

    def _set_verdict(self, store: RawStore, text: str) -> str:
        in_force = store.compare_set(self._verdict_key, "", text).decode("ascii")
        self._committing_seen = self._committing_seen or in_force == COMMITTING
        store.set(self._commit_door, SEE_VERDICT)
        return in_force

    def _read_verdict(self, store: RawStore) -> str:
        if not store.check([self._verdict_key]):
            return ""
        text = store.get(self._verdict_key).decode("ascii")
        self._committing_seen = self._committing_seen or text == COMMITTING
        return text

    def _raise_abort(self, verdict: str) -> None:
        if is_abort(verdict):
            raise AbortedError(messages.error_from_text(verdict))

    def _guarded(self, operation: Callable[[RawStore], str]) -> str:
        try:
            return self._link.call(operation, self.deadline_s)
        except ContactLostError:
            raise messages.coordinator_lost(self.what, self.phase, self.consequence) from None
        except NoAnswerError:
            raise messages.coordinator_silent(self.what, self.phase, self.deadline_s, self.consequence) from None

    # -- the conclusion ------------------------------------------------------------------------------------------

    def conclude(self, outcome: Outcome, detail: bytes = b"") -> None:
        """The coordinator tells every waiting rank how the save ended."""
        assert outcome in OUTCOMES, outcome
        large = f"{self._done_door}/detail"
        record = outcome.encode() + b"\n" + detail

        def tell(store: RawStore) -> str:
            announce(store, self._done_door, large, RESULT, record)
            store.set(self._commit_door, SEE_VERDICT)
            return ""

        with self._lock:
            self._written.append(large)
        self._guarded(tell)
        self.is_closed = True

    def await_conclusion(self) -> tuple[Outcome, bytes]:
        """How the save ended, as the coordinator concluded it.

        Raises the error of an abort. When the coordinator is lost or stands still: ("unknown", b"") if the save was
        committing, else the session is aborted and the named error raised (see `outcome_is_open`).
        """
        self.phase = _COMMIT_PHASE
        try:
            return self._await_conclusion()
        except AbortedError as aborted:
            raise aborted.error from None
        finally:
            self.is_closed = True

    def _await_conclusion(self) -> tuple[Outcome, bytes]:
        consequence = "Whether the checkpoint was committed is not known here; the next resume finds out."
        try:
            if not self._committing_seen:
                self._wait_open(self._link.watch(self._commit_door), self._commit_door)
                verdict = self._link.call(self._read_verdict, self.deadline_s)
                self._raise_abort(verdict)
            record = self._await_door(self._done_door, f"{self._done_door}/detail")
        except (ContactLostError, NoAnswerError) as trouble:
            if self._committing_seen:
                return "unknown", b""
            self.outcome_is_open = True
            if isinstance(trouble, NoAnswerError):
                self.consequence = consequence
                self._give_up_on_silence()
            lost = messages.coordinator_lost(self.what, self.phase, consequence)
            raise AbortedError(lost) from None
        except AbortedError:
            if self._committing_seen:
                return "unknown", b""
            raise
        outcome, _, detail = record.partition(b"\n")
        return next(name for name in OUTCOMES if name.encode() == outcome), detail

    # -- the end -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """This rank needs nothing more from the session; its keys go when two later ones of its kind were opened."""
        self.is_closed = True

    def take_written(self) -> list[str]:
        """The keys that this rank wrote and that go first; each is handed out once."""
        with self._lock:
            written, self._written = self._written, []
        return written

    def lasting_keys(self) -> list[str]:
        """The small keys from which a rank that comes much too late learns how the session ended."""
        if not self._topology.is_coordinator:
            return []
        return [self._verdict_key, self._subject_key, self._commit_door, self._done_door]
