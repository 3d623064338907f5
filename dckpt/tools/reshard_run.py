"""Carries a reshard out: every process writes the files of its share of the new ranks, one commits, all tell the same."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from dckpt import failpoint
from dckpt.blocks.gather import Gathered, GatheredSource, SpanMemory
from dckpt.blocks.verified_files import VerifiedFiles
from dckpt.blocks.write import WriterPool, write_shard_file
from dckpt.catalog.generations import create_generation
from dckpt.catalog.prune import find_leftovers, sweep
from dckpt.catalog.transaction import Transaction
from dckpt.errors import (
    ConfigError,
    CorruptCheckpointError,
    DckptError,
    StorageError,
    StorageFullError,
    UnknownOutcomeError,
    from_wire,
    to_wire,
)
from dckpt.format.manifest import FileEntry, Manifest
from dckpt.format.values import dump_json, load_json
from dckpt.planning.files import FilePlans
from dckpt.planning.indexing import RankReport, report_files
from dckpt.ranks.session import Session
from dckpt.ranks.topology import Topology
from dckpt.storage.base import Storage
from dckpt.tools.destination import Destination, choose_destination, open_destination
from dckpt.tools.reshard import Prepared, ReshardPlan, describe_plan, is_laid_out, open_source, origin_of, prepare
from dckpt.version import __version__

log = logging.getLogger(__name__)

MESSAGE_BYTES_MAX = 2**31
SLACK_BYTES = 2**20  # index and manifest, as far as they are not known yet


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ReshardRequest:
    """What to reshard, where to, and for which mesh; the same on every process."""

    source: str
    destination: str
    world_size: int | None = None
    axes: Mapping[str, int] | None = None

    def prepare(self) -> Prepared | None:
        """The layout to write; None if the checkpoint has it already."""
        source = open_source(self.source)
        if is_laid_out(source, self.world_size, self.axes):
            return None
        return prepare(source, self.world_size, self.axes)


@dataclass(frozen=True, slots=True)
class ReshardWatch:
    """How a caller follows it: this process writes so many bytes of a checkpoint in all; so many more were written."""

    on_start: Callable[[str, int], None] | None = None
    on_bytes: Callable[[int], None] | None = None


@dataclass(frozen=True, slots=True)
class ReshardResult:
    """What was committed, and what it took. `plan` is the coordinator's; None on the other processes."""

    plan: ReshardPlan | None
    checkpoint: str
    duration_s: float


def show_reshard(request: ReshardRequest) -> ReshardPlan | None:
    """The plan alone: nothing is created. None if there is nothing to do."""
    prepared = request.prepare()
    if prepared is None:
        return None
    destination = _choose(request, prepared)
    return describe_plan(prepared, destination, [prepared.size_of(rank) for rank in range(prepared.mesh.world_size)])


def _choose(request: ReshardRequest, prepared: Prepared) -> Destination:
    source = prepared.source
    run = source.storage if source.is_in_run else None
    return choose_destination(request.destination, source.manifest, source.sha256, run)


