"""One load: find a checkpoint, see that it fits, read it verified, apply it. All ranks decide each stage together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dckpt.blocks.read import ByteTally
from dckpt.catalog.catalog import Catalog
from dckpt.catalog.generations import list_generations, read_generation
from dckpt.dcp.read import CheckpointFiles
from dckpt.engine.fingerprints import SharedSums
from dckpt.engine.heads import Heads
from dckpt.engine.legs import DATA, NewLeg
from dckpt.engine.load_peers import LoadPeers
from dckpt.engine.refusal import REFUSALS, encode_refusal, raise_refusals
from dckpt.engine.rng_restore import RngPlan, RngPolicy, plan_rng_streams
from dckpt.engine.saved_state import SavedState
from dckpt.engine.shared_read import ReadPlan, SharedRead, plan_alone, plan_together
from dckpt.engine.wanted import RECORD_PREFIX, Wanted, describe_wanted, group_ranks, own_blobs, rank_classes
from dckpt.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    DckptError,
    IncompatibleStateError,
    StorageReadOnlyError,
    from_wire,
    to_wire,
)
from dckpt.format.layout import CheckpointId
from dckpt.format.manifest import Manifest
from dckpt.format.values import decode_value, dump_json, load_json
from dckpt.planning.records import RNG
from dckpt.ranks.coordination import Coordination
from dckpt.ranks.session import Session
from dckpt.ranks.topology import Topology
from dckpt.resume.facts.ranks import stream_digests
from dckpt.resume.fingerprints import SavedFingerprints
from dckpt.resume.report import LoadResult
from dckpt.state.gradients import clear_gradients
from dckpt.state.records import RestorePlan
from dckpt.state.train_state import TrainState
from dckpt.storage.base import Storage

log = logging.getLogger(__name__)

MESSAGE_BYTES_MAX = 2**31
NAMES_SHOWN = 20
TRAINING_PARTS = ("optim", "scheduler", "scaler", "data", "progress")


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How much of the checkpoint to load and which differences are wanted."""

    parts: Sequence[str] | None = None
    allow_missing: Sequence[str] = ()
    allow_unexpected: Sequence[str] = ()
    cast: Literal["exact", "allow"] = "exact"
    gradients: Literal["restore", "drop"] = "restore"
    rng: RngPolicy = "derive"
    walk_back: bool = False
    is_resume: bool = False  # training goes on: a part that it would silently start without is a difference
    leg: NewLeg | None = (
        None  # if it begins after this checkpoint, the position in the data of the leg before is left out
    )


@dataclass(frozen=True, slots=True)
class Loaded:
    """A load's result and what the lineage must know of it."""

    result: LoadResult
    observed_generation: int
    identity: CheckpointId


@dataclass
class _Candidate:
    """What one rank holds while it looks at one checkpoint."""

    number: int
    name: str
    saved: SavedState
    plan: RestorePlan
    rng: RngPlan
    wanted: Wanted
    files: CheckpointFiles = field(repr=False)
    begins_leg: bool = False
    reads: ReadPlan | None = None
    fingerprints: SavedFingerprints | None = None
    streams: dict[str, str] = field(default_factory=dict)


