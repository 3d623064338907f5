"""One save from the agreement on its plan to its outcome. Blocking and asynchronous saves are the same code."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from dckpt import failpoint
from dckpt.blocks.buffer import ImageBuffer
from dckpt.blocks.workers import ByteWorkers
from dckpt.blocks.write import WRITER_THREADS, write_shard_file
from dckpt.catalog.prune import find_leftovers, sweep
from dckpt.catalog.transaction import Transaction, read_attempt
from dckpt.dcp.chunks import local_chunks
from dckpt.engine.describe import describe_checkpoint
from dckpt.engine.job import Beginning, SaveJob, SaveRequest
from dckpt.engine.lineage import Lineage
from dckpt.engine.pending import Outcome, PendingSave
from dckpt.engine.plan import RankPlan, WriteItem, decide_layout, plan_files
from dckpt.engine.refusal import REFUSALS, encode_refusal, raise_refusals
from dckpt.engine.staging import LocalState, stage
from dckpt.errors import (
    ConfigError,
    CorruptCheckpointError,
    DckptError,
    PeerFailedError,
    StorageError,
    TransientStorageError,
    UnknownOutcomeError,
    from_wire,
    to_wire,
)
from dckpt.format.layout import checkpoint_name
from dckpt.format.manifest import FileEntry
from dckpt.format.shard_file import ShardFilePlan
from dckpt.format.values import dump_json, load_json
from dckpt.ranks.coordination import Coordination
from dckpt.ranks.messages import format_ranks
from dckpt.ranks.session import Session
from dckpt.ranks.topology import Topology
from dckpt.state.train_state import TrainState
from dckpt.storage.base import Storage

log = logging.getLogger(__name__)

MESSAGE_BYTES_MAX = 2**31
WARM_SLACK_BYTES = 2**20  # headers and records


def as_dckpt_error(error: BaseException) -> DckptError:
    """`error` itself if it is ours, else a `DckptError` with its type and text."""
    return error if isinstance(error, DckptError) else from_wire(to_wire(error))


class Saver:
    """Plans and stages on the caller's thread (`start`), writes and commits on any thread (`finish`)."""

    def __init__(
        self,
        storage: Storage,
        coordination: Coordination,
        topology: Topology,
        *,
        on_commit: Callable[[str], int],
    ) -> None:
        self._storage = storage
        self._coordination = coordination
        self._topology = topology
        self._on_commit = on_commit
        self._buffer = ImageBuffer()
        self._workers = ByteWorkers(WRITER_THREADS)
        self._saves = 0
        self.lineage = Lineage(storage)

    def warm(self, state: TrainState) -> None:
        """Begins to make the memory for this rank's files in the background, before the first save needs it.

        Only this rank is asked, so the size is an estimate: what several ranks hold alike is written by one of them.
        """
        try:
            nbytes = sum(
                chunk.tensor.nbytes // (1 if item.replication == "sharded" else self._topology.world_size)
                for item in state.capture().tensors
                for chunk in local_chunks(item.name, item.tensor)
            )
        except Exception as error:  # noqa: BLE001 - the first save meets it again and tells it on all ranks together
            log.debug("memory is not warmed: %s", error)
            return
        self._buffer.warm(nbytes + nbytes // 32 + WARM_SLACK_BYTES)

    def close(self) -> None:
        """Ends the writing threads, as far as they are not stuck."""
        self._buffer.stop_warming()
        self._workers.stop()

    def give_up(self, job: SaveJob, deadline_s: float) -> None:
        """Concludes a save whose writer is stuck in the kernel, and leaves that writer behind with its memory.

        The writer still owns its buffer: it may write from it whenever the storage answers again. Later saves get new
        memory and new threads.
        """
        error = TransientStorageError(
            f"{job.session.what}: {format_ranks([self._topology.rank])}: the storage did not answer for {deadline_s:g} s in "
            f"{self._storage.locate(job.checkpoint)}. The writer is left behind with {self._buffer.nbytes:,} bytes of "
            "memory. Check the mount; the previous checkpoint stands.",
            key=self._storage.locate(job.checkpoint),
        )
        verdict = job.session.abort(error, phase="write")
        self._buffer, self._workers = ImageBuffer(), ByteWorkers(WRITER_THREADS)
        if verdict == "abort":
            job.pending.conclude("failed", as_dckpt_error(job.session.error or error))
        else:
            job.pending.conclude("unknown", _unknown(job, error))

    def start(
        self,
        state: TrainState,
        request: SaveRequest,
        pending: PendingSave,
        hand_over: Callable[[SaveJob], None],
        *,
        started_s: float,
    ) -> None:
        """Agrees on the plan with all ranks, copies this rank's part and hands the rest over for `finish`.

        When it returns, the state may change. Every rank raises the same error if any rank failed; `pending` is then
        concluded. An interrupt of this thread after the hand-over leaves the save to the thread that took it.
        """
        begun = Beginning()
        try:
            session = self._open_session(request, begun)
            local, decision = self._agree_on_plan(state, request, session, begun)
            begun.phase = "stage"
            failpoint.reach("plan_agreed")
            files = self._files_to_write(local, decision)
            self._workers.start()
            images = stage(local, files, self._buffer)
            pending.checkpoint = decision["checkpoint"]
            pending.mark_staged()
            pending.seconds_stalled = time.monotonic() - started_s
            begun.job = SaveJob(
                pending=pending,
                session=session,
                checkpoint=decision["checkpoint"],
                attempt=decision["attempt"],
                files=[(plan, image) for (plan, _), image in zip(files, images, strict=True)],
                started_s=started_s,
                transaction=begun.transaction,
                manifest=begun.manifest,
                layout=begun.layout,
            )
            begun.job.note_storage()
            hand_over(begun.job)
        except BaseException as error:
            if begun.job is not None and not begun.job.claim():
                raise
            shared: BaseException = error
            try:
                shared = self._abort(begun.session, begun.transaction, error, phase=begun.phase)
            finally:
                # Also when a second interrupt comes here: whoever waits for this save must not wait for nobody.
                pending.conclude("failed", as_dckpt_error(shared))
            if shared is error or not isinstance(error, Exception):
                raise
            raise shared from error

    def _open_session(self, request: SaveRequest, begun: Beginning) -> Session:
        """The session of the next save. One that the other ranks gave up without this rank is left out."""
        while True:
            self._saves += 1
            session = begun.session = self._coordination.session(
                f"save-{self._saves}", what=f"save of step {request.step}", call=f"save(step={request.step})"
            )
            if not session.was_missed(f"{request.step}.{request.micro_step}", phase=begun.phase):
                return session
            session.close()
            log.warning(
                "rank %d did not call an earlier save, which the other ranks gave up; it joins again with step %d",
                self._topology.rank,
                request.step,
            )

    def _agree_on_plan(
        self, state: TrainState, request: SaveRequest, session: Session, begun: Beginning
    ) -> tuple[LocalState, dict[str, Any]]:
        local, failure = self._capture(state, request)
        refusal = failure if isinstance(failure, REFUSALS) else None

        def decide(payloads: list[bytes]) -> bytes:
            with self._naming_rank(session, "plan"):
                return self._decide(payloads, request, local, state, begun)

        payload = encode_refusal(refusal) if refusal else local.plan.encode() if local is not None else b""
        decision: dict[str, Any] = load_json(
            session.exchange("plan", payload, decide, error=None if refusal else failure),
            key="decision of the coordinator",
            limit=MESSAGE_BYTES_MAX,
        )
        assert local is not None
        return local, decision

    def _files_to_write(
        self, local: LocalState, decision: dict[str, Any]
    ) -> list[tuple[ShardFilePlan, list[WriteItem]]]:
        skips = [(tensor, box) for tensor, box in decision["skips"][self._topology.rank]]
        rank_tensors, rank_values = frozenset(decision["rank_tensors"]), frozenset(decision["rank_values"])
        return plan_files(self._topology.rank, local.plan, skips, rank_tensors, rank_values)

    def _capture(self, state: TrainState, request: SaveRequest) -> tuple[LocalState | None, BaseException | None]:
        try:
            if request.refusal is not None:
                raise request.refusal
            failpoint.reach("before_plan")
            coordinates = state.coordinates() or {"rank": self._topology.rank}
            world_size = self._topology.world_size
            return LocalState(state.capture(), request.step, request.micro_step, coordinates, world_size), None
        except Exception as error:  # noqa: BLE001 - it travels to all ranks, which raise it together
            return None, error

    def _abort(
        self, session: Session | None, transaction: Transaction | None, error: BaseException, *, phase: str
    ) -> BaseException:
        """Tells the other ranks and takes the attempt away; returns the error that all ranks raise."""
        is_aborted = session is None or session.is_closed or session.abort(error, phase=phase) == "abort"
        if transaction is not None and is_aborted:
            transaction.abandon()
        return error if session is None or session.error is None else session.error

    @contextlib.contextmanager
    def _naming_rank(self, session: Session, phase: str) -> Iterator[None]:
        """An error of the storage keeps its type and says which rank of which save met it."""
        try:
            yield
        except (StorageError, CorruptCheckpointError) as error:
            where = f"{session.what}: {format_ranks([self._topology.rank])} failed in phase {phase}: "
            raise type(error)(where + error.message, **error.fields()) from error

    def _decide(
        self,
        payloads: list[bytes],
        request: SaveRequest,
        local: LocalState | None,
        state: TrainState,
        begun: Beginning,
    ) -> bytes:
        """On the coordinator: from the plans of all ranks to one attempt, begun on storage."""
        raise_refusals(payloads)
        assert local is not None
        plans = [RankPlan.decode(payload) for payload in payloads]
        _ensure_same_step(plans)
        self._storage.ensure_root()
        is_new = self.lineage.generation is None
        generation = self.lineage.ensure_generation(self._topology.world_size)
        if is_new:
            self._sweep_leftovers()
        layout = decide_layout(plans)
        name = checkpoint_name(request.step, generation, request.micro_step)
        attempt = uuid.uuid4().hex
        begun.layout = layout
        begun.manifest = describe_checkpoint(
            request, local, layout, plans, state, run_id=self.lineage.run_id, generation=generation, attempt=attempt
        )
        begun.transaction = Transaction(self._storage, checkpoint=name, attempt=attempt, generation=generation)
        begun.transaction.begin()
        return dump_json(
            {
                "checkpoint": name,
                "attempt": attempt,
                "rank_tensors": layout.rank_tensors,
                "rank_values": layout.rank_values,
                "skips": layout.skips,
            }
        )

    def _sweep_leftovers(self) -> None:
        """Attempts of earlier generations are fenced now: a late commit of theirs finds its directory gone."""
        try:
            names = [item.name for item in find_leftovers(self._storage, older_than_s=0, now_unix_s=time.time())]
            if names:
                log.info("sweeping %d leftovers of attempts that never committed", len(names))
                sweep(self._storage, names)
        except (StorageError, CorruptCheckpointError) as error:
            # They take space and nothing else; the save at hand does not depend on it.
            log.warning("leftovers of earlier attempts stay: %s `dckpt prune --leftovers` removes them.", error)

    def finish(self, job: SaveJob) -> None:
        """Writes, agrees and commits; concludes `job.pending` whatever happens and never raises an `Exception`."""
        if not job.claim():
            return
        try:
            self._write_and_commit(job)
        except UnknownOutcomeError as error:
            job.pending.conclude("unknown", error)
        except Exception as error:  # noqa: BLE001 - the outcome carries it to the user
            job.pending.conclude("failed", self._in_its_type(error))
        except BaseException as error:
            job.pending.conclude("unknown", as_dckpt_error(error))
            raise

    def _in_its_type(self, error: Exception) -> DckptError:
        """A process without peers keeps the type of its own storage error, in the sentence that says where it failed."""
        cause = error.__cause__
        if self._topology.world_size == 1 and isinstance(error, PeerFailedError) and isinstance(cause, StorageError):
            return type(cause)(error.message, **cause.fields())
        return as_dckpt_error(error)

    def _write_and_commit(self, job: SaveJob) -> None:
        entries, failure = self._write(job)
        payload = dump_json([[e.path, e.size, e.digest, e.kind, e.rank] for e in entries])
        if job.transaction is None:
            self._write_and_await(job, payload, failure)
            return
        try:
            job.session.exchange("write", payload, lambda payloads: self._seal(job, payloads), error=failure)
            failpoint.reach("before_commit")
            job.session.try_commit()
        except BaseException as error:
            # Before `committing` nothing of this attempt can become visible any more: it may be taken away.
            shared = self._abort(job.session, job.transaction, error, phase="commit")
            if shared is error or not isinstance(error, Exception):
                raise
            raise shared from error
        self._publish(job, job.transaction)

    def _write_and_await(self, job: SaveJob, payload: bytes, failure: BaseException | None) -> None:
        """On the other ranks. Once the payload may have reached the coordinator, a lost contact decides nothing."""
        try:
            job.session.exchange("write", payload, _decide_nothing, error=failure)
            outcome, detail = job.session.await_conclusion()
        except DckptError as error:
            if not job.session.outcome_is_open:
                raise
            self._read_back(job, error)
            return
        if outcome == "committed":
            self._note_times(job)
            job.pending.conclude("committed")
        elif detail:
            raise from_wire(load_json(detail, key="conclusion", limit=MESSAGE_BYTES_MAX))
        else:
            self._read_back(job, None)

    def _write(self, job: SaveJob) -> tuple[list[FileEntry], BaseException | None]:
        staging = self._storage.staging_key(job.checkpoint, job.attempt)
        directory = f"{staging}/{job.attempt}"
        entries: list[FileEntry] = []

        def on_bytes(count: int) -> None:
            job.bytes_done += count
            job.note_storage()
            job.session.beat(job.bytes_done)

        workers = self._workers
        try:
            with job.in_storage():
                for plan, image in job.files:
                    entries += write_shard_file(
                        self._storage, directory, job.attempt, self._topology.rank, plan.file, image, on_bytes, workers
                    )
                # Each rank syncs the directory on its own node: on a shared file system only that client's view counts.
                self._storage.sync_dir(directory)
            failpoint.reach("after_directory_sync")
        except Exception as error:  # noqa: BLE001 - it travels to all ranks, which raise it together
            return [], error
        return entries, None

    def _seal(self, job: SaveJob, payloads: list[bytes]) -> bytes:
        """On the coordinator: compares the files with its own listing, writes index and manifest into the attempt."""
        assert job.transaction is not None
        assert job.layout is not None
        assert job.manifest is not None
        entries = [FileEntry(*row) for payload in payloads for row in _rows(payload)]
        _ensure_planned_sizes(job, entries)
        with job.in_storage(), self._naming_rank(job.session, "commit"):
            job.transaction.ensure_files(entries)
            # The others count the time since this rank's last beat: each of these may wait for the medium.
            job.session.beat(job.bytes_done + 1)
            index_entry = job.transaction.write_index(job.layout.index)
            job.session.beat(job.bytes_done + 2)
            job.transaction.stage_manifest(job.manifest((*entries, index_entry)))
        return b""

    def _publish(self, job: SaveJob, transaction: Transaction) -> None:
        # THE commit point. Before this line the attempt is not visible; after it the checkpoint exists.
        try:
            with job.in_storage(), self._naming_rank(job.session, "commit"):
                transaction.publish()
        except Exception as error:
            # An error without a type of ours was not foreseen: it may have come after the rename.
            is_failed = isinstance(error, DckptError) and not isinstance(error, UnknownOutcomeError)
            shared = error if is_failed else _unknown(job, error)
            self._tell(job, "failed" if is_failed else "unknown", dump_json(to_wire(shared)))
            transaction.abandon()
            if shared is error:
                raise
            raise shared from error
        self._note_times(job)
        self._tell(job, "committed", b"")
        self._report_commit(job)

    def _tell(self, job: SaveJob, outcome: Outcome, detail: bytes) -> None:
        """The outcome stands whether the others hear of it or not; those who do not hear read it back."""
        try:
            failpoint.reach("after_commit")
            job.session.conclude(outcome, detail)
        except Exception:  # nothing that happens here can take the commit back
            log.warning("step %d %s, but not every rank could be told", job.pending.step, outcome, exc_info=True)

    def _read_back(self, job: SaveJob, cause: Exception | None) -> None:
        """Contact was lost when the commit was possible: the medium decides. A name that is there and synced is a commit."""
        log.warning("%s; looking whether %s was committed", _reason(job, cause), job.checkpoint)
        try:
            with job.in_storage():
                is_ours = read_attempt(self._storage, job.checkpoint) == job.attempt
                if is_ours:
                    self._storage.sync_dir("")
            if is_ours:
                self._note_times(job)
                job.pending.conclude("committed")
                return
        except DckptError:
            log.warning("could not read back %s after the coordinator was lost", job.checkpoint, exc_info=True)
        raise _unknown(job, cause) from cause

    def _note_times(self, job: SaveJob) -> None:
        job.pending.seconds_to_durable = time.monotonic() - job.started_s

    def _report_commit(self, job: SaveJob) -> None:
        job.pending.conclude("committed")
        try:
            kept = self._on_commit(job.checkpoint)
        except Exception:
            # The commit stands whatever becomes of older checkpoints, and the saving thread must live on.
            log.exception("retention failed after the commit of %s", job.checkpoint)
            kept = 0
        log.info(
            "step %d committed as %s: durable after %.2f s, training stalled %.2f s, %d checkpoints kept, "
            "work at risk %.1f s",
            job.pending.step,
            job.checkpoint,
            job.pending.seconds_to_durable,
            job.pending.seconds_stalled,
            kept,
            time.monotonic() - job.started_s,
        )


def _unknown(job: SaveJob, cause: Exception | None) -> UnknownOutcomeError:
    """The error of a save that may have been committed, with what is known of the cause."""
    if isinstance(cause, UnknownOutcomeError):
        return cause
    return UnknownOutcomeError(
        f"{_reason(job, cause)}; {job.checkpoint} may have been committed or not. Nothing was cleaned up; the next resume "
        "finds out.",
        key=job.checkpoint,
    )


def _reason(job: SaveJob, cause: Exception | None) -> str:
    """What happened, in words that do not depend on the phase in which a rank noticed: the same on every rank."""
    if cause is None or job.session.outcome_is_open:
        return f"{job.session.what}: contact with the coordinator (rank 0) was lost after this rank had done its part"
    return f"{job.session.what}: {str(to_wire(cause)['message']).rstrip('.')}"


def _decide_nothing(payloads: list[bytes]) -> bytes:
    raise AssertionError(f"only the coordinator decides; {len(payloads)} payloads came here")


def _rows(payload: bytes) -> list[list[Any]]:
    rows: list[list[Any]] = load_json(payload, key="files of a rank", limit=MESSAGE_BYTES_MAX)
    return rows


def _ensure_same_step(plans: list[RankPlan]) -> None:
    steps = {(plan.step, plan.micro_step) for plan in plans}
    if len(steps) > 1:
        first = (plans[0].step, plans[0].micro_step)
        rank = next(r for r, plan in enumerate(plans) if (plan.step, plan.micro_step) != first)
        raise ConfigError(
            f"Save: rank 0 saves step {first[0]} (micro-step {first[1]}), rank {rank} step {plans[rank].step} (micro-step "
            f"{plans[rank].micro_step}); expected the same on every rank. Call progress.advance() on every rank."
        )


def _ensure_planned_sizes(job: SaveJob, entries: list[FileEntry]) -> None:
    """Pair assertion: what the ranks wrote is what the coordinator laid out in the index."""
    assert job.layout is not None
    planned = {f"{job.attempt}/{plan.file}": plan.size for files in job.layout.files for plan in files}
    written = {entry.path: entry.size for entry in entries if entry.kind == "shard"}
    assert planned == written, (planned, written)
