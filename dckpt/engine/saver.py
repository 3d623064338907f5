"""One save from the agreement on its plan to its outcome. Blocking and asynchronous saves are the same code."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dckpt import failpoint
from dckpt.blocks.buffer import ImageBuffer
from dckpt.blocks.source import FileSource
from dckpt.catalog.prune import find_leftovers, sweep
from dckpt.catalog.references import find_referable
from dckpt.catalog.transaction import Transaction
from dckpt.dcp.chunks import local_chunks
from dckpt.engine.agreement import PlanAgreement, decode_layout, decode_question, encode_layout, encode_question
from dckpt.engine.attempt import MESSAGE_BYTES_MAX, abort_attempt, as_dckpt_error, naming_rank
from dckpt.engine.committer import Committer, unknown_outcome
from dckpt.engine.deferred import DeferredCopies
from dckpt.engine.describe import describe_checkpoint
from dckpt.engine.job import Beginning, SaveJob, SaveRequest
from dckpt.engine.lineage import Lineage
from dckpt.engine.live_source import LiveSource
from dckpt.engine.local_state import LocalState, describe_state
from dckpt.engine.overlap import StepGate, overlap_obstacle, owned_memory
from dckpt.engine.pending import PendingSave
from dckpt.engine.pinning import HostPinner
from dckpt.engine.refusal import REFUSALS, encode_refusal, raise_refusals
from dckpt.engine.reuse import REWRITE_EVERY
from dckpt.engine.staging import stage
from dckpt.errors import (
    CorruptCheckpointError,
    StorageError,
    TransientStorageError,
)
from dckpt.format.layout import checkpoint_name
from dckpt.format.values import dump_json, load_json
from dckpt.planning.files import FilePlans
from dckpt.planning.layout import Layout
from dckpt.planning.ticket import Details, Ticket, ensure_same_step
from dckpt.ranks.coordination import Coordination
from dckpt.ranks.messages import cause_to_show, format_ranks
from dckpt.ranks.session import Session
from dckpt.ranks.topology import Topology
from dckpt.resume.facts.collect import FactCollector
from dckpt.state.naming import storage_address
from dckpt.state.train_state import TrainState
from dckpt.storage.base import Storage

log = logging.getLogger(__name__)

WARM_SLACK_BYTES = 2**20  # headers and records


class Saver:
    """Plans and stages on the caller's thread; `committer` writes and commits on another."""

    def __init__(
        self,
        storage: Storage,
        coordination: Coordination,
        topology: Topology,
        *,
        on_commit: Callable[[str], int],
        rewrite_every: int = REWRITE_EVERY,
        gate: StepGate | None = None,
    ) -> None:
        """`gate`: lets tensors of optimizers be copied after `start` returned; None copies everything at once.

        `rewrite_every`: see `Checkpointer`.
        """
        self._storage = storage
        self._coordination = coordination
        self._topology = topology
        self._gate = gate
        self._pinner = HostPinner()
        self._buffer = ImageBuffer(self._pinner.pin)
        self._agreement = PlanAgreement(topology)
        self.committer = Committer(
            storage, topology, on_commit=on_commit, rewrite_every=rewrite_every, pin=self._pinner.pin
        )
        self._deferred: DeferredCopies | None = None
        self._saves = 0
        self._facts = FactCollector(topology.world_size)
        self.lineage = Lineage(storage)

    def warm(self, state: TrainState) -> None:
        """Begins to make the memory for this rank's files in the background, before the first save needs it.

        Only this rank is asked, so the size is an estimate: what several ranks hold alike is written by one of them.
        """
        self._pinner.note_device()
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
        """Ends the writing threads, as far as they are not stuck, and gives the memory back that no copy goes into."""
        if self._gate is not None:
            self._gate.close()
        self.committer.pool.stop()
        self._buffer.stop_warming()
        if self._deferred is None or self._deferred.done:
            self._buffer.release()

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
        self._buffer = ImageBuffer(self._pinner.pin)
        self.committer.leave_behind()
        if verdict == "abort":
            job.pending.conclude("failed", as_dckpt_error(job.session.error or error))
        else:
            job.pending.conclude("unknown", unknown_outcome(job, error))

    def start(
        self,
        state: TrainState,
        request: SaveRequest,
        pending: PendingSave,
        hand_over: Callable[[SaveJob], None],
        *,
        started_s: float,
    ) -> None:
        """Agrees on the plan with all ranks, copies this rank's part and hands the rest over to be finished by `committer`.

        When it returns, the state may change. Every rank raises the same error if any rank failed; `pending` is then
        concluded. An interrupt of this thread after the hand-over leaves the save to the thread that took it.
        """
        begun = Beginning()
        try:
            session = self._open_session(request, begun)
            local, decision = self._agree_on_plan(state, request, session, begun)
            begun.phase = "stage"
            failpoint.reach("plan_agreed")
            assert self._agreement.remembered is not None
            plan = self._agreement.remembered
            self.committer.pool.start()
            sources, deferred = self._sources(state, request, local, plan.files)
            begun.deferred = self._deferred = deferred
            pending.checkpoint = decision["checkpoint"]
            pending.seconds_stalled = time.monotonic() - started_s
            if deferred is not None:
                self._hold_optimizers(state, pending, deferred)
            elif not request.is_blocking:
                pending.mark_staged()
            begun.job = SaveJob(
                pending=pending,
                session=session,
                checkpoint=decision["checkpoint"],
                attempt=decision["attempt"],
                files=[(file, source) for (file, _), source in zip(plan.files, sources, strict=True)],
                started_s=started_s,
                transaction=begun.transaction,
                manifest=begun.manifest,
                known=begun.known,
                report=plan.report if decision["wants_report"] else None,
                deferred=deferred,
                may_refer=frozenset(decision["may_refer"]),
            )
            begun.job.note_storage()
            hand_over(begun.job)
        except BaseException as error:
            if begun.job is not None and not begun.job.claim():
                raise
            shared: BaseException = error
            try:
                shared = abort_attempt(begun.session, begun.transaction, error, phase=begun.phase)
            finally:
                # Also when a second interrupt comes here: whoever waits for this save must not wait for nobody.
                pending.conclude("failed", as_dckpt_error(shared))
                if begun.deferred is not None:
                    begun.deferred.wait()  # the next save takes the memory into which it copies
            if shared is error or not isinstance(error, Exception):
                raise
            raise shared from cause_to_show(as_dckpt_error(shared), error)

    def _sources(
        self, state: TrainState, request: SaveRequest, local: LocalState, files: FilePlans
    ) -> tuple[Sequence[FileSource], DeferredCopies | None]:
        """Where the writer finds the bytes of `files`: in the live state if the caller waits, else in staged images."""
        self._pinner.note_device()
        if not request.is_blocking:
            return stage(local, files, self._buffer, self._may_wait(state))
        failpoint.reach("before_stage")
        for device in {chunk.tensor.device for held in local.chunks for chunk in held if chunk.tensor.is_cuda}:
            # The writers' threads copy on streams of their own, which know nothing of what is queued here.
            torch.cuda.current_stream(device).synchronize()
        failpoint.reach("after_stage")
        return [LiveSource(plan, items, local) for plan, items in files], None

    def _may_wait(self, state: TrainState) -> Callable[[str, torch.Tensor], bool] | None:
        """Whether a tensor may be copied later; None if none may."""
        if self._gate is None:
            return None
        obstacle = overlap_obstacle(state.optimizers)
        if obstacle is not None:
            self._gate.tell_once(obstacle)
            return None
        owned = owned_memory(state.optimizers)
        return lambda _, tensor: storage_address(tensor) in owned

    def _hold_optimizers(self, state: TrainState, pending: PendingSave, deferred: DeferredCopies) -> None:
        """From here on everything may change but what optimizers own, and those are held up by the gate."""
        assert self._gate is not None
        deferred.on_done, deferred.on_waited = pending.mark_staged, pending.add_stall
        self._gate.hold(deferred, state.optimizers)
        deferred.start()

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
        """Tickets first; the layout is decided anew, in a second exchange, only if the last one does not hold."""
        local, failure = self._capture(state, request)
        tickets: list[Ticket] = []

        def on_tickets(payloads: list[bytes]) -> bytes:
            raise_refusals(payloads)
            tickets.extend(Ticket.decode(payload) for payload in payloads)
            ensure_same_step(tickets)
            if not self._agreement.is_settled(tickets):
                return dump_json(encode_question(self._agreement.ask(tickets)))
            with naming_rank(self._topology, session, "plan"):
                return self._begin(tickets, request, local, state, begun)

        def on_details(payloads: list[bytes]) -> bytes:
            with naming_rank(self._topology, session, "plan"):
                layout = self._agreement.decide(tickets, [Details.decode(payload) for payload in payloads])
                return self._begin(tickets, request, local, state, begun, layout)

        answer = self._exchange_plan(session, "plan", self._ticket(state, request, local, failure), on_tickets, failure)
        assert local is not None
        question = decode_question(answer)
        if question is not None:
            details = self._agreement.details(local, question).encode()
            answer = self._exchange_plan(session, "layout", details, on_details, None)
            self._agreement.adopt(local, decode_layout(answer["layout"]))
        return local, answer

    def _exchange_plan(
        self,
        session: Session,
        phase: str,
        payload: bytes,
        decide: Callable[[list[bytes]], bytes],
        failure: BaseException | None,
    ) -> dict[str, Any]:
        # A refusal travels as a payload, so that it keeps its type on every rank.
        error = None if isinstance(failure, REFUSALS) else failure
        found = session.exchange(phase, payload, decide, error=error)
        answer: dict[str, Any] = load_json(found, key="decision of the coordinator", limit=MESSAGE_BYTES_MAX)
        return answer

    def _ticket(
        self, state: TrainState, request: SaveRequest, local: LocalState | None, failure: BaseException | None
    ) -> bytes:
        if isinstance(failure, REFUSALS):
            return encode_refusal(failure)
        if local is None:
            return b""
        ticket = self._agreement.ticket(local, request.step, request.micro_step, self._coordinates(state))
        return ticket.encode()

    def _coordinates(self, state: TrainState) -> dict[str, int]:
        return state.coordinates() or {"rank": self._topology.rank}

    def _capture(self, state: TrainState, request: SaveRequest) -> tuple[LocalState | None, BaseException | None]:
        try:
            if request.refusal is not None:
                raise request.refusal
            if request.failure is not None:
                raise request.failure
            failpoint.reach("before_plan")
            captured = state.capture(gradients=request.stores_gradients)
            return describe_state(captured, self._agreement.described, world_size=self._topology.world_size), None
        except Exception as error:  # noqa: BLE001 - it travels to all ranks, which raise it together
            return None, error

    def _begin(
        self,
        tickets: Sequence[Ticket],
        request: SaveRequest,
        local: LocalState | None,
        state: TrainState,
        begun: Beginning,
        layout: Layout | None = None,
    ) -> bytes:
        """On the coordinator: one attempt, begun on storage; `layout` travels if it is a new one."""
        assert local is not None
        assert self._agreement.known is not None
        self._storage.ensure_root()
        is_new = self.lineage.generation is None
        generation = self.lineage.ensure_generation(self._topology.world_size)
        if is_new:
            self._sweep_leftovers()
        known = begun.known = self._agreement.known
        name = checkpoint_name(request.step, generation, request.micro_step)
        attempt = uuid.uuid4().hex
        begun.manifest = describe_checkpoint(
            request,
            local,
            known.decision.layout,
            tickets,
            state,
            facts={**self._facts.collect(state, local.captured), **request.facts},
            run_id=self.lineage.run_id,
            generation=generation,
            attempt=attempt,
        )
        begun.transaction = Transaction(self._storage, checkpoint=name, attempt=attempt, generation=generation)
        begun.transaction.begin()
        answer: dict[str, Any] = {
            "checkpoint": name,
            "attempt": attempt,
            "wants_report": known.index is None,
            # Looked at when the generation is there: from now on nobody deletes these.
            "may_refer": sorted(find_referable(self._storage, self.committer.reusable.places)),
        }
        if layout is not None:
            answer["layout"] = encode_layout(layout)
        return dump_json(answer)

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
