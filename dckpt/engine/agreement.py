"""How all ranks agree on the plan of a save: remembered from save to save, decided anew when any rank's state changed.

Every rank keeps what follows from its own structure (its file plans, with their headers); the coordinator also keeps the
structures and the index. A save whose state has the shape of the one before exchanges some hundred bytes a rank.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dckpt.engine.local_state import Described, LocalState
from dckpt.format.index import LayoutIndex
from dckpt.planning.files import FilePlans, plan_files
from dckpt.planning.indexing import RankReport, index_of, report_files
from dckpt.planning.layout import Decision, Layout, Values, decide_layout
from dckpt.planning.records import record_capacity
from dckpt.planning.structure import Meshes, RankClass, Structure
from dckpt.planning.ticket import (
    Details,
    Question,
    Ticket,
    alike_digests,
    ask,
    combined,
    is_still_right,
)
from dckpt.ranks.topology import Topology

log = logging.getLogger(__name__)


@dataclass
class Remembered:
    """The plan of this rank that all ranks agreed on last."""

    layout: Layout
    described: Described
    capacities: dict[str, int]
    files: FilePlans
    report: RankReport

    def fits(self, local: LocalState) -> bool:
        """Whether the state still has this plan's shape, and its records still fit their places."""
        return (
            local.described is self.described
            and local.values.keys() >= self.capacities.keys()
            and all(local.values[name][1] <= capacity for name, capacity in self.capacities.items())
        )


@dataclass
class Known:
    """What the coordinator remembers of the last decision. `index` is built when the ranks have reported their files."""

    decision: Decision
    keys: list[tuple[str, str]]
    capacities: list[dict[str, int]]
    index: LayoutIndex | None = None

    def index_from(self, reports: Sequence[RankReport | None]) -> LayoutIndex:
        """The index of the decision; made from the ranks' reports when it is not known yet."""
        if self.index is None:
            present = [report for report in reports if report is not None]
            assert len(present) == len(reports), "every rank was asked for its report"
            self.index = index_of(self.decision, present, self.capacities)
        return self.index


@dataclass
class PlanAgreement:
    """One rank's side of the agreement; on the coordinator also the deciding one."""

    topology: Topology
    described: Described | None = None
    remembered: Remembered | None = None
    known: Known | None = None
    num_decisions: int = 0
    """How often a layout was decided anew; the other saves used the one before."""
    _structures: dict[str, Structure] = field(default_factory=dict)
    _meshes: dict[str, Meshes] = field(default_factory=dict)

    # -- every rank ----------------------------------------------------------------------------------------------------

    def ticket(self, local: LocalState, step: int, micro_step: int, coordinates: Mapping[str, int]) -> Ticket:
        """What this rank says first."""
        self.described = local.described
        if self.remembered is not None and not self.remembered.fits(local):
            self.remembered = None
        layout = self.remembered.layout if self.remembered is not None else None
        structure = local.described.structure
        return Ticket(
            step=step,
            micro_step=micro_step,
            structure=structure.key,
            meshes=local.described.meshes.key,
            layout=layout.key if layout is not None else "",
            checked=combined(list(local.digests.values())),
            alike=alike_digests(structure, local.digests, local.values, layout),
            differing={n: d for n, d in local.digests.items() if layout is not None and n in layout.rank_tensors},
            records={n: v for n, v in local.values.items() if layout is not None and n in layout.rank_values},
            rng=local.rng,
            coordinates=coordinates,
        )

    def details(self, local: LocalState, question: Question) -> Details:
        """What this rank answers when the layout has to be decided."""
        described, rank = local.described, self.topology.rank
        sends_structure = question.structures.get(described.structure.key) == rank
        sends_meshes = question.meshes.get(described.meshes.key) == rank
        return Details(
            structure=described.structure.blob.decode() if sends_structure else None,
            meshes=described.meshes.blob.decode() if sends_meshes else None,
            values=local.values,
            digests=local.digests if question.wants_digests else None,
        )

    def adopt(self, local: LocalState, layout: Layout) -> None:
        """Plans this rank's files by a new layout."""
        capacities = _capacities(local.values, layout)
        structure = local.described.structure
        files = plan_files(self.topology.rank, structure, local.boxes, layout, capacities)
        report = report_files(files, layout.listed)
        self.remembered = Remembered(layout, local.described, capacities, files, report)

    # -- the coordinator -----------------------------------------------------------------------------------------------

    def is_settled(self, tickets: Sequence[Ticket]) -> bool:
        """Whether the layout of the last save holds for this one; any rank's change is a change for all."""
        known = self.known
        return known is not None and is_still_right(known.decision.layout, tickets, known.keys)

    def ask(self, tickets: Sequence[Ticket]) -> Question:
        """What to hear before deciding."""
        return ask(tickets, self._structures, self._meshes)

    def decide(self, tickets: Sequence[Ticket], details: Sequence[Details]) -> Layout:
        """The layout for these ranks, remembered for the saves that follow."""
        self._learn(details)
        keys = [(ticket.structure, ticket.meshes) for ticket in tickets]
        ranks_of: dict[tuple[str, str], list[int]] = {}
        for rank, key in enumerate(keys):
            ranks_of.setdefault(key, []).append(rank)
        classes = [
            RankClass(self._structures[structure], self._meshes[meshes], tuple(ranks))
            for (structure, meshes), ranks in ranks_of.items()
        ]
        digests = {rank: found.digests for rank, found in enumerate(details) if found.digests is not None}
        values = [found.values for found in details]
        decision = decide_layout(classes, values, digests or None)
        self.known = Known(decision, keys, [_capacities(found, decision.layout) for found in values])
        self.num_decisions += 1
        # Structures of earlier states are forgotten: what changes often must not pile up.
        self._structures = {key: self._structures[key] for key, _ in keys}
        self._meshes = {key: self._meshes[key] for _, key in keys}
        return decision.layout

    def _learn(self, details: Sequence[Details]) -> None:
        for found in details:
            if found.structure is not None:
                structure = Structure.decode(found.structure.encode())
                self._structures[structure.key] = structure
            if found.meshes is not None:
                meshes = Meshes.decode(found.meshes.encode())
                self._meshes[meshes.key] = meshes


def _capacities(values: Values, layout: Layout) -> dict[str, int]:
    """Bytes laid out for each record of a rank; the coordinator and the rank compute the same."""
    return {name: record_capacity(size) for name, (_, size) in values.items() if name in layout.rank_values}


def encode_question(question: Question) -> dict[str, Any]:
    """For the answer to the tickets."""
    return {"ask": [dict(question.structures), dict(question.meshes), question.wants_digests]}


def decode_question(answer: Mapping[str, Any]) -> Question | None:
    """The question in an answer, None if the layout in force holds."""
    return Question(*answer["ask"]) if "ask" in answer else None


def encode_layout(layout: Layout) -> str:
    """For the answer to the details."""
    return base64.b64encode(layout.blob).decode("ascii")


def decode_layout(text: str) -> Layout:
    """The layout in an answer."""
    return Layout.decode(base64.b64decode(text))