class Loader:
    """Loads into a `TrainState`. `poisoned_by` names the checkpoint of a load that failed half-way, else None.

    Bytes are read straight into live tensors and verified there. That is sound because nothing trains on them before all
    ranks agreed that every block matched: a block that a second, uncached read gives right is repaired in place, and while
    `poisoned_by` is set no save is taken of what a failed load left behind.

    `shares`: what several ranks want is read by one of them and sent to the others; all ranks must say yes.
    """

    def __init__(self, storage: Storage, coordination: Coordination, topology: Topology) -> None:
        self._storage = storage
        self._coordination = coordination
        self._topology = topology
        self._heads = Heads(storage, topology)
        self._loads = 0
        self.shares = True
        self.poisoned_by: str | None = None
        self.observed_generation = 0

    def load(
        self,
        state: TrainState,
        select: Callable[[Catalog], list[CheckpointId]],
        options: LoadOptions,
        *,
        call: str,
    ) -> Loaded | None:
        """Loads the first of the selected checkpoints, or None if `select` finds the root without any history.

        With `walk_back` the next one is tried when corruption was confirmed by a second, uncached read; nothing else
        walks back. Raises the same error on every rank. Live tensors are first touched after every rank agreed that
        names, shapes, dtypes and coverage fit.
        """
        self._loads += 1
        session = self._coordination.session(f"load-{self._loads}", what=call, call=call)
        try:
            with LoadPeers(self._coordination, is_wanted=self.shares) as peers:
                return self._load_first(state, session, peers, select, options)
        except (KeyboardInterrupt, SystemExit) as interrupt:
            # This process ends; the others learn why instead of waiting for their deadline.
            session.abort(interrupt)
            raise
        finally:
            session.close()

    def _load_first(
        self,
        state: TrainState,
        session: Session,
        peers: LoadPeers,
        select: Callable[[Catalog], list[CheckpointId]],
        options: LoadOptions,
    ) -> Loaded | None:
        def find(offers: list[bytes]) -> bytes:
            return dump_json({**self._find(select, options), "peers": peers.introduce(offers)})

        found = _parse(session.exchange("find", peers.offer(), find))
        peers.meet(found["peers"])
        self.observed_generation = found["observed"]
        if found["names"] is None:
            return None
        damaged: list[tuple[str, DckptError]] = []
        for number, name in enumerate(found["names"]):
            announced = found["first"] if number == 0 else self._hear_of(session, number, name)
            outcome = self._load_one(state, session, peers, number, name, announced, options)
            if isinstance(outcome, LoadResult):
                self.poisoned_by = None
                result = replace(outcome, damaged=tuple(name for name, _ in damaged))
                identity = CheckpointId(result.step or 0, result.micro_step, result.generation)
                return Loaded(result, found["observed"], identity)
            damaged.append((name, outcome))
            if not options.walk_back:
                raise outcome
            if self._topology.is_coordinator:
                log.error("%s is damaged, walking back: %s", name, outcome)
        raise _all_damaged(self._storage.locate(""), damaged)

    def _find(self, select: Callable[[Catalog], list[CheckpointId]], options: LoadOptions) -> dict[str, Any]:
        """On the coordinator: the candidates, newest first, from names that are known to be durable; and on the first."""
        if options.is_resume:
            # Said before the first step of training, not at the first save an hour later. Reading needs no more.
            try:
                self._storage.ensure_writable()
            except StorageReadOnlyError as error:
                log.warning("saves will fail: %s", error)
        if not self._storage.exists():
            return {"names": None, "observed": 0}
        self._storage.sync_dir("")
        catalog = Catalog(self._storage)
        observed = catalog.newest_generation()
        if not catalog.checkpoints() and self._never_committed():
            return {"names": None, "observed": observed}
        candidates = select(catalog)
        if not candidates:
            raise CheckpointNotFoundError(
                f"Run {self._storage.locate('')}: expected a checkpoint to load, found {observed} "
                f"generation{'s' * (observed != 1)} and no "
                "checkpoint on the current line. Its checkpoints were removed: restore them, or choose a "
                "new root to start again."
            )
        names = [item.name for item in candidates]
        return {"names": names, "observed": observed, "first": self._heads.announce(names[0])}

    def _hear_of(self, session: Session, number: int, name: str) -> dict[str, Any]:
        return _parse(session.exchange(f"manifest-{number}", b"", lambda _: dump_json(self._heads.announce(name))))

    def _never_committed(self) -> bool:
        """True if no generation continues a checkpoint: the run died before its first commit, or never began.

        Without this, a kill during the very first save would need a person before the same command could start again.
        """
        numbers = list_generations(self._storage)
        return all(read_generation(self._storage, number).parent is None for number in numbers)

    def _load_one(
        self,
        state: TrainState,
        session: Session,
        peers: LoadPeers,
        number: int,
        name: str,
        announced: dict[str, Any],
        options: LoadOptions,
    ) -> LoadResult | CorruptCheckpointError:
        if "corrupt" in announced:
            return _corrupt(announced)
        candidate, failure = self._open(state, peers, number, name, announced["sha256"], options)
        try:
            verdict = self._vote(session, f"fit-{number}", _fit_payload(candidate, options), failure, _decide_fit)
            if "corrupt" in verdict:
                return _corrupt(verdict)
            assert candidate is not None
            verdict = self._plan_reads(session, peers, candidate, verdict["classes"])
            if "corrupt" in verdict:
                return _corrupt(verdict)
            self.poisoned_by = name  # from here on live tensors change
            failure = self._read(session, peers, candidate)
            verdict = self._vote(session, f"read-{number}", {}, failure, _decide_corrupt)
            if "corrupt" in verdict:
                return _corrupt(verdict)
            failure = self._apply(state, candidate, is_resume=options.is_resume)
            verdict = self._vote(session, f"apply-{number}", {}, failure, _decide_corrupt)
            if "corrupt" in verdict:
                return _corrupt(verdict)
        finally:
            if candidate is not None:
                candidate.files.close()
        saved = candidate.saved
        return LoadResult(
            checkpoint=name,
            step=saved.manifest.step,
            micro_step=saved.manifest.micro_step,
            generation=saved.manifest.generation,
            manifest_sha256=announced["sha256"],
            manifest=saved.manifest,
            parts=tuple(part for part in saved.parts if part not in candidate.plan.skipped_parts),
            skipped_parts=tuple(candidate.plan.skipped_parts),
            rng=candidate.rng.told,
            continued_micro_step=candidate.plan.micro_step,
            carried_from_rank_0=saved.carried_tensors(),
            begins_leg=candidate.begins_leg,
            bytes_read=candidate.files.tally.total,
            fingerprints=candidate.fingerprints,
            streams=candidate.streams,
        )

    def _open(
        self, state: TrainState, peers: LoadPeers, number: int, name: str, sha256: str, options: LoadOptions
    ) -> tuple[_Candidate | None, Exception | None]:
        try:
            tally = ByteTally()
            manifest = self._heads.read_manifest(peers, number, name, sha256)
            index = self._heads.read_index(peers, number, name, manifest, tally)
            files = CheckpointFiles(self._storage, name, manifest, index, tally)
            saved = SavedState(
                manifest,
                index,
                files,
                source_rank=self._source_rank(state, manifest),
            )
            begins_leg = options.leg is not None and options.leg.follows_saved(_saved_progress(saved))
            plan = state.plan_restore(
                saved,
                parts=[part for part in state.parts if part != DATA] if begins_leg else options.parts,
                allow_missing=options.allow_missing,
                allow_unexpected=options.allow_unexpected,
                cast=options.cast,
                gradients=options.gradients,
            )
            rng = self._plan_rng(state, saved, options)
            return _Candidate(number, name, saved, plan, rng, describe_wanted(saved, plan), files, begins_leg), None
        except Exception as error:  # noqa: BLE001 - it travels to all ranks, which raise it together
            return None, error

    def _source_rank(self, state: TrainState, manifest: Manifest) -> int | None:
        """The rank that stood at this one's place when the checkpoint was saved; None if the mesh is another one."""
        axes = state.mesh_axes() or {}
        saved = tuple(zip(manifest.mesh.axes, manifest.mesh.shape, strict=True)) if manifest.mesh else ()
        if manifest.world_size != self._topology.world_size or tuple(axes.items()) != saved:
            return None
        place = state.coordinates()
        if manifest.coordinates is None or place is None:
            return self._topology.rank
        # The same mesh may number its places differently: a place keeps its streams, not a rank its number.
        return manifest.coordinates.index(tuple(place.values()))

    def _plan_rng(self, state: TrainState, saved: SavedState, options: LoadOptions) -> RngPlan:
        is_wanted = options.parts is None or RNG in options.parts
        if not is_wanted or RNG not in saved.parts:
            return RngPlan()
        return plan_rng_streams(state, saved, state.coordinates() or {"rank": self._topology.rank}, options.rng)

    def _plan_reads(
        self, session: Session, peers: LoadPeers, candidate: _Candidate, classes: list[Any]
    ) -> dict[str, Any]:
        """Every rank plans what it reads; what they want is told to all first, if they are not alike. Touches nothing live."""
        saved, plan, number, rank = candidate.saved, candidate.plan, candidate.number, self._topology.rank
        if not peers.is_on:
            candidate.reads = plan_alone(saved, plan)
            return {}
        blobs: dict[str, str] = {}
        if len(classes) > 1:
            own = dump_json(own_blobs(candidate.wanted, classes, rank), limit=MESSAGE_BYTES_MAX)

            def merge(payloads: list[bytes]) -> bytes:
                merged = {key: text for data in payloads for key, text in _parse(data).items()}
                return dump_json(merged, limit=MESSAGE_BYTES_MAX)

            blobs = _parse(session.exchange(f"wants-{number}", own, merge))
        failure = None
        try:
            found = rank_classes(candidate.wanted, classes, blobs)
            candidate.reads = plan_together(saved, plan, candidate.wanted, found, rank)
        except Exception as error:  # noqa: BLE001 - it travels to all ranks, which raise it together
            failure = error
        return self._vote(session, f"plan-{number}", {}, failure, _decide_corrupt)

    def _read(self, session: Session, peers: LoadPeers, candidate: _Candidate) -> Exception | None:
        done = 0

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            session.beat(done)

        saved, reads = candidate.saved, candidate.reads
        assert reads is not None
        if reads.is_shared:
            # What the others expect of this rank they get, or hear that they will not; so this comes before anything fails.
            shared = SharedRead(session, peers.peers, self._topology, candidate.number)
            failure = shared.run(reads, candidate.wanted, candidate.files, on_bytes)
            if failure is not None:
                return failure
        try:
            if not reads.is_shared:
                candidate.files.read_boxes(reads.direct, on_bytes)
            wanted = {saved.stored_name(name) for name, _ in candidate.plan.reads}
            world, rank = self._topology.world_size, self._topology.rank
            sums = SharedSums(saved, candidate.plan)
            for number in range(rank, len(saved.index.files), world):
                # Per-rank records are read by one rank only, so they count as unread for everybody's share.
                candidate.files.verify_rest(number, lambda n: n in wanted and not n.startswith(RECORD_PREFIX), on_bytes)
                sums.add(number, candidate.files.open(number))
            candidate.fingerprints = sums.result()
        except Exception as error:  # noqa: BLE001 - it travels to all ranks, which raise it together
            return error
        return None

    def _apply(self, state: TrainState, candidate: _Candidate, *, is_resume: bool) -> Exception | None:
        try:
            if is_resume:
                # What an earlier step left over is no part of the state; a checkpoint's own gradients come with the plan.
                clear_gradients(state.models())
            candidate.plan.apply()
            # RNG comes last: building iterators or stepping schedulers above may have drawn from the streams.
            state.restore_rng(candidate.rng.streams)
            candidate.streams = stream_digests(state, candidate.rng.streams)
            candidate.files.close()
        except Exception as error:  # noqa: BLE001 - it travels to all ranks, which raise it together
            return error
        return None

    def _vote(
        self,
        session: Session,
        phase: str,
        payload: dict[str, Any],
        failure: Exception | None,
        decide: Callable[[list[dict[str, Any]]], dict[str, Any]],
    ) -> dict[str, Any]:
        """Corruption is a vote (all ranks walk back together); any other failure is an error on every rank."""
        if isinstance(failure, CorruptCheckpointError):
            payload, failure = {"corrupt": to_wire(failure)}, None
        message = dump_json(payload)
        if isinstance(failure, REFUSALS):
            message, failure = encode_refusal(failure), None

        def decide_together(payloads: list[bytes]) -> bytes:
            raise_refusals(payloads)
            return dump_json(decide([_parse(data) for data in payloads]))

        return _parse(session.exchange(phase, message, decide_together, error=failure))