class ReshardRun:
    """One reshard on one process of `topology`; `session` is open between all of them.

    Nothing is visible before the commit; after any error the source is untouched and the destination has no new checkpoint.
    Every process raises the same error, in its own type where it is one of ours.
    """

    def __init__(
        self, request: ReshardRequest, session: Session, topology: Topology, watch: ReshardWatch | None = None
    ) -> None:
        self._request = request
        self._session = session
        self._topology = topology
        self._watch = watch or ReshardWatch()
        self._begun = _Begun()
        self._bytes_done = 0

    def run(self) -> ReshardResult | None:
        """Writes and commits; None if there is nothing to do."""
        started_s = time.monotonic()
        try:
            prepared = self._begin()
            if prepared is None:
                return None
            failure, written = _caught(lambda: self._write(prepared))
            payload = dump_json(written or [], limit=MESSAGE_BYTES_MAX)
            self._exchange("write", payload, failure, lambda payloads: self._seal(prepared, payloads))
            if self._topology.is_coordinator:
                self._session.try_commit()
            else:
                self._await_conclusion()
        except BaseException as error:
            # Before the commit nothing of this attempt is visible: it may be taken away.
            self._give_up(error)
            raise
        if self._topology.is_coordinator:
            self._publish()
        return ReshardResult(self._begun.plan, self._begun.checkpoint, time.monotonic() - started_s)

    def _own_ranks(self, prepared: Prepared) -> range:
        """The new ranks whose files this process writes."""
        return range(self._topology.rank, prepared.mesh.world_size, self._topology.world_size)

    # -- agreement -----------------------------------------------------------------------------------------------------

    def _exchange(
        self, phase: str, payload: bytes, failure: Exception | None, decide: Callable[[list[Any]], bytes]
    ) -> bytes:
        """As `Session.exchange`; an error of ours keeps its type on every process and says which one met it."""
        failed = failure if failure is not None and not isinstance(failure, DckptError) else None
        ours = None if not isinstance(failure, DckptError) else to_wire(failure)
        message = dump_json({"error": ours, "payload": payload.decode()}, limit=MESSAGE_BYTES_MAX)

        def decide_together(messages: list[bytes]) -> bytes:
            found = [load_json(text, key="message of a process", limit=MESSAGE_BYTES_MAX) for text in messages]
            for rank, record in enumerate(found):
                if record["error"] is not None:
                    raise self._located(from_wire(record["error"]), rank, phase)
            payloads = [load_json(r["payload"].encode(), key="payload", limit=MESSAGE_BYTES_MAX) for r in found]
            try:
                return decide(payloads)
            except DckptError as error:
                raise self._located(error, 0, phase) from error

        return self._session.exchange(phase, message, decide_together, error=failed)

    def _located(self, error: DckptError, rank: int, phase: str) -> DckptError:
        if self._topology.world_size == 1:
            return error
        text = f"{self._session.what}: process {rank} failed in phase {phase}: {error.message}"
        return type(error)(text, **error.fields())

    def _begin(self) -> Prepared | None:
        """Every process plans for itself; the coordinator sees that they plan the same and begins the attempt."""

        def plan() -> tuple[Prepared | None, list[Any]]:
            prepared = self._request.prepare()
            if prepared is None:
                return None, ["nothing to do", "", []]
            sizes = [prepared.size_of(rank) for rank in self._own_ranks(prepared)]
            return prepared, [prepared.source.sha256, str(prepared.mesh), sizes]

        failure, planned = _caught(plan)
        prepared, payload = planned or (None, [])
        message = dump_json(payload, limit=MESSAGE_BYTES_MAX)
        answer = self._exchange("plan", message, failure, lambda payloads: self._decide_begin(prepared, payloads))
        if prepared is not None:
            self._begun.checkpoint, self._begun.attempt = load_json(answer, key="decision", limit=MESSAGE_BYTES_MAX)
            if self._watch.on_start is not None:
                self._watch.on_start(self._begun.checkpoint, sum(nbytes for _, nbytes in payload[2]))
        return prepared

    def _decide_begin(self, prepared: Prepared | None, payloads: list[Any]) -> bytes:
        """On the coordinator: the destination is chosen, there is room, and the attempt's directories are made."""
        first = payloads[0][:2]
        for rank, (sha256, mesh, _) in enumerate(payloads):
            if [sha256, mesh] != first:
                raise ConfigError(
                    "expected every process to read the same checkpoint and to be told the same mesh, found "
                    f"{sha256[:12]} for {mesh} on process {rank} and {first[0][:12]} for {first[1]} on process 0. Start them "
                    "together, on the same storage."
                )
        if prepared is None:
            return b"null"
        sizes = [(int(count), int(nbytes)) for _, _, rows in payloads for count, nbytes in rows]
        begun = self._begun
        destination = begun.destination = _choose(self._request, prepared)
        plan = begun.plan = describe_plan(prepared, destination, sizes)
        ensure_room(plan, destination.storage)
        attempt = uuid.uuid4().hex
        begun.transaction = Transaction(
            destination.storage,
            checkpoint=destination.checkpoint,
            attempt=attempt,
            generation=destination.generation,
        )
        begun.transaction.begin()
        return dump_json([destination.checkpoint, attempt])

    # -- the bytes -----------------------------------------------------------------------------------------------------

    def _write(self, prepared: Prepared) -> list[Any]:
        """The files of this process's ranks, durable, with their directory; what the coordinator must know of them."""
        source, listed = prepared.source, prepared.layout.decision.layout.listed
        storage = open_destination(self._request.destination, source.manifest)
        attempt = self._begun.attempt
        directory = f"{storage.staging_key(self._begun.checkpoint, attempt)}/{attempt}"
        pool, spans = WriterPool(), SpanMemory()
        written = []
        try:
            with VerifiedFiles(source.storage, source.name, source.manifest, source.index) as files:
                for rank in self._own_ranks(prepared):
                    plans = prepared.layout.files(rank)
                    sources = _gather(prepared, rank, plans, files, spans)
                    entries: list[FileEntry] = []
                    for (plan, _), found in zip(plans, sources, strict=True):
                        entries += write_shard_file(
                            storage, directory, attempt, rank, plan.file, found, self._note_bytes, pool
                        )
                    rows = [[e.path, e.size, e.digest, e.kind, e.rank] for e in entries]
                    written.append([rank, rows, report_files(plans, listed).to_json()])
            # Each process syncs the directory on its own node: on a shared file system only that client's view counts.
            storage.sync_dir(directory)
        finally:
            pool.stop()
        failpoint.reach("after_directory_sync")
        return written

    def _note_bytes(self, count: int) -> None:
        self._bytes_done += count
        self._session.beat(self._bytes_done)
        if self._watch.on_bytes is not None:
            self._watch.on_bytes(count)

    # -- the commit ----------------------------------------------------------------------------------------------------

    def _seal(self, prepared: Prepared, payloads: list[Any]) -> bytes:
        """On the coordinator: compares the files with its own listing; index, manifest and generation become durable."""
        transaction, destination = self._begun.transaction, self._begun.destination
        assert transaction is not None
        assert destination is not None
        rows = sorted((row for payload in payloads for row in payload), key=lambda row: int(row[0]))
        entries = tuple(FileEntry(*entry) for _, files, _ in rows for entry in files)
        reports = [RankReport.from_json(report) for _, _, report in rows]
        index = prepared.layout.index(reports)
        transaction.ensure_files(entries)
        self._session.beat(self._bytes_done + 1)
        index_entry = transaction.write_index(index)
        self._session.beat(self._bytes_done + 2)
        transaction.stage_manifest(_new_manifest(prepared, destination, self._begun.attempt, (*entries, index_entry)))
        if destination.generation:
            # Just before the commit, so that a reshard that fails leaves the line as it is.
            failpoint.reach("before_generation")
            create_generation(
                destination.storage,
                destination.record(prepared.mesh.world_size),
                expected_newest=destination.observed,
            )
            failpoint.reach("after_generation")
        return b""

    def _publish(self) -> None:
        # THE commit point. Before this line the attempt is not visible; after it the checkpoint exists.
        transaction, destination = self._begun.transaction, self._begun.destination
        assert transaction is not None
        assert destination is not None
        failpoint.reach("before_commit")
        try:
            transaction.publish()
        except DckptError as error:
            is_unknown = isinstance(error, UnknownOutcomeError)
            self._session.conclude("unknown" if is_unknown else "failed", dump_json(to_wire(error)))
            transaction.abandon()
            raise
        try:
            failpoint.reach("after_commit")
            self._session.conclude("committed")
        except DckptError:
            # Nothing that happens here can take the commit back; who does not hear of it looks for himself.
            log.warning("%s is committed, but not every process could be told", destination.checkpoint, exc_info=True)
        if destination.generation:
            self._sweep(destination.storage)

    def _sweep(self, storage: Storage) -> None:
        """Attempts of earlier generations are fenced now: a late commit of theirs finds its directory gone."""
        try:
            sweep(storage, [item.name for item in find_leftovers(storage, older_than_s=0, now_unix_s=time.time())])
        except (StorageError, CorruptCheckpointError) as error:
            # They take space and nothing else.
            log.warning("leftovers of earlier attempts stay: %s `dckpt prune --leftovers` removes them.", error)

    def _await_conclusion(self) -> None:
        outcome, detail = self._session.await_conclusion()
        if outcome == "committed":
            return
        if detail:
            raise from_wire(load_json(detail, key="conclusion", limit=MESSAGE_BYTES_MAX))
        raise UnknownOutcomeError(
            f"{self._session.what}: contact with process 0 was lost when it committed; {self._begun.checkpoint} may be there or "
            "not. `dckpt ls` shows it.",
            key=self._begun.checkpoint,
        )

    def _give_up(self, error: BaseException) -> None:
        is_aborted = self._session.is_closed or self._session.abort(error) == "abort"
        if self._begun.transaction is not None and is_aborted:
            self._begun.transaction.abandon()


