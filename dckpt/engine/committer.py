"""From staged images to an outcome: writes this rank's files, agrees with the others, commits. Runs on the saving thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from dckpt import failpoint
from dckpt.blocks.buffer import Pin
from dckpt.blocks.source import FileSource
from dckpt.blocks.take_over import Place, take_over
from dckpt.blocks.write import WriterPool, checksum_source, write_shard_file
from dckpt.catalog.transaction import Transaction, read_attempt
from dckpt.engine.attempt import MESSAGE_BYTES_MAX, abort_attempt, as_dckpt_error, naming_rank
from dckpt.engine.job import SaveJob
from dckpt.engine.pending import Outcome
from dckpt.engine.reuse import ReusableFiles, reusable_files
from dckpt.errors import (
    DckptError,
    PeerFailedError,
    StorageError,
    UnknownOutcomeError,
    from_wire,
    to_wire,
)
from dckpt.format.index import LayoutIndex
from dckpt.format.manifest import FileEntry
from dckpt.format.shard_file import ShardFilePlan
from dckpt.format.values import dump_json, load_json
from dckpt.planning.indexing import RankReport
from dckpt.ranks.topology import Topology
from dckpt.storage.base import Storage

log = logging.getLogger(__name__)


class Committer:
    """Finishes one save after another. `pool` holds its writing threads; a stuck one is replaced by `leave_behind`.

    reusable: what the next save may take over.
    """

    def __init__(
        self,
        storage: Storage,
        topology: Topology,
        *,
        on_commit: Callable[[str], int],
        rewrite_every: int,
        pin: Pin = lambda _: None,
    ) -> None:
        """`pin`: page-locks the memory of the writing threads for a device. `rewrite_every`: see `Checkpointer`."""
        self._storage = storage
        self._topology = topology
        self._on_commit = on_commit
        self._pin = pin
        self.pool = WriterPool(pin=pin)
        self._rewrite_every = rewrite_every
        self.reusable = ReusableFiles()

    def adopt(self, checkpoint: str, entries: Sequence[FileEntry]) -> None:
        """`checkpoint` was committed or loaded: files of it that do not change need not be written again."""
        self.reusable = reusable_files(checkpoint, entries, rewrite_every=self._rewrite_every)

    def leave_behind(self) -> None:
        """New threads for later saves; those that the kernel does not give back keep what they hold."""
        self.pool = WriterPool(pin=self._pin)

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
        job.entries, failure = self._write(job)
        rows = [_row(entry) for entry in job.entries]
        payload = dump_json([rows, None if job.report is None else job.report.to_json()], limit=MESSAGE_BYTES_MAX)
        if job.transaction is None:
            self._write_and_await(job, payload, failure)
            return
        try:
            job.session.exchange("write", payload, lambda payloads: self._seal(job, payloads), error=failure)
            failpoint.reach("before_commit")
            job.session.try_commit()
        except BaseException as error:
            # Before `committing` nothing of this attempt can become visible any more: it may be taken away.
            shared = abort_attempt(job.session, job.transaction, error, phase="commit")
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
            self._conclude_committed(job)
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

        pool = self.pool
        try:
            if job.deferred is not None:
                job.deferred.result()
            with job.in_storage():
                for plan, source in job.files:
                    place = Place(directory, job.attempt, self._topology.rank, plan.file)
                    entries += self._write_file(job, plan, source, place, on_bytes, pool)
                # Each rank syncs the directory on its own node: on a shared file system only that client's view counts.
                self._storage.sync_dir(directory)
            failpoint.reach("after_directory_sync")
        except Exception as error:  # noqa: BLE001 - it travels to all ranks, which raise it together
            return [], error
        return entries, None

    def _write_file(
        self,
        job: SaveJob,
        plan: ShardFilePlan,
        source: FileSource,
        place: Place,
        on_bytes: Callable[[int], None],
        pool: WriterPool,
    ) -> list[FileEntry]:
        """Takes the file over from an earlier checkpoint if it did not change, and writes it otherwise."""
        if plan.is_separate and source.size in self.reusable.sizes:
            sums = checksum_source(source, on_bytes, pool)
            found = self.reusable.find(source.size, sums.digest, place.name)
            taken = None
            if found is not None:
                taken = take_over(self._storage, found, sums, place, may_refer=job.may_refer)
            if taken is not None:
                return taken
        return write_shard_file(
            self._storage, place.directory, place.attempt, place.rank, place.name, source, on_bytes, pool
        )

    def _seal(self, job: SaveJob, payloads: list[bytes]) -> bytes:
        """On the coordinator: compares the files with its own listing, writes index and manifest into the attempt."""
        assert job.transaction is not None
        assert job.known is not None
        assert job.manifest is not None
        found = [_report(payload) for payload in payloads]
        entries = job.entries = [entry for rank_entries, _ in found for entry in rank_entries]
        index = job.known.index_from([report for _, report in found])
        _ensure_planned_sizes(index, entries)
        with job.in_storage(), naming_rank(self._topology, job.session, "commit"):
            job.transaction.ensure_files(entries)
            # The others count the time since this rank's last beat: each of these may wait for the medium.
            job.session.beat(job.bytes_done + 1)
            index_entry = job.transaction.write_index(index)
            job.session.beat(job.bytes_done + 2)
            job.transaction.stage_manifest(job.manifest((*entries, index_entry)))
        return b""

    def _publish(self, job: SaveJob, transaction: Transaction) -> None:
        # THE commit point. Before this line the attempt is not visible; after it the checkpoint exists.
        try:
            with job.in_storage(), naming_rank(self._topology, job.session, "commit"):
                transaction.publish()
        except Exception as error:
            # An error without a type of ours was not foreseen: it may have come after the rename.
            is_failed = isinstance(error, DckptError) and not isinstance(error, UnknownOutcomeError)
            shared = error if is_failed else unknown_outcome(job, error)
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
                self._conclude_committed(job)
                return
        except DckptError:
            log.warning("could not read back %s after the coordinator was lost", job.checkpoint, exc_info=True)
        raise unknown_outcome(job, cause) from cause

    def _conclude_committed(self, job: SaveJob) -> None:
        self._note_times(job)
        self.adopt(job.checkpoint, job.entries)
        job.pending.conclude("committed")

    def _note_times(self, job: SaveJob) -> None:
        job.pending.seconds_to_durable = time.monotonic() - job.started_s
        if not job.pending.staged:  # the caller waited for all of it
            job.pending.seconds_stalled = job.pending.seconds_to_durable

    def _report_commit(self, job: SaveJob) -> None:
        self.adopt(job.checkpoint, job.entries)
        job.pending.conclude("committed")
        try:
            kept = self._on_commit(job.checkpoint)
        except Exception:
            # The commit stands whatever becomes of older checkpoints, and the saving thread must live on.
            log.exception("retention failed after the commit of %s", job.checkpoint)
            kept = 0
        log.info(
            "step %d committed as %s: durable after %.2f s, training stalled %.2f s, checkpoints kept: %d, "
            "work at risk %.1f s",
            job.pending.step,
            job.checkpoint,
            job.pending.seconds_to_durable,
            job.pending.seconds_stalled,
            kept,
            time.monotonic() - job.started_s,
        )


def unknown_outcome(job: SaveJob, cause: Exception | None) -> UnknownOutcomeError:
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


def _row(entry: FileEntry) -> list[object]:
    """What the coordinator is told of a file: as many fields as differ from what most files have."""
    taken_over = [entry.checkpoint, entry.reused] if entry.checkpoint or entry.reused else []
    return [entry.path, entry.size, entry.digest, entry.kind, entry.rank, *taken_over]


def _report(payload: bytes) -> tuple[list[FileEntry], RankReport | None]:
    rows, report = load_json(payload, key="files of a rank", limit=MESSAGE_BYTES_MAX)
    return [FileEntry(*row) for row in rows], None if report is None else RankReport.from_json(report)


def _ensure_planned_sizes(index: LayoutIndex, entries: list[FileEntry]) -> None:
    """Pair assertion: what the ranks wrote is what the coordinator laid out in the index."""
    planned = dict(zip(index.files, index.file_extents(), strict=True))
    written = {entry.name: entry.size for entry in entries if entry.kind == "shard"}
    assert planned == written, (planned, written)
