"""Reads a checkpoint's tensors with all ranks of the job: each block that several want is read by one of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from dckpt.blocks.peers import Peers
from dckpt.dcp.destinations import Destinations
from dckpt.dcp.exchange import Exchange, make_arena
from dckpt.dcp.read import CheckpointFiles
from dckpt.dcp.spans import BoxRead, plan_reads
from dckpt.engine.saved_state import SavedState
from dckpt.engine.wanted import RECORD_PREFIX, Wanted
from dckpt.format.index import LayoutIndex
from dckpt.planning.pieces import FileChunks, Part, StoredChunk, find_parts
from dckpt.planning.sharing import Stripe, plan_file
from dckpt.planning.structure import RankClass
from dckpt.planning.wants import Wants
from dckpt.ranks.session import Session
from dckpt.ranks.standing import stand_by
from dckpt.ranks.topology import Topology
from dckpt.state.records import RestorePlan


@dataclass
class ReadPlan:
    """What this rank reads by itself (`direct`), and the stripes in which it takes part, by file."""

    direct: list[BoxRead]
    stripes: dict[int, tuple[Stripe, ...]] = field(default_factory=dict)
    chunks: dict[int, FileChunks] = field(default_factory=dict)
    wants: Wants | None = None

    @property
    def is_shared(self) -> bool:
        """Whether this rank exchanges anything."""
        return bool(self.stripes)


def plan_alone(saved: SavedState, plan: RestorePlan) -> ReadPlan:
    """Every rank reads all that it wants."""
    return ReadPlan(plan_reads(_named(saved, plan), saved.index))


def plan_together(
    saved: SavedState, plan: RestorePlan, wanted: Wanted, classes: Sequence[RankClass], rank: int
) -> ReadPlan:
    """This rank's part of the plan that is equal on all ranks."""
    wants = Wants(classes)
    named = _named(saved, plan)
    records = [(name, tensor) for name, tensor in named if name.startswith(RECORD_PREFIX)]
    others = [(name, tensor) for name, tensor in named if not name.startswith(RECORD_PREFIX)]
    reads = plan_reads(others, saved.index)
    found = ReadPlan([], wants=wants)
    for file in sorted({read.chunk.file for read in reads}):
        chunks = _chunks_of(saved.index, file)
        shared = plan_file(wants, file, saved.index.file_extent(file), chunks, rank)
        if shared is not None:
            found.stripes[file], found.chunks[file] = shared.stripes, chunks
            found.direct += [
                _box_read(saved.index, wanted, part)
                for begin, end in shared.alone
                for part in find_parts(wants, chunks, rank, begin, end)
            ]
    found.direct += plan_reads(records, saved.index)
    found.direct += [read for read in reads if read.chunk.file not in found.stripes]
    return found


def _box_read(index: LayoutIndex, wanted: Wanted, part: Part) -> BoxRead:
    target = wanted.chunks[part.row][part.place].tensor
    where = tuple(slice(o, o + s) for o, s in zip(part.origin, part.sizes, strict=True))
    return BoxRead(part.stored.chunk, index.meta(part.stored.name).dtype, part.offsets, part.sizes, target[where])


def _named(saved: SavedState, plan: RestorePlan) -> list[tuple[str, torch.Tensor]]:
    return [(saved.stored_name(name), tensor) for name, tensor in plan.reads]


def _chunks_of(index: LayoutIndex, file: int) -> FileChunks:
    return FileChunks([StoredChunk(name, item, chunk) for name, item, chunk in index.located_chunks(file)])


class SharedRead:
    """Carries out a plan. `run` returns this rank's own failure, after the others have what they expect from it or know."""

    def __init__(self, session: Session, peers: Peers, topology: Topology, number: int) -> None:
        self._session, self._peers, self._topology, self._number = session, peers, topology, number
        self._done = 0

    def run(
        self, plan: ReadPlan, wanted: Wanted, files: CheckpointFiles, on_bytes: Callable[[int], None]
    ) -> Exception | None:
        """Raises, the same on all ranks, when one of them is lost or aborts the load."""
        assert plan.wants is not None
        if self._peers.arena is None:
            self._peers.use_arena(make_arena())

        def count(nbytes: int) -> None:
            self._done += nbytes
            on_bytes(nbytes)

        destinations = Destinations(wanted.boxes)
        exchange = Exchange(self._peers, self._number, plan.wants, destinations, plan.stripes, plan.chunks, count)
        self._session.phase = f"read-{self._number}"  # what errors name
        exchange.begin()
        try:
            exchange.read_own(files.open, lambda is_done: self._wait(exchange, is_done))
            failure = exchange.failure or _attempt(lambda: files.read_boxes(plan.direct, count))
            self._wait(exchange, exchange.settle)
        finally:
            exchange.finish()
        return exchange.failure or failure

    def _wait(self, exchange: Exchange, is_done: Callable[[float], bool]) -> None:
        work = _Work(self._peers, exchange, lambda: self._done)
        stand_by(self._session, self._topology, work, is_done)


def _attempt(action: Callable[[], None]) -> Exception | None:
    try:
        action()
    except Exception as error:  # noqa: BLE001 - it travels to all ranks, which raise it together
        return error
    return None


class _Work:
    """The exchange as whoever watches over it sees it."""

    def __init__(self, peers: Peers, exchange: Exchange, bytes_read: Callable[[], int]) -> None:
        self._peers, self._exchange, self._bytes_read = peers, exchange, bytes_read

    def progress(self) -> int:
        return self._bytes_read() + self._peers.bytes_sent + self._peers.receiving.bytes_received

    def is_busy(self) -> bool:
        return self._exchange.is_reading

    def awaited(self) -> Collection[int]:
        return self._exchange.awaited() | self._peers.waiting_for().keys()

    def untaken(self) -> Mapping[int, float]:
        return self._peers.waiting_for()

    def lost(self) -> tuple[int, str] | None:
        if self._exchange.lost is not None:
            return self._exchange.lost.rank, self._exchange.lost.reason
        gone = self._peers.receiving.lost
        return next(((rank, gone[rank]) for rank in sorted(self.awaited()) if rank in gone), None)
