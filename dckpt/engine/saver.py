"""One save from the agreement on its plan to its outcome. Blocking and asynchronous saves are the same code."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dckpt import failpoint
from dckpt.blocks.buffer import ImageBuffer
from dckpt.blocks.write import write_shard_file
from dckpt.catalog.prune import find_leftovers, sweep
from dckpt.catalog.transaction import Transaction, read_attempt
from dckpt.engine.lineage import Lineage
from dckpt.engine.pending import Outcome, PendingSave
from dckpt.engine.plan import RankPlan, SaveLayout, decide_layout, plan_files
from dckpt.engine.refusal import REFUSALS, encode_refusal, raise_refusals
from dckpt.engine.staging import LocalState, stage
from dckpt.errors import ConfigError, DckptError, StorageError, UnknownOutcomeError, from_wire, to_wire
from dckpt.format.layout import checkpoint_name
from dckpt.format.manifest import FileEntry, Manifest, Mesh
from dckpt.format.shard_file import ShardFilePlan
from dckpt.format.values import dump_json, load_json
from dckpt.ranks.coordination import Coordination
from dckpt.ranks.session import Session
from dckpt.ranks.topology import Topology
from dckpt.resume.facts import collect_facts, writer_versions
from dckpt.state.rng import classify_streams
from dckpt.state.train_state import TrainState
from dckpt.storage.base import Storage

log = logging.getLogger(__name__)

MESSAGE_BYTES_MAX = 2**31


@dataclass
class SaveJob:
    """What the writing thread needs; nothing in it refers to live training state."""

    pending: PendingSave
    session: Session
    checkpoint: str
    attempt: str
    files: list[tuple[ShardFilePlan, memoryview]]
    started_s: float
    transaction: Transaction | None = None  # the coordinator's
    manifest: Callable[[tuple[FileEntry, ...]], Manifest] | None = None
    layout: SaveLayout | None = None
    bytes_done: int = field(default=0)


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """What the caller of `save` asked for."""

    step: int
    micro_step: int
    metrics: Mapping[str, float]


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
        self._saves = 0
        self.lineage = Lineage(storage)

    def start(self, state: TrainState, request: SaveRequest, pending: PendingSave) -> SaveJob:
        """Agrees on the plan with all ranks and copies this rank's part; when it returns, the state may change.

        Every rank raises the same error if any rank failed, and nothing is left to write.
        """
        started = time.monotonic()
        self._saves += 1
        step = request.step
        session = self._coordination.session(
            f"save-{self._saves}", what=f"save of step {step}", call=f"save(step={step})"
        )
        local, failure = self._capture(state, request)
        refusal = failure if isinstance(failure, REFUSALS) else None
        context: dict[str, Any] = {}

        def decide(payloads: list[bytes]) -> bytes:
            return self._decide(payloads, request, local, state, context)

        payload = encode_refusal(refusal) if refusal else local.plan.encode() if local is not None else b""
        decision = load_json(
            session.exchange("plan", payload, decide, error=None if refusal else failure),
            key="decision of the coordinator",
            limit=MESSAGE_BYTES_MAX,
        )
        assert local is not None
        try:
            failpoint.reach("plan_agreed")
            skips = [(tensor, box) for tensor, box in decision["skips"][self._topology.rank]]
            files = plan_files(
                self._topology.rank,
                local.plan,
                skips,
                frozenset(decision["rank_tensors"]),
                frozenset(decision["rank_values"]),
            )
            images = stage(local, files, self._buffer)
        except BaseException as error:
            self._abort(session, context.get("transaction"), error)
            raise
        pending.checkpoint = decision["checkpoint"]
        pending.mark_staged()
        return SaveJob(
            pending=pending,
            session=session,
            checkpoint=decision["checkpoint"],
            attempt=decision["attempt"],
            files=[(plan, image) for (plan, _), image in zip(files, images, strict=True)],
            started_s=started,
            transaction=context.get("transaction"),
            manifest=context.get("manifest"),
            layout=context.get("layout"),
        )

    def _capture(self, state: TrainState, request: SaveRequest) -> tuple[LocalState | None, BaseException | None]:
        try:
            failpoint.reach("before_plan")
            coordinates = state.coordinates() or {"rank": self._topology.rank}
            return LocalState(state.capture(), request.step, request.micro_step, coordinates), None
        except Exception as error:  # noqa: BLE001 - it travels to all ranks, which raise it together
            return None, error

    def _abort(self, session: Session, transaction: Transaction | None, error: BaseException) -> None:
        verdict = session.abort(as_dckpt_error(error))
        if transaction is not None and verdict == "abort":
            transaction.abandon()

    def _decide(
        self,
        payloads: list[bytes],
        request: SaveRequest,
        local: LocalState | None,
        state: TrainState,
        context: dict[str, Any],
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
        transaction = Transaction(self._storage, checkpoint=name, attempt=attempt, generation=generation)
        transaction.begin()
        base = self._describe(request, local, layout, plans, generation, attempt, state)
        context.update(transaction=transaction, layout=layout, manifest=base)
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
        names = [item.name for item in find_leftovers(self._storage, older_than_s=0, now_unix_s=time.time())]
        if names:
            log.info("sweeping %d leftovers of attempts that never committed", len(names))
            sweep(self._storage, names)

    def _describe(
        self,
        request: SaveRequest,
        local: LocalState,
        layout: SaveLayout,
        plans: list[RankPlan],
        generation: int,
        attempt: str,
        state: TrainState,
    ) -> Callable[[tuple[FileEntry, ...]], Manifest]:
        rng = classify_streams([plan.rng for plan in plans], [plan.coordinates for plan in plans])
        mesh = state.mesh_axes()
        kept_by_rank = frozenset(layout.rank_values)
        captured = local.captured
        values = {name: value for name, value in captured.values.items() if name not in kept_by_rank}
        coordinates = [tuple(plan.coordinates.values()) for plan in plans] if mesh else None
        created = time.time()
        facts = collect_facts(state)

        def build(files: tuple[FileEntry, ...]) -> Manifest:
            return Manifest(
                run_id=self.lineage.run_id,
                step=request.step,
                micro_step=request.micro_step,
                generation=generation,
                attempt=attempt,
                created_unix_s=created,
                world_size=len(plans),
                mesh=Mesh(axes=tuple(mesh), shape=tuple(mesh.values())) if mesh else None,
                coordinates=tuple(coordinates) if coordinates else None,
                parts=captured.parts,
                values=values,
                planner_data=None,
                rank_tensors=layout.rank_tensors,
                rank_values=layout.rank_values,
                aliases=dict(captured.aliases),
                rng=rng,
                facts=facts,
                metrics=dict(request.metrics),
                writer=writer_versions(),
                files=files,
            )

        return build

    def finish(self, job: SaveJob) -> None:
        """Writes, agrees and commits; concludes `job.pending` whatever happens and never raises an `Exception`."""
        try:
            self._write_and_commit(job)
        except UnknownOutcomeError as error:
            job.pending.conclude("unknown", error)
        except Exception as error:  # noqa: BLE001 - the outcome carries it to the user
            job.pending.conclude("failed", as_dckpt_error(error))
        except BaseException as error:
            job.pending.conclude("unknown", as_dckpt_error(error))
            raise

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
        except BaseException:
            # Before `committing` nothing of this attempt can become visible any more: it may be taken away.
            job.transaction.abandon()
            raise
        self._publish(job, job.transaction)

    def _write_and_await(self, job: SaveJob, payload: bytes, failure: BaseException | None) -> None:
        """On the other ranks. Once the payload may have reached the coordinator, a lost contact decides nothing."""
        try:
            job.session.exchange("write", payload, _decide_nothing, error=failure)
            outcome, detail = job.session.await_conclusion()
        except DckptError:
            if not job.session.outcome_is_open:
                raise
            log.warning("contact was lost while step %d was committed", job.pending.step, exc_info=True)
            outcome, detail = "unknown", b""
        if outcome == "committed":
            self._note_times(job)
            job.pending.conclude("committed")
        elif outcome == "failed":
            raise from_wire(load_json(detail, key="conclusion", limit=MESSAGE_BYTES_MAX))
        else:
            self._read_back(job, detail)

    def _write(self, job: SaveJob) -> tuple[list[FileEntry], BaseException | None]:
        staging = self._storage.staging_key(job.checkpoint, job.attempt)
        directory = f"{staging}/{job.attempt}"
        entries: list[FileEntry] = []

        def on_bytes(count: int) -> None:
            job.bytes_done += count
            job.session.beat(job.bytes_done)

        try:
            for plan, image in job.files:
                entries += write_shard_file(
                    self._storage, directory, job.attempt, self._topology.rank, plan.file, image, on_bytes
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
        job.transaction.ensure_files(entries)
        index_entry = job.transaction.write_index(job.layout.index)
        job.transaction.stage_manifest(job.manifest((*entries, index_entry)))
        return b""

    def _publish(self, job: SaveJob, transaction: Transaction) -> None:
        # THE commit point. Before this line the attempt is not visible; after it the checkpoint exists.
        try:
            transaction.publish()
        except UnknownOutcomeError as error:
            self._tell(job, "unknown", dump_json(to_wire(error)))
            raise
        except Exception as error:
            self._tell(job, "failed", dump_json(to_wire(error)))
            transaction.abandon()
            raise
        failpoint.reach("after_commit")
        self._tell(job, "committed", b"")
        self._report_commit(job)

    def _tell(self, job: SaveJob, outcome: Outcome, detail: bytes) -> None:
        """The outcome stands whether the others hear of it or not; those who do not hear read it back."""
        try:
            job.session.conclude(outcome, detail)
        except DckptError:
            log.warning("step %d %s, but not every rank could be told", job.pending.step, outcome, exc_info=True)

    def _read_back(self, job: SaveJob, detail: bytes) -> None:
        """Contact was lost after `committing`: the medium decides. A name that is there and synced is a commit."""
        if detail:
            raise from_wire(load_json(detail, key="conclusion", limit=MESSAGE_BYTES_MAX))
        try:
            found = read_attempt(self._storage, job.checkpoint)
            if found == job.attempt:
                self._storage.sync_dir("")
                self._note_times(job)
                job.pending.conclude("committed")
                return
        except StorageError:
            log.warning("could not read back %s after the coordinator was lost", job.checkpoint, exc_info=True)
        raise UnknownOutcomeError(
            f"Save of step {job.pending.step}: the coordinator was lost while it committed {job.checkpoint}; whether the "
            "checkpoint exists is not known. Nothing was cleaned up; the next resume will find out.",
            key=job.checkpoint,
        )

    def _note_times(self, job: SaveJob) -> None:
        job.pending.seconds_to_durable = time.monotonic() - job.started_s

    def _report_commit(self, job: SaveJob) -> None:
        self._note_times(job)
        job.pending.conclude("committed")
        kept = self._on_commit(job.checkpoint)
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
