"""`dckpt repair`: what can be given back to a damaged or incomplete checkpoint, decided before a byte is written. Reads only."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

from dckpt.blocks.scan import THREADS
from dckpt.catalog.catalog import Catalog
from dckpt.errors import CorruptCheckpointError, DckptError, StorageMissingError
from dckpt.format.checksum import digest_bytes
from dckpt.format.index import LayoutIndex, encode_index, parse_index
from dckpt.format.manifest import Manifest
from dckpt.format.sealed_json import JsonValue
from dckpt.format.shard_file import (
    LENGTH_BYTES,
    ShardHeader,
    header_bytes_needed,
    parse_shard_header,
)
from dckpt.format.values import dump_json, load_json
from dckpt.planning.mesh import saved_mesh
from dckpt.planning.records import RECORD_BYTES_MAX, RNG, record_capacity, values_record_name
from dckpt.storage.base import Storage
from dckpt.tools.components import (
    CONSEQUENCES,
    component_of,
    is_training_state,
    list_components,
    missing_components,
)
from dckpt.tools.destination import Destination, choose_destination
from dckpt.tools.references import check_strays
from dckpt.tools.refill import (
    MOMENTS_LOST,
    Change,
    NewStreams,
    NewValue,
    StreamModel,
    refill_progress,
    refill_scheduler,
    refill_streams,
)
from dckpt.tools.repair_layout import NewFile, RepairLayout, index_from_headers, shown_names, without_states
from dckpt.tools.restore import FileState, Restorer, plan_of_file
from dckpt.tools.siblings import ReadError, Sibling, Siblings
from dckpt.tools.target import Target
from dckpt.tools.verify import Watch

log = logging.getLogger(__name__)

Outcome = Literal["COMPLETE", "PARTIAL"]


@dataclass(frozen=True, slots=True)
class RepairPlan:
    """What a person wants to know before it happens."""

    source: str
    destination: str
    """The name of the new checkpoint's directory."""
    generation: int
    changes: tuple[Change, ...]
    """What is restored, derived and filled in, and what stays lost."""
    needs_consent: tuple[str, ...]
    """Parts of the state that would be given up: nothing is written without `--accept-loss`."""
    refusals: tuple[str, ...]
    """Why nothing can be written at all; empty where something can."""
    outcome: Outcome
    """What the new checkpoint will be."""
    num_linked: int
    num_written: int
    bytes_written: int
    superseded: tuple[str, ...]
    """Checkpoints of the run that the new one takes off the line."""

    @property
    def is_needed(self) -> bool:
        """Whether there is anything to do that can be done."""
        return bool(self.refusals) or any(change.action in DONE for change in self.changes)


DONE = ("restored", "derived", "filled in", "lost", "left behind")


@dataclass(slots=True)
class Prepared:
    """The plan with all that it takes to carry it out. `manifest`: the source's, with the new values and names."""

    plan: RepairPlan
    storage: Storage
    source: Manifest
    sha256: str
    manifest: Manifest
    destination: Destination
    index: LayoutIndex | None
    """Of the new checkpoint; None where nothing can be written."""
    kept: tuple[FileState, ...]
    """Files whose every byte is good in place."""
    written: tuple[NewFile, ...]


def prepare_repair(
    target: Target,
    *,
    copies: Sequence[str] = (),
    into: str | None = None,
    watch: Watch | None = None,
) -> Prepared:
    """Reads the whole checkpoint and decides. `copies`: further runs or checkpoints that may hold the same bytes.

    `CorruptCheckpointError` if the manifest itself is lost and no copy has it: then nothing says what the files should be.
    """
    catalog = Catalog(target.storage)
    name = target.checkpoint if target.checkpoint is not None else catalog.resolve("latest").name
    siblings = Siblings(target.storage, name, is_run=target.is_run, copies=copies)
    return _Preparation(target, name, siblings, into, watch or Watch()).run()


