"""Fingerprints between a load and its validation: what a load keeps of the sums files, and the comparison with live tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from dckpt.dcp.fingerprints import live_fingerprints
from dckpt.errors import CorruptCheckpointError
from dckpt.planning.records import record_name
from dckpt.resume.fingerprints import Comparison, Exchange, SavedFingerprints, compare
from dckpt.state.rng import preserved_rng

if TYPE_CHECKING:
    from dckpt.blocks.read import VerifiedFile
    from dckpt.engine.saved_state import SavedState
    from dckpt.ranks.topology import Topology
    from dckpt.resume.report import LoadResult
    from dckpt.state.fingerprints import LiveFingerprint
    from dckpt.state.records import RestorePlan
    from dckpt.state.train_state import TrainState


class SharedSums:
    """Collects the fingerprints of loaded tensors from the shard files that are this rank's share."""

    def __init__(self, saved: SavedState, plan: RestorePlan) -> None:
        self._saved = saved
        known = saved.tensors()
        self._tensors = {name: (saved.stored_name(name), known[name][0]) for name, _ in plan.reads}
        self._records = self._find_records()
        plain = {name for name, (stored, _) in self._tensors.items() if stored == name}
        self._wanted = frozenset(plain | self._records.keys())
        self._shares: dict[str, int] = {}
        self._without: set[str] = set()

    def _find_records(self) -> dict[str, str]:
        """Every rank's record that some rank loads: stored name -> plain name. The same on every rank."""
        saved, found = self._saved, {}
        names = [name for name, (stored, _) in self._tensors.items() if stored != name]
        for rank in range(saved.world_size if saved.is_same_mesh else 1):
            for name in names:
                if record_name(rank, name) in saved.index:
                    found[record_name(rank, name)] = name
        return found

    def add(self, number: int, file: VerifiedFile) -> None:
        """File `number` of the index, open: its sums are in memory already."""
        chunks, fingerprints = self._saved.index.chunks_in_file(number), file.sums.fingerprints
        if fingerprints and len(fingerprints) != len(chunks):
            raise CorruptCheckpointError(
                f"{file.key}: expected a fingerprint for each of its {len(chunks)} chunks, found {len(fingerprints)}. The "
                "checkpoint is inconsistent; use an older step.",
                key=file.key,
                field="fingerprints",
                expected=len(chunks),
                found=len(fingerprints),
            )
        for place, (name, _, _) in enumerate(chunks):
            if name not in self._wanted:
                continue
            if fingerprints:
                self._shares[name] = self._shares.get(name, 0) ^ fingerprints[place]
            else:
                self._without.add(name)

    def result(self) -> SavedFingerprints:
        """What was collected."""
        return SavedFingerprints(
            tensors=self._tensors,
            records=self._records,
            is_same_mesh=self._saved.is_same_mesh,
            aliases=dict(self._saved.aliases),
            shares=self._shares,
            without=frozenset(self._without),
        )


def compare_fingerprints(
    state: TrainState,
    loaded: LoadResult,
    exchange: Exchange,
    topology: Topology,
    *,
    on_bytes: Callable[[int], None] = lambda _: None,
    on_live: Callable[[Mapping[str, LiveFingerprint]], None] = lambda _: None,
) -> Comparison:
    """Whether the live tensors are those that `loaded` read, on all ranks together; right after the load, before any step.

    Compares what was loaded as it was saved: not what was cast, left out or allowed to be missing. Tensors that differed by
    rank are compared rank by rank. Replicas are compared with each other besides, all of them. Changes nothing: no gradient,
    no state, no random number. Reads the live tensors once; what lies on a GPU passes through page-locked host memory.

    exchange: `Session.exchange` of a session of its own. on_bytes: hears of the progress, in bytes; several threads call it,
    one at a time. on_live: gets what this rank holds. Raises on every rank together if one of them cannot read its tensors.
    """
    live: Mapping[str, LiveFingerprint] | None = None
    aliases: Mapping[str, str] = {}
    failure = None
    try:
        with preserved_rng(state.generators):  # a state_dict() of the user's may draw numbers
            captured = state.capture(gradients="grad" in loaded.parts)
        aliases = captured.aliases
        live = live_fingerprints(captured.tensors, topology, on_bytes)
        on_live(live)
    except Exception as error:  # noqa: BLE001 - it travels to all ranks, which raise it together
        failure = error
    return compare(loaded.fingerprints, live, aliases, exchange, topology.rank, error=failure)
