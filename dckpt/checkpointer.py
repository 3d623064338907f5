"""What a training loop holds: one object that saves, resumes, and says when to stop."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Literal

from dckpt.catalog.catalog import Catalog
from dckpt.catalog.retention import Retention
from dckpt.catalog.rollback import plan_rollback, roll_back
from dckpt.engine.arguments import (
    announce_new_run,
    ensure_choice,
    ensure_count,
    ensure_kind,
    place_of_run,
)
from dckpt.engine.cadence import Cadence, Every, StepAction
from dckpt.engine.failure_policy import FailurePolicy
from dckpt.engine.follower import Follower
from dckpt.engine.job import SaveJob, SaveRequest
from dckpt.engine.keeper import Keeper
from dckpt.engine.last_save import LastSave, last_save, loaded_as_saved
from dckpt.engine.legs import NewLeg, begin_leg, ensure_able, ensure_restartable, nothing_to_continue, saved_as
from dckpt.engine.loader import Loaded, Loader, LoadOptions
from dckpt.engine.overlap import StepGate
from dckpt.engine.pending import PendingSave
from dckpt.engine.questions import is_anywhere
from dckpt.engine.refusal import REFUSALS
from dckpt.engine.requests import save_request
from dckpt.engine.resume_policy import ResumePolicy
from dckpt.engine.reuse import REWRITE_EVERY
from dckpt.engine.rng_restore import note_streams
from dckpt.engine.run_history import RunHistory
from dckpt.engine.saver import Saver
from dckpt.engine.signals import SignalWatch
from dckpt.engine.validation import Validation
from dckpt.engine.worker import SaveThread
from dckpt.errors import (
    CheckpointNotFoundError,
    ConfigError,
    DckptError,
    PoisonedStateError,
    SaveNotFinishedError,
)
from dckpt.format.layout import CheckpointId
from dckpt.ranks.coordination import Coordination
from dckpt.ranks.topology import detect_topology
from dckpt.resume.built import describe_built
from dckpt.resume.facts.collect import FactCollector
from dckpt.resume.probe import Probe
from dckpt.resume.report import LoadResult, ResumeReport
from dckpt.state.progress import micro_batches
from dckpt.state.train_state import TrainState
from dckpt.storage.opening import open_storage

log = logging.getLogger(__name__)

LINGER_S = 20.0  # how long rank 0 stays reachable at the end, so that every rank learns the last outcome
LINGER_AFTER_ERROR_S = 2.0  # when a rank leaves by an exception the others may never come to say goodbye


class Checkpointer(RunHistory):
    """Saves and resumes one run. Every rank creates it and calls its methods in the same order.

    root: directory of the run (or `file://` URL), the same place on every rank.
    save: when `step` saves; None leaves it to explicit `save` calls and signals.
    retention: what to keep after each commit; the default keeps all.
    on_save_error: "continue" logs a failed save and trains on, until `give_up_after` saves in a row failed; "raise"
        raises at the next call. Errors that no later save can mend (another job took the run over, a wrong argument)
        are always raised.
    deadline_s: the longest time without any progress of a rank before the others stop waiting for it.
    signals: on these, `step` saves and returns `Stop`. Only set in the main thread.
    rewrite_every: a file of frozen parameters that did not change since the checkpoint before is not written again but taken
        over: as a hard link, or as a reference where there are none. So that one bad sector does not harm every checkpoint,
        it is written anew in one of so many checkpoints; 1 writes all files always.
    when_busy: a save that comes due in `step` while another is in flight waits for it, or is skipped.
    overlap: `save` returns before parameters and optimizer states are copied; the next `optimizer.step()` waits until they
        are. Everything else (buffers, EMA, extras, random streams) is copied before. Without effect, and said so, where a
        step may run without its hooks: compiled, captured in a CUDA graph, or inside backward. Between a save and the next
        step only optimizers may change parameters; an in-place change that torch counts makes that save fail, one through
        `.data` goes unnoticed.
    tensorboard: a directory for TensorBoard events: loss and learning rate at each save, resumes with their report.

    Leaving the `with` block (also by an exception) waits for the save in flight; so does the end of the process.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        save: Every | None = None,
        retention: Retention | None = None,
        on_save_error: Literal["continue", "raise"] = "continue",
        give_up_after: int = 3,
        deadline_s: float = 600.0,
        signals: Iterable[signal.Signals] = (signal.SIGTERM, signal.SIGUSR1),
        when_busy: Literal["wait", "skip"] = "wait",
        overlap: bool = False,
        rewrite_every: int = REWRITE_EVERY,
        tensorboard: str | os.PathLike[str] | None = None,
    ) -> None:
        ensure_choice("on_save_error", on_save_error, ("continue", "raise"))
        ensure_choice("when_busy", when_busy, ("wait", "skip"))
        ensure_count("give_up_after", give_up_after)
        ensure_count("rewrite_every", rewrite_every)
        if deadline_s <= 0:
            raise ConfigError(f"Checkpointer(deadline_s=): expected more than 0 seconds, found {deadline_s}.")
        ensure_kind("save", save, Every)
        ensure_kind("retention", retention, Retention)
        self._topology = detect_topology()
        self._storage = open_storage(place_of_run(root), processes=self._topology.world_size)
        self._coordination = Coordination.connect(self._topology, scope="checkpointer", deadline_s=deadline_s)
        keeper = Keeper(self._storage, retention or Retention())
        gate = StepGate() if overlap else None
        self._saver = Saver(
            self._storage,
            self._coordination,
            self._topology,
            on_commit=keeper.apply,
            rewrite_every=rewrite_every,
            gate=gate,
        )
        self._loader = Loader(self._storage, self._coordination, self._topology)
        self._facts = FactCollector(self._topology.world_size)
        self._validation = Validation(self._storage, self._coordination, self._topology, self._facts)
        self._follower = Follower(None if tensorboard is None else os.fspath(tensorboard), self._topology)
        self._thread = SaveThread("dckpt-save")
        self._signals = SignalWatch(signals)
        self._cadence = Cadence(save, self._coordination, self._topology, self._signals, deadline_s=deadline_s)
        self._deadline_s = deadline_s
        self._policy = FailurePolicy(self._topology, raises=on_save_error == "raise", give_up_after=give_up_after)
        self._skip_when_busy = when_busy == "skip"
        self._is_warmed = False
        self._is_over = False
        self._is_joined = False  # the live state is the run's: it was loaded or saved here, or begins the run
        self._in_flight: PendingSave | None = None
        self._job: SaveJob | None = None
        self._last: LastSave | None = None
        self._closed = False
        self._at_exit = _close_at_exit(weakref.ref(self))
        atexit.register(self._at_exit)

    # -- the training loop ---------------------------------------------------------------------------------------------

    def step(self, state: TrainState, *, metrics: Mapping[str, float] | None = None) -> StepAction:
        """Call once after each optimizer step. Saves when due; returns `Stop` after a signal, with the state committed.

        All ranks stop at the same step. It may be called after each `progress.accumulate()` too: then a signal is heard in the
        middle of a step, and where the gradients so far can be stored that is saved; else the step is finished first.
        When the work is done
        (`progress.max_steps` or `max_epochs`) the last state is saved, waited for, and `Stop` returned too: leave the loop
        and exit with `0 if progress.done else dckpt.EXIT_STOPPED` (75: "start the same command again"). `metrics` go into
        the checkpoint if this step is saved. If the save before a stop fails twice its error is raised: nothing comes
        after. Calls after `Stop` save nothing.
        """
        progress = state.progress
        if progress is None:
            raise ConfigError(
                "Checkpointer.step: expected a TrainState with progress, found none. Give TrainState(progress="
                "TrainProgress(...)) and call progress.advance(), or call save(state, step=...) yourself."
            )
        self._ensure_open()
        if progress.micro_step and progress.batch is None:
            return StepAction.CONTINUE
        if self._is_over:
            log.warning("step() was called after the end, at step %d: nothing is saved; leave the loop", progress.step)
            return StepAction.STOP
        if progress.micro_step:
            return self._step_within(state, metrics)
        self._follower.stepped(state)
        if not self._is_warmed:
            # Now the optimizer has its state, and the first save is usually some steps away.
            self._is_warmed = True
            self._saver.warm(state)
        decided = self._cadence.decide(progress.step, is_last=progress.done, accumulation=micro_batches(progress))
        if decided.stop is None and not decided.save:
            self._collect()
            return StepAction.CONTINUE
        stops = decided.stop is not None
        if stops and self._topology.is_coordinator:
            log.warning("%s received: saving step %d, then stopping", decided.stop, progress.step)
        if not stops and not progress.done and self._skip_when_busy and self._is_busy_anywhere(progress.step):
            return StepAction.CONTINUE
        pending = self.save(state, metrics=metrics)
        if stops or progress.done:
            self._is_over = True
            self._finish_final(state, pending, metrics)
            return StepAction.STOP
        return StepAction.CONTINUE

    def _step_within(self, state: TrainState, metrics: Mapping[str, float] | None) -> StepAction:
        """Between micro-batches: a signal is obeyed at once where every rank can store its gradients."""
        progress = state.progress
        decided = self._cadence.decide(
            progress.step, is_last=False, micro_step=progress.micro_step, accumulation=micro_batches(progress)
        )
        if decided.stop is None:
            return StepAction.CONTINUE
        where = f"step {progress.step}, micro-step {progress.micro_step}"
        if is_anywhere(self._coordination, "gradients", state.gradient_obstacle() is not None, where):
            self._cadence.reset()  # asked again at the next call, and obeyed at the end of the step
            return StepAction.CONTINUE
        if self._topology.is_coordinator:
            log.warning("%s received: saving %s, then stopping", decided.stop, where)
        self._is_over = True
        self._finish_final(state, self.save(state, metrics=metrics), metrics)
        return StepAction.STOP

    def _finish_final(self, state: TrainState, pending: PendingSave, metrics: Mapping[str, float] | None) -> None:
        """The last save of this process: one that failed is tried once more, then its error is raised."""
        if pending.wait() == "failed":
            self._collect()
            pending = self.save(state, metrics=metrics)
        if pending.wait() != "committed":
            assert pending.error is not None
            self._in_flight = None
            raise pending.error
        self._collect()

    def save(
        self,
        state: TrainState,
        *,
        step: int | None = None,
        metrics: Mapping[str, float] | None = None,
        blocking: bool = False,
        gradients: Literal["store", "drop"] = "store",
    ) -> PendingSave:
        """Saves `state` as `step` (default: `state.progress.step`); every rank must call it.

        Returns once this rank's part is copied, so the state may change again (but see `overlap`); with `blocking`, once the
        outcome is known, and nothing but a few pieces of 16 MiB is copied. One save is in flight: an earlier one is waited
        for first. The same step saved again without an optimizer step between returns the same `PendingSave`. A failed save
        is in `.outcome` and `.error` (see `on_save_error`).

        In the middle of an accumulation (`progress.micro_step`) the gradients so far are stored, or dropped: a resume then
        begins that step again. `ConfigError` where they lie out of reach (FSDP2 without gradient sync).

        Raises `ConfigError` if the run has checkpoints and nothing was loaded, or if the step did not move while the
        optimizer did; `CommitConflictError` if another job took over; `PoisonedStateError` after a failed load.
        """
        self._ensure_open()
        self._ensure_not_poisoned()
        started = time.monotonic()
        probed, failure = self._validation.probe_facts(state)
        facts = {**self._follower.facts, **probed}
        request = save_request(
            state, step, metrics or {}, gradients, is_blocking=blocking, facts=facts, failure=failure
        )
        self._follower.saving(state)
        last = self._last
        if last is not None and last.is_same_step(request):
            refusal = last.unmoved_step(state, request)
            request = replace(request, refusal=refusal)
            # Ranks learn an outcome at slightly different times; only a known one is the same on all of them.
            self._wait_in_flight()
            if refusal is None and last.pending.outcome != "failed":
                if metrics:
                    log.warning(
                        "step %d is saved already; its checkpoint keeps its metrics and does not get %s. Pass metrics to the "
                        "first save of a step, or to step().",
                        request.step,
                        ", ".join(metrics),
                    )
                return last.pending
        self._wait_in_flight()
        pending = PendingSave(request.step, request.micro_step)
        self._cadence.note_save()
        self._start(state, request, pending, started)
        if blocking:
            self._wait_blocking(pending)
        return pending

    def _wait_blocking(self, pending: PendingSave) -> None:
        """The files are written from the live state, which may change once this call has ended: so it ends with the save."""
        try:
            pending.wait()
        except BaseException:
            log.warning(
                "interrupted: the save of step %d is finished first; interrupt again to give it up", pending.step
            )
            try:
                pending.wait()
            except BaseException as second:
                if self._job is not None and self._job.pending is pending:
                    self._job.session.abort(second, phase="write")
                raise
            raise
        self._collect()

    def _start(self, state: TrainState, request: SaveRequest, pending: PendingSave, started: float) -> None:
        before = self._last
        self._last = last_save(state, request, pending)
        self._in_flight, self._is_joined = pending, True
        try:
            self._saver.start(state, request, pending, self._hand_over, started_s=started)
        except REFUSALS:
            # Nothing was tried: the next call is compared with the save before this one.
            self._in_flight, self._last = None, before
            raise
        except Exception:  # noqa: BLE001 - a failed save must not end training; it is in `pending`, the policy decides
            self._collect()

    def _hand_over(self, job: SaveJob) -> None:
        self._job = job
        job.pending.look_with(lambda: self._look_after(job))
        self._thread.submit(lambda: self._saver.committer.finish(job))

    def _look_after(self, job: SaveJob) -> None:
        """Called while somebody waits for the save: a writer that the kernel does not give back is left behind."""
        if job.is_stuck(self._deadline_s):
            self._saver.give_up(job, self._deadline_s)
            self._thread = SaveThread("dckpt-save")

    def _is_busy_anywhere(self, step: int) -> bool:
        """Agreed by all ranks: one rank that skips while another saves would leave the other waiting."""
        busy = self._in_flight is not None and not self._in_flight.done
        found = is_anywhere(self._coordination, "busy", busy, f"step {step}")
        if found and self._topology.is_coordinator:
            log.warning("save of step %d skipped: the save before it is still in flight", step)
        return found

    # -- loading -------------------------------------------------------------------------------------------------------

    def resume(
        self, state: TrainState, *, policy: ResumePolicy | None = None, probe: Probe | None = None
    ) -> ResumeReport | None:
        """Loads the newest good checkpoint of the run's current line into `state`, RNG last, and reports.

        None means a new run: the root has no checkpoint and no generation that continued one; that is announced.
        Critical findings stop every rank with `ResumeRejectedError` unless `policy` allows them by name or a person at the
        terminal lets them pass; then nothing can be saved until a resume or load succeeds. The report is kept as JSON in
        `<root>/reports/`. probe: a batch whose loss is measured here and at each later save, and compared at each later resume.

        Corruption that a second, uncached read confirmed walks back to the next older checkpoint; storage trouble and a
        state that does not fit are raised, and so is a run in which every candidate is damaged.
        """
        chosen = policy or ResumePolicy()
        self._validation.probe = probe
        options = LoadOptions(walk_back=chosen.walk_back, is_resume=True, gradients=chosen.gradients, rng=chosen.rng)
        loaded = self._resume(state, options, call="resume(state)")
        if loaded is None:
            self._saver.lineage.start_fresh(self._loader.observed_generation)
            self._is_joined = True
            self._follower.facts = self._validation.start_facts(state)
            if self._topology.is_coordinator:
                announce_new_run(self._storage.locate(""), self._loader.observed_generation)
            return None
        report = self._accept(state, loaded, chosen)
        # A run that is finished already is not trained past its end.
        self._is_over = state.progress is not None and state.progress.done
        return report

    def _resume(self, state: TrainState, options: LoadOptions, *, call: str) -> Loaded | None:
        return self._load(state, lambda catalog: catalog.line(), options, call=call)

    def _accept(
        self, state: TrainState, loaded: Loaded, policy: ResumePolicy, leg: NewLeg | None = None
    ) -> ResumeReport:
        report, facts = self._validation.accept(state, loaded.result, policy, leg)
        # Only now: a resume that was refused is none, and nothing may be saved on top of it.
        self._adopt(state, loaded, "walk-back" if loaded.result.damaged else "resume")
        self._follower.resumed(state, loaded.result, report, facts)
        return report

    def start_leg(
        self,
        state: TrainState,
        scheduler: Literal["keep", "fresh"] = "keep",
        *,
        name: str | None = None,
        policy: ResumePolicy | None = None,
    ) -> bool:
        """Begins a new leg of the run, usually on other data; call it in place of `resume`, or after it, `load` or training.

        Weights, moments, RNG and, with "keep", the schedule go on; "fresh" begins the schedule as it was built before the
        load. The leg's counters in `state.progress` begin at zero (`max_steps` is the leg's), its life-long `step` goes on
        naming checkpoints; samplers begin at epoch 0, sample 0. The first save begins a generation that names the
        checkpoint before it; retention keeps that one, the end of the leg before.

        name: makes the call safe to repeat, as in a job that is started again: if the newest checkpoint belongs to the leg of
        this name, the run is resumed inside of it. True if a leg has begun, False if it was resumed. policy: as for `resume`;
        what a new leg changes on purpose (data, batch, work that remains) is no finding when it begins.
        """
        leg = NewLeg(name, scheduler)
        progress = ensure_able(state, leg)
        if self._is_joined:
            if not leg.follows([each.name for each in progress.legs], progress.micro_step):
                return False
            ensure_restartable(state)
            if not progress.step:
                raise nothing_to_continue(self._storage.locate(""))
            end = saved_as(self.save(state, blocking=True))
        else:
            chosen = policy or ResumePolicy()
            options = LoadOptions(walk_back=chosen.walk_back, is_resume=True, rng=chosen.rng, leg=leg)
            loaded = self._resume(state, options, call="start_leg(state)")
            if loaded is None:
                raise nothing_to_continue(self._storage.locate(""))
            self._accept(state, loaded, chosen, leg)
            if not loaded.result.begins_leg:
                self._is_over = progress.done
                return False
            end = loaded.identity
        begin_leg(state, progress, leg, end, is_told=self._topology.is_coordinator)
        self._saver.lineage.begin_leg(end)
        self._cadence.reset()
        self._is_over, self._last = False, None
        return True

    def load(
        self,
        state: TrainState,
        step: int | str = "latest",
        *,
        parts: Sequence[str] | None = None,
        allow_missing: Sequence[str] = (),
        allow_unexpected: Sequence[str] = (),
        cast: Literal["exact", "allow"] = "exact",
    ) -> LoadResult:
        """Loads one checkpoint: "latest", a step of the current line, or a full checkpoint name. Never walks back.

        What is saved afterwards descends from it; later steps of the old line become superseded. All differences are
        refused at once (`IncompatibleStateError`) before a live tensor is touched, except those that are allowed.
        """
        options = LoadOptions(parts=parts, allow_missing=allow_missing, allow_unexpected=allow_unexpected, cast=cast)
        loaded = self._load(state, lambda catalog: [catalog.resolve(step)], options, call=f"load({step!r})")
        if loaded is None:
            raise CheckpointNotFoundError(
                f"Load of {step!r}: expected a run with checkpoints in {self._storage.locate('')}, found none."
            )
        self._adopt(state, loaded, "load")
        return loaded.result

    def validate(self, state: TrainState, loaded: LoadResult) -> ResumeReport:
        """Compares what was loaded with the live run; changes nothing. Every rank calls it, all get the same report."""
        self._ensure_open()
        return self._validation.run(state, loaded)

    def _load(
        self,
        state: TrainState,
        select: Callable[[Catalog], list[CheckpointId]],
        options: LoadOptions,
        *,
        call: str,
    ) -> Loaded | None:
        self._ensure_open()
        self._wait_in_flight()
        built = describe_built(state, self._facts)
        loaded = self._loader.load(state, select, options, call=call)
        return None if loaded is None else replace(loaded, result=replace(loaded.result, built=built))

    def _adopt(self, state: TrainState, loaded: Loaded, reason: Literal["resume", "walk-back", "load"]) -> None:
        result = loaded.result
        self._saver.lineage.adopt(
            loaded.observed_generation,
            loaded.identity,
            result.manifest_sha256,
            result.manifest.run_id,
            reason,
        )
        self._saver.committer.adopt(result.checkpoint, result.manifest.files)
        note_streams(state, result, self._topology.world_size)
        self._follower.loaded(result)
        self._cadence.reset()
        self._is_over, self._is_joined = False, True
        self._last = loaded_as_saved(state, loaded, is_resume=reason != "load")

    # -- the run -------------------------------------------------------------------------------------------------------

    def rollback(self, step: int | str) -> str:
        """Makes an earlier checkpoint the latest of the run; returns its name. Any one rank may call it, between saves.

        Nothing is deleted: later steps become superseded. The live state stays what it is, so every rank calls `resume` or
        `load` next; a save of a new step before that raises `CommitConflictError`, in this job as in any other on this run.
        """
        self._ensure_open()
        self._wait_in_flight()
        plan = plan_rollback(self._storage, step, now_unix_s=time.time())
        if plan is None:
            return Catalog(self._storage).resolve(step).name
        roll_back(self._storage, plan)
        return plan.target.name

    # -- waiting and the end -------------------------------------------------------------------------------------------

    def wait(self) -> None:
        """Waits for the save in flight and applies the error policy to its outcome."""
        self._wait_in_flight()

    def close(self) -> None:
        """Waits for the save in flight, puts signal handlers back and ends the background thread; safe to repeat.

        Raises `SaveNotFinishedError` if the save in flight makes no end within twice the deadline, and the save's own
        error under on_save_error="raise".
        """
        self._close(LINGER_S)

    def _close(self, linger_s: float) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            self._finish_last()
        finally:
            self._thread.stop(timeout_s=1.0)
            self._saver.close()
            self._signals.restore()
            self._follower.close()
            self._coordination.close(min(linger_s, self._deadline_s))
            atexit.unregister(self._at_exit)

    def _finish_last(self) -> None:
        pending = self._in_flight
        if pending is None:
            return
        try:
            pending.wait(2 * self._deadline_s)
        except SaveNotFinishedError:
            log.error("close: the save of step %d did not end; it may still commit", pending.step)  # noqa: TRY400
            raise
        self._collect()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._close(LINGER_S if error is None else LINGER_AFTER_ERROR_S)
        except DckptError as late:
            if error is None:
                raise
            log.error("while leaving after %s: %s", type(error).__name__, late)  # noqa: TRY400 - the loop's own error goes up

    def _wait_in_flight(self) -> None:
        if self._in_flight is not None:
            self._in_flight.wait()
            self._collect()

    def _collect(self) -> None:
        """Applies the error policy to a save that has ended since the last call."""
        pending = self._in_flight
        if pending is None or not pending.done:
            return
        self._in_flight = self._job = None
        self._policy.judge(pending)

    def _ensure_open(self) -> None:
        if self._closed:
            raise ConfigError("Checkpointer: expected an open one, found it closed. Call it inside its `with` block.")

    def _ensure_not_poisoned(self) -> None:
        name = self._loader.poisoned_by
        if name is not None:
            raise PoisonedStateError(
                f"Save: the load of {name} failed after it had changed live tensors, so the state is a mixture. Load or "
                "resume successfully before saving."
            )


def _close_at_exit(reference: weakref.ref[Checkpointer]) -> Callable[[], None]:
    def close() -> None:
        checkpointer = reference()
        if checkpointer is not None:
            try:
                checkpointer.close()
            except DckptError as error:
                log.error("at the end of the process: %s", error)  # noqa: TRY400 - nobody is left to raise to

    return close