class _Preparation:
    """One pass over one checkpoint; collects the changes as it goes."""

    def __init__(self, target: Target, name: str, siblings: Siblings, into: str | None, watch: Watch) -> None:
        self.target = target
        self.storage = target.storage
        self.name = name
        self.siblings = siblings
        self.into = into
        self.watch = watch
        self.changes: list[Change] = []
        self.refusals: list[str] = []
        self.consent: list[str] = []

    def run(self) -> Prepared:
        manifest, sha256 = self._manifest()
        index = self._index(manifest)
        restorer = Restorer(self.storage, self.name, manifest, index, self.siblings, self.watch.on_bytes)
        if self.watch.on_checkpoint is not None:
            self.watch.on_checkpoint(self.name, sum(entry.size for entry in manifest.shard_entries))
        with ThreadPoolExecutor(THREADS) as pool:
            states = list(pool.map(restorer.look, manifest.shard_entries))
        self._tell_strays(manifest)
        for state in states:
            self._tell_file(state)
        if index is None:
            index = self._rebuild_index(manifest, states)
        lost = self._lost_tensors(states, index)
        if index is not None:
            for state in states:
                state.plan = state.plan or plan_of_file(index, state.entry.name, state.entry.size)
        return self._decide(manifest, sha256, index, states, lost)

    # -- manifest and index --------------------------------------------------------------------------------------------

    def _manifest(self) -> tuple[Manifest, str]:
        try:
            return Catalog(self.storage).read_manifest(self.name)
        except (CorruptCheckpointError, StorageMissingError) as error:
            copy = self.siblings.manifest_of_same(self._attempts())
            if copy is None:
                raise CorruptCheckpointError(
                    f"{self.storage.locate(self.name)}: expected a manifest that can be read, found: {error} Without it nothing "
                    "says what the files should be. Give a copy of this very checkpoint with --from (its attempt directory has "
                    "the same name), or continue from an older one.",
                    key=f"{self.name}/manifest.json",
                ) from error
            self.changes.append(Change("manifest", "restored", f"sealed, of this very checkpoint, from {copy.label}"))
            return Catalog(copy.storage).read_manifest(copy.name)

    def _attempts(self) -> set[str]:
        """The directories in that of the checkpoint: one of them is named after the attempt that wrote it."""
        try:
            return {entry.name for entry in self.storage.list_dir(self.name) if entry.is_dir}
        except StorageMissingError:
            return set()  # Nothing is left of it.

    def _index(self, manifest: Manifest) -> LayoutIndex | None:
        entry = manifest.index_entry
        try:
            return Catalog(self.storage).read_index(self.name, manifest)
        except (CorruptCheckpointError, StorageMissingError) as error:
            log.info("the layout index is looked for elsewhere: %s", error)
        for place in self.siblings.same_files(entry):
            data = place.read(0, entry.size)
            if data is not None and digest_bytes(data) == entry.digest:
                self.changes.append(Change("layout index", "restored", f"with the recorded digest, from {place.label}"))
                return parse_index(data, key=place.key)
        return None

    def _rebuild_index(self, manifest: Manifest, states: Sequence[FileState]) -> LayoutIndex | None:
        """From the headers of the shard files, all of which must be good."""
        headers: list[ShardHeader] = []
        for state in states:
            try:
                headers.append(_read_header(state))
            except CorruptCheckpointError as error:
                self.refusals.append(f"The layout index is lost, and so is a header that could give it back: {error}")
                return None
        try:
            index = index_from_headers([state.entry.name for state in states], headers)
        except DckptError as error:
            self.refusals.append(f"The layout index is lost, and the headers do not give a complete one: {error}")
            return None
        is_same = digest_bytes(encode_index(index)) == manifest.index_entry.digest
        how = "from the headers of all shard files" + (
            "; it has the recorded digest"
            if is_same
            else ", which are proved; tensors without elements are in no header"
        )
        self.changes.append(Change("layout index", "restored" if is_same else "derived", how))
        return index

    # -- what is lost --------------------------------------------------------------------------------------------------

    def _tell_strays(self, manifest: Manifest) -> None:
        """Files in the attempt that stock readers would load with the others: the new checkpoint does not have them."""
        try:
            strays, _ = check_strays(self.storage, self.name, manifest)
        except StorageMissingError:
            return  # The directory lost its attempt; what lay in it is looked for elsewhere.
        for damage in strays:
            if not damage.is_unreadable:
                name = damage.file.rpartition("/")[2]
                self.changes.append(
                    Change(name, "left behind", "the manifest does not name it; stock readers would load it")
                )

    def _tell_file(self, state: FileState) -> None:
        name = state.entry.name
        self.changes += [Change(name, "restored", note) for note in state.notes]
        if not state.has_good_sums and state.sums is not None and not state.notes:
            self.changes.append(Change(name, "restored", "its checksums"))

    def _lost_tensors(self, states: Sequence[FileState], index: LayoutIndex | None) -> dict[str, str]:
        """Tensors of which bytes are lost -> the file. A lost header alone costs nothing while the index is there."""
        lost: dict[str, str] = {}
        for state in states:
            if state.is_whole or index is None or state.entry.name not in index.files:
                continue
            ranges = [(0, state.entry.size)] if state.sums is None else _byte_ranges(state)
            for name, begin, end in index.chunks_in_file(index.files.index(state.entry.name)):
                if any(begin < stop and first < end for first, stop in ranges):
                    lost[name] = state.entry.name
        return lost

    def _dropped(
        self, manifest: Manifest, lost: Mapping[str, str]
    ) -> tuple[set[str], set[int], dict[str, Any], tuple[str, ...]]:
        """What goes with the lost tensors: (tensors, ranks that lost their streams, values, parts that remain)."""
        dropped: set[str] = set()
        ranks: set[int] = set()
        values = dict(manifest.values)
        parts = list(manifest.parts)
        by_part: dict[str, list[str]] = {}
        for name in lost:
            part, rank = component_of(name)
            if part == RNG and rank is not None:
                ranks.add(rank)
                dropped.add(name)
            else:
                by_part.setdefault(_part_of(name, parts, part), []).append(name)
        for part, names in by_part.items():
            where = f"{shown_names(names)} in {', '.join(sorted({lost[name] for name in names}))}"
            if part == "model" or part not in (*parts, "optim"):
                self.refusals.append(f"{part}: bytes of {where} are lost: no place that was looked at has them")
            elif part == "optim" and (left := without_states(values.get("optim"), names)) is not None:
                values["optim"] = left[0]
                dropped |= left[1]
                self._give_up("optim", f"{where}: only the state of these parameters goes: {MOMENTS_LOST}")
            else:
                parts = [item for item in parts if item != part]
                values.pop(part, None)
                dropped.add(f"{part}.*")
                consequence = MOMENTS_LOST if part == "optim" else CONSEQUENCES.get(part, "it is not restored")
                self._give_up(part, f"{where}: {consequence}")
        return dropped, ranks, values, tuple(parts)

    def _give_up(self, what: str, how: str) -> None:
        self.changes.append(Change(what, "lost", how))
        self.consent.append(what)

    # -- what is filled in ---------------------------------------------------------------------------------------------

    def _decide(
        self,
        manifest: Manifest,
        sha256: str,
        index: LayoutIndex | None,
        states: Sequence[FileState],
        lost: Mapping[str, str],
    ) -> Prepared:
        dropped, lost_ranks, values, parts = self._dropped(manifest, lost)
        new = replace(manifest, values=values, parts=parts)
        streams: NewStreams | None = None
        if index is not None and is_training_state(manifest):
            new, streams = self._refill(new, index, states, lost_ranks)
        records = {} if streams is None else _records(streams)
        layout = RepairLayout(index, states, dropped, records)
        if index is not None and not self.refusals:
            layout.plan()
            assert layout.index is not None
            if streams is not None:
                rank_values = tuple(dict.fromkeys((*new.rank_values, RNG)))
                new = replace(new, rng=streams.axes, rank_values=rank_values, parts=_with_part(new.parts, RNG))
            new = _without_names(new, layout.index)
            new = replace(new, facts=_true_facts(new, frozenset(self.consent)))
        destination = self._destination(manifest, sha256)
        plan = RepairPlan(
            source=self.storage.locate(self.name),
            destination=destination.checkpoint,
            generation=destination.generation,
            changes=tuple(self.changes),
            needs_consent=tuple(dict.fromkeys(self.consent)),
            refusals=tuple(self.refusals),
            outcome=self._outcome(new, layout.index),
            num_linked=len(layout.kept),
            num_written=len(layout.written),
            bytes_written=sum(file.size for file in layout.written),
            superseded=tuple(name for name in destination.superseded if name != self.name),
        )
        return Prepared(
            plan=plan,
            storage=self.storage,
            source=manifest,
            sha256=sha256,
            manifest=new,
            destination=destination,
            index=layout.index,
            kept=tuple(layout.kept),
            written=tuple(layout.written),
        )

    def _refill(
        self, manifest: Manifest, index: LayoutIndex, states: Sequence[FileState], lost_ranks: set[int]
    ) -> tuple[Manifest, NewStreams | None]:
        values, parts = dict(manifest.values), manifest.parts
        before = [(sibling.label, sibling.manifest) for sibling in self.siblings.of_run(manifest.run_id)]
        found = {
            "progress": refill_progress(manifest) if "progress" not in parts else None,
            "scheduler": refill_scheduler(manifest, before) if "scheduler" not in parts else None,
        }
        for part, value in found.items():
            if isinstance(value, NewValue):
                values[part], parts = value.value, _with_part(parts, part)
                self._ensure_no_consequence(part)
                self.changes.append(value.change)
            elif value is not None:
                self.changes.append(value)
        if "optim" not in parts:
            self.changes.append(Change("optim", "not possible", self._advice(manifest)))
        streams = self._refill_streams(manifest, index, states, lost_ranks)
        return replace(manifest, values=values, parts=parts), streams

    def _ensure_no_consequence(self, part: str) -> None:
        """What was lost is filled in: its row keeps where the bytes were, not what training without them would be like."""
        told = f": {CONSEQUENCES[part]}"
        self.changes[:] = [
            replace(row, how=row.how.replace(told, ": filled in as the next row says"))
            if (row.what, row.action) == (part, "lost")
            else row
            for row in self.changes
        ]

    def _advice(self, manifest: Manifest) -> str:
        others = self.siblings.of_run(manifest.run_id)
        older = next((sibling.label for sibling in others if "optim" in sibling.manifest.parts), None)
        return MOMENTS_LOST if older is None else f"{MOMENTS_LOST}: {older}"

    def _refill_streams(
        self, manifest: Manifest, index: LayoutIndex, states: Sequence[FileState], lost_ranks: set[int]
    ) -> NewStreams | None:
        ranks = range(manifest.world_size)
        missing = {rank for rank in ranks if values_record_name(rank, RNG) not in index} | lost_ranks
        if not missing:
            return None
        by_name = {state.entry.name: state for state in states}
        good = {
            rank: streams
            for rank in ranks
            if rank not in missing and (streams := _read_streams(by_name, index, rank)) is not None
        }
        model = None if good else self._model(manifest)
        refilled = refill_streams(manifest, saved_mesh(manifest), good, model)
        self.changes += refilled.changes
        return refilled

    def _model(self, manifest: Manifest) -> StreamModel | None:
        """The nearest other checkpoint of the run with streams whose rank 0 can be read."""
        for sibling in self.siblings.of_run(manifest.run_id):
            other = sibling.manifest
            # Of a later generation: it may descend from this checkpoint, and the rule must give the same each time.
            if other.generation > manifest.generation or (other.world_size == 1 < manifest.world_size):
                continue
            found = _streams_of(sibling)
            if found is not None:
                return found
        return None

    def _outcome(self, manifest: Manifest, index: LayoutIndex | None) -> Outcome:
        if self.consent:
            return "PARTIAL"
        if index is None or not is_training_state(manifest):
            return "COMPLETE"
        metas = [index.meta(name) for name in index.names()]
        components = list_components(manifest, [(meta.name, meta.dtype, tuple(meta.shape)) for meta in metas])
        return "PARTIAL" if missing_components(components) else "COMPLETE"

    def _destination(self, manifest: Manifest, sha256: str) -> Destination:
        place = self.into
        if place is None:
            place = self.storage.url if manifest.generation else f"{self.storage.locate(self.name)}-repaired"
        run = self.storage if self.target.is_run else None
        return choose_destination(place, manifest, sha256, run)