def _parse(data: bytes) -> dict[str, Any]:
    record: dict[str, Any] = load_json(data, key="message of a rank", limit=MESSAGE_BYTES_MAX)
    return record


def _corrupt(record: dict[str, Any]) -> CorruptCheckpointError:
    error = from_wire(record["corrupt"])
    assert isinstance(error, CorruptCheckpointError)
    return error


def _saved_progress(saved: SavedState) -> Any:
    record = saved.values().get("progress")
    return None if record is None else decode_value(record, key="manifest.json", path="progress")


def _fit_payload(candidate: _Candidate | None, options: LoadOptions) -> dict[str, Any]:
    if candidate is None:
        return {}
    left_out = [
        f"{part}: in the checkpoint, but this TrainState has none, and training would go on as if it were new"
        for part in (candidate.plan.skipped_parts if options.is_resume else ())
        if part in TRAINING_PARTS and not (candidate.begins_leg and part == DATA)
    ]
    wanted = frozenset(part for part in candidate.saved.parts if part not in candidate.plan.skipped_parts)
    differences = [*candidate.plan.differences, *left_out, *candidate.saved.refusals(wanted)]
    return {"differences": differences, "unexpected": candidate.plan.unexpected, "wants": candidate.wanted.keys}


def _decide_corrupt(payloads: list[dict[str, Any]]) -> dict[str, Any]:
    return next((payload for payload in payloads if "corrupt" in payload), {})


