"""The ranks that are not there: what each of them says at a save, made by the code that a rank runs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dckpt.engine.agreement import PlanAgreement, Remembered
from dckpt.engine.local_state import Described, LocalState, describe_state
from dckpt.format.layout import sums_file_bytes
from dckpt.planning.indexing import FileReport, RankReport
from dckpt.planning.layout import Layout, Values
from dckpt.planning.records import record_capacity
from dckpt.planning.structure import Meshes, Structure
from dckpt.planning.ticket import Details, Question, Ticket
from dckpt.ranks.topology import Topology
from dckpt.state.records import Captured
from dckpt.state.train_state import TrainState

OWN_VALUES = ("rng", "progress")  # differ by rank: random streams, and losses that nobody reduced


@dataclass(frozen=True)
class Role:
    """What the ranks of one class have in common: the tensors of a pipeline stage, or of the whole model."""

    structure: Structure
    meshes: Meshes
    values: Values
    streams: tuple[str, ...]
    digests: dict[str, str]
    ranks: range

    @classmethod
    def of(cls, state: TrainState, ranks: range, world_size: int) -> Role:
        """As a real rank of the class describes itself."""
        local = describe_state(state.capture(), None, world_size=world_size)
        described = local.described
        return cls(described.structure, described.meshes, local.values, tuple(local.rng), local.digests, ranks)


def digest_of(*facts: object) -> str:
    """32 hex digits that stand for contents which are not there."""
    return hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()


class Peer:
    """One rank. Its tensors exist by name only; all that it tells is what it would tell with them."""

    def __init__(self, rank: int, role: Role, axes: tuple[str, ...], shape: tuple[int, ...]) -> None:
        self.rank = rank
        self._role = role
        self._described = Described((), role.structure, role.meshes)
        self._agreement = PlanAgreement(Topology(rank, int(np.prod(shape))))
        place = np.unravel_index(rank, shape)
        self.coordinates = {axis: int(at) for axis, at in zip(axes, place, strict=True)}

    def local(self, step: int) -> LocalState:
        """Its state at `step`, without the tensors."""
        own = {name: (digest_of(name, self.rank, step), self._role.values[name][1]) for name in OWN_VALUES}
        return LocalState(
            captured=Captured((), {}, {}, {}, ()),
            chunks=[],
            records={},
            described=self._described,
            values={**self._role.values, **own},
            rng={stream: digest_of(stream, self.rank, step) for stream in self._role.streams},
            digests=self._role.digests,
        )

    def ticket(self, step: int) -> Ticket:
        """What it says first."""
        return self._agreement.ticket(self.local(step), step, 0, self.coordinates)

    def details(self, step: int, question: Question) -> Details:
        """What it says when the layout is decided anew."""
        return self._agreement.details(self.local(step), question)

    def adopt(self, layout: Layout, step: int, report: RankReport) -> None:
        """Remembers the layout. A real rank plans its files by it; here their sizes are known."""
        values = self.local(step).values
        capacities = {name: record_capacity(values[name][1]) for name in layout.rank_values if name in values}
        self._agreement.remembered = Remembered(layout, self._described, capacities, [], report)


@dataclass(frozen=True)
class Files:
    """The one shard file of each rank: its size, and where its data begins."""

    sizes: tuple[int, ...]
    data_begins: tuple[int, ...]

    def report(self, rank: int) -> RankReport:
        """What the rank reports of its plan."""
        file = FileReport(f"rank{rank:05d}.safetensors", self.sizes[rank], self.data_begins[rank], False, 0)
        return RankReport((file,), ())

    def write(self, directory: str, attempt: str, rank: int, step: int) -> list[list[object]]:
        """Makes shard and sums file, of the right sizes and without contents; returns the rows of the manifest."""
        size, name = self.sizes[rank], f"rank{rank:05d}"
        rows: list[list[object]] = []
        for kind, suffix, length in (("shard", "safetensors", size), ("sums", "sums", sums_file_bytes(size, 0))):
            path = f"{directory}/{name}.{suffix}"
            with open(path, "xb") as file:
                os.truncate(file.fileno(), length)
            rows.append([f"{attempt}/{name}.{suffix}", length, digest_of(kind, rank, step), kind, rank])
        return rows


def peers_of(roles: list[Role], axes: tuple[str, ...], shape: tuple[int, ...], ranks: range) -> Iterator[Peer]:
    """The peers with numbers in `ranks`."""
    for rank in ranks:
        role = next(role for role in roles if rank in role.ranks)
        yield Peer(rank, role, axes, shape)