# -- parts -------------------------------------------------------------------------------------------------------------


def _read_header(state: FileState) -> ShardHeader:
    if state.sums is None:
        raise CorruptCheckpointError(f"{state.entry.name} is lost.", key=state.place.key)
    size = state.entry.size
    first = bytearray(min(LENGTH_BYTES, size))
    state.read(0, len(first), memoryview(first))
    needed = header_bytes_needed(bytes(first), file_bytes=size, key=state.entry.name)
    prefix = bytearray(needed)
    state.read(0, needed, memoryview(prefix))
    return parse_shard_header(bytes(prefix), file_bytes=size, key=state.entry.name)


def _byte_ranges(state: FileState) -> list[tuple[int, int]]:
    from dckpt.format.checksum import BLOCK_BYTES

    return [(first * BLOCK_BYTES, min(stop * BLOCK_BYTES, state.entry.size)) for first, stop in state.lost]


def _part_of(name: str, parts: Sequence[str], component: str) -> str:
    """`extra.ema` of `extra.ema.x`; else the first word."""
    plain = name.split(".", 2)[2].removeprefix("values.") if name.startswith("rank.") else name
    return next((part for part in parts if plain == part or plain.startswith(f"{part}.")), component)


def _read_streams(states: Mapping[str, FileState], index: LayoutIndex, rank: int) -> Mapping[str, JsonValue] | None:
    """A rank's streams, its bytes proved."""
    name = values_record_name(rank, RNG)
    chunk = index.chunks(name)[0]
    state = states[index.files[chunk.file]]
    data = bytearray(math.prod(chunk.sizes))
    state.read(chunk.begin, chunk.begin + len(data), memoryview(data))
    found = load_json(bytes(data), key=name, limit=RECORD_BYTES_MAX)
    return found if isinstance(found, dict) else None