@dataclass
class _Begun:
    """How far it came. destination, plan and transaction: the coordinator's."""

    checkpoint: str = ""
    attempt: str = ""
    destination: Destination | None = None
    plan: ReshardPlan | None = field(default=None, repr=False)
    transaction: Transaction | None = None


def ensure_room(plan: ReshardPlan, storage: Storage) -> None:
    """`StorageFullError` if the destination says that it has not the bytes that the plan writes."""
    needed = plan.num_bytes + SLACK_BYTES
    if plan.free_bytes is not None and plan.free_bytes < needed:
        raise StorageFullError(
            f"{storage.url}: expected {needed:,} bytes of free space for the resharded checkpoint, found {plan.free_bytes:,}. "
            "Nothing was written: free space (`dckpt prune` removes checkpoints and leftovers), or choose another place.",
            key=storage.url,
        )


def _gather(
    prepared: Prepared, rank: int, plans: FilePlans, files: VerifiedFiles, spans: SpanMemory
) -> list[GatheredSource]:
    """Where the bytes of a rank's files come from."""
    layout, index = prepared.layout, prepared.source.index
    boxes, rows = layout.boxes(rank), layout.structure.rows
    sources = []
    for plan, items in plans:
        tensors: list[Gathered | bytes] = []
        for item in items:
            if isinstance(item.source, str):
                assert prepared.streams is not None, item.source
                # Spaces fill the place that is kept for a longer text; JSON ignores them.
                tensors.append(prepared.streams.record(rank).ljust(item.shard_tensor.nbytes))
            else:
                number, place = item.source
                box = boxes[number][place]
                chunks = index.chunks_overlapping(layout.sources[rows[number].name], *box)
                tensors.append(Gathered(box, tuple(chunks)))
        sources.append(GatheredSource(plan, tensors, files, spans))
    return sources


def _new_manifest(prepared: Prepared, destination: Destination, attempt: str, files: tuple[FileEntry, ...]) -> Manifest:
    """The source's manifest, for other ranks."""
    old, mesh = prepared.source.manifest, prepared.mesh
    places = tuple(tuple(mesh.coordinates(rank).values()) for rank in range(mesh.world_size))
    return replace(
        old,
        run_id=destination.run_id,
        generation=destination.generation,
        attempt=attempt,
        created_unix_s=time.time(),
        world_size=mesh.world_size,
        mesh=mesh.mesh,
        coordinates=places if mesh.is_named else None,
        values=prepared.values,
        rank_tensors=(),
        rank_values=tuple(sorted(prepared.layout.decision.layout.rank_values)),
        rng=prepared.rng,
        writer={**old.writer, "dckpt": __version__},
        lineage=origin_of(prepared),
        files=files,
    )


def _caught(work: Callable[[], T]) -> tuple[Exception | None, T | None]:
    """The error of `work` as a value: it travels to all processes, which raise it together."""
    try:
        return None, work()
    except Exception as error:  # noqa: BLE001 - raised by the exchange that follows, on every process
        return error, None