def _decide_fit(payloads: list[dict[str, Any]]) -> dict[str, Any]:
    corrupt = _decide_corrupt(payloads)
    if corrupt:
        return corrupt
    differences = list(dict.fromkeys(line for payload in payloads for line in payload["differences"]))
    if differences:
        names = list(dict.fromkeys(name for payload in payloads for name in payload["unexpected"]))
        is_enough = len(names) == len(differences) <= NAMES_SHOWN
        less = (
            f"allow_unexpected={names!r}"
            if is_enough
            else ("parts=[...], allow_missing=[...], allow_unexpected=[...], cast=...")
        )
        shown = "; ".join(differences[:20]) + (f"; and {len(differences) - 20} more" if len(differences) > 20 else "")
        raise IncompatibleStateError(
            f"The checkpoint does not fit the live state in {len(differences)} place{'s' * (len(differences) > 1)}: "
            f"{shown}. None of it was loaded. "
            f"Build the state as it was saved; or load on purpose less than all of it: checkpointer.load(state, {less}).",
            differences=differences,
        )
    return {"classes": group_ranks([payload["wants"] for payload in payloads])}


def _all_damaged(root: str, damaged: list[tuple[str, DckptError]]) -> CorruptCheckpointError:
    name, error = damaged[0]
    return CorruptCheckpointError(
        f"Run {root}: all {len(damaged)} checkpoints on the current line are damaged ({', '.join(n for n, _ in damaged)}); the "
        f"newest: {error} Nothing was started over: restore the files from a copy, or choose a new root.",
        key=name,
        field="all",
    )