def _streams_of(sibling: Sibling) -> StreamModel | None:
    name = values_record_name(0, RNG)
    index = sibling.index
    if index is None or name not in index:
        return None
    try:
        from dckpt.blocks.verified_files import VerifiedFiles

        with VerifiedFiles(sibling.storage, sibling.name, sibling.manifest, index) as files:
            states = load_json(files.read_record(name, limit=RECORD_BYTES_MAX), key=name, limit=RECORD_BYTES_MAX)
    except ReadError as error:
        log.info("%s tells nothing of random streams: %s", sibling.label, error)
        return None
    return StreamModel(sibling.label, sibling.manifest.rng, states) if isinstance(states, dict) else None


def _records(streams: NewStreams) -> dict[int, bytes]:
    """Rank -> the bytes of its record, with the room that a save would keep for it."""
    found = {rank: dump_json(states, limit=RECORD_BYTES_MAX) for rank, states in streams.records.items()}
    return {rank: data.ljust(record_capacity(len(data))) for rank, data in found.items()}


_ORDER = ("model", "optim", "scheduler", "scaler", "data", "progress", "ema")


def _with_part(parts: Sequence[str], part: str) -> tuple[str, ...]:
    """The part where a save would list it: the random streams last."""
    if part in parts:
        return tuple(parts)
    found = [*(item for item in parts if item != RNG), part, *(item for item in parts if item == RNG)]
    known = [item for item in _ORDER if item in found]
    return (*known, *(item for item in found if item not in _ORDER and item != RNG), *([RNG] if RNG in found else []))


def _true_facts(manifest: Manifest, given_up: Collection[str]) -> dict[str, Any]:
    """The facts without those that describe what was given up: a resume would compare the live state with them."""
    facts = dict(manifest.facts)
    tensors = facts.get("tensors")
    if isinstance(tensors, Mapping):
        facts["tensors"] = {part: held for part, held in tensors.items() if part not in given_up}
    if "optim" in given_up:
        facts.pop("steps", None)
    if isinstance(facts.get("parts"), list):
        facts["parts"] = list(manifest.parts)
    return facts


def _without_names(manifest: Manifest, index: LayoutIndex) -> Manifest:
    """The manifest without the names of tensors that are no longer there."""
    stored = {name.split(".", 2)[2] for name in index.names() if name.startswith("rank.")}
    return replace(
        manifest,
        rank_tensors=tuple(name for name in manifest.rank_tensors if name in stored),
        rank_values=tuple(name for name in manifest.rank_values if f"values.{name}" in stored),
        aliases={
            name: held for name, held in manifest.aliases.items() if held in index or held in manifest.rank_tensors
        },
    )
