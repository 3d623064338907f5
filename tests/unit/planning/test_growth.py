"""What the coordinator does for a job grows with its tensors plus its ranks. Counted in calls and bytes, never in seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from dckpt.format.index import LayoutIndex, encode_index, parse_index
from dckpt.planning.indexing import FileReport, RankReport, lay_index
from dckpt.planning.layout import Decision, Layout, decide_layout
from dckpt.planning.records import record_capacity
from dckpt.planning.streams import classify_streams
from dckpt.planning.structure import Cut, Meshes, MeshTable, RankClass, Structure, TensorRow
from dckpt.planning.ticket import Ticket, ensure_same_step, is_still_right

INDEX_BYTES_ASKED = 50_000_000
SLACK = 1.15  # over the doubling that is allowed


def calls_of(work: Callable[[], Any]) -> int:
    """Calls of Python and C functions, resumed generators included: a loop over ranks for each tensor shows in them."""
    count = 0

    def see(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(see)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def values_of(rank: int) -> dict[str, tuple[str, int]]:
    return {"optim": ("same", 50_000), "progress": (f"{rank}", 700), "rng": (f"{rank}", 14_000)}


def fsdp_class(num_tensors: int, ranks: int, *, first: int = 0, shape: tuple[int, ...] = (16_384, 53_248)) -> RankClass:
    rows = []
    for number in range(num_tensors):
        rows.append(TensorRow(f"layers.{number:04d}.weight", "F32", shape, cut=Cut(0, ((0,),))))
        rows.append(TensorRow(f"layers.{number:04d}.step", "F32", (), is_checked=True))
    members = tuple(range(first, first + ranks))
    return RankClass(Structure(tuple(rows)), Meshes((MeshTable((ranks,), members),)), members)


def index_of(decision: Decision, ranks: int) -> LayoutIndex:
    files = [RankReport((FileReport(f"rank{rank:05d}.safetensors", 0, 4096, False, 0),), ()) for rank in range(ranks)]
    kept = decision.layout.rank_values
    capacities = [
        {name: record_capacity(size) for name, (_, size) in values_of(rank).items() if name in kept}
        for rank in range(ranks)
    ]
    return lay_index(decision, files, capacities)


def decided(num_tensors: int, ranks: int) -> Decision:
    return decide_layout([fsdp_class(num_tensors, ranks)], [values_of(rank) for rank in range(ranks)], None)


def tickets_of(layout: Layout, ranks: int) -> list[Ticket]:
    return [
        Ticket(
            step=1,
            micro_step=0,
            structure="s" * 32,
            meshes="m" * 32,
            layout=layout.key,
            checked="c" * 32,
            alike={"": "a" * 32, "0": "b" * 32},
            differing={},
            records=dict.fromkeys(layout.rank_values, (f"{rank:032x}", 700)),
            rng=dict.fromkeys(("python", "numpy", "torch", "cuda"), f"{rank:032x}"),
            coordinates={"dp": rank},
        )
        for rank in range(ranks)
    ]


def settle(layout: Layout, raw: list[bytes]) -> None:
    tickets = [Ticket.decode(one) for one in raw]
    ensure_same_step(tickets)
    assert is_still_right(layout, tickets, [("s" * 32, "m" * 32)] * len(tickets))
    classify_streams([ticket.rng for ticket in tickets], [ticket.coordinates for ticket in tickets])


@pytest.mark.parametrize("what", ["decide", "index", "extents", "open"])
def test_twice_the_tensors_on_twice_the_ranks_are_at_most_twice_the_work(what: str) -> None:
    counts = []
    for factor in (1, 2):
        tensors, ranks = 100 * factor, 64 * factor
        decision = decided(tensors, ranks)
        index = index_of(decision, ranks)
        data = encode_index(index)
        mine = [f"layers.{number:04d}.weight" for number in range(tensors)]
        work: dict[str, Callable[[], Any]] = {
            "decide": lambda t=tensors, r=ranks: decided(t, r),
            "index": lambda d=decision, r=ranks: index_of(d, r),
            "extents": lambda d=data: parse_index(d, key="layout").file_extents(),
            "open": lambda d=data, m=mine: open_on_one_rank(d, m),
        }
        counts.append(calls_of(work[what]))

    assert counts[1] <= SLACK * 2 * counts[0], counts


def open_on_one_rank(data: bytes, names: list[str]) -> None:
    index = parse_index(data, key="layout")
    for name in names:
        assert len(index.chunks_overlapping(name, (0, 0), (1, 53_248))) == 1


def test_the_grid_of_many_tensors_is_worked_out_once_however_many_ranks_hold_them() -> None:
    few, many = calls_of(lambda: decided(100, 64)), calls_of(lambda: decided(100, 512))
    values = calls_of(lambda: decided(1, 512)) - calls_of(lambda: decided(1, 64))

    assert many - few <= 2 * values, "what more ranks cost does not depend on the tensors"


def test_settling_a_plan_is_linear_in_the_ranks() -> None:
    layout = decided(4, 8).layout
    counts = []
    for ranks in (128, 256):
        raw = [ticket.encode() for ticket in tickets_of(layout, ranks)]
        counts.append(calls_of(lambda raw=raw: settle(layout, raw)))

    assert counts[1] <= SLACK * 2 * counts[0], counts


def test_the_index_of_405b_parameters_on_4096_ranks_is_small() -> None:
    ranks = 4096
    decision = decided(3 * 1137, ranks)
    data = encode_index(index_of(decision, ranks))

    assert len(data) <= INDEX_BYTES_ASKED / 25
    assert len(decision.layout.blob) < 64 * 1024, "told to every rank once"


def test_a_rank_looks_around_less_often_when_many_wait() -> None:
    from dckpt.ranks.session import LOOKS_PER_S, SLICE_S, slice_s
    from dckpt.ranks.topology import Topology

    waiting = slice_s(Topology(7, 4096), 600.0)

    assert 4096 / waiting <= LOOKS_PER_S
    assert slice_s(Topology(0, 4096), 600.0) == slice_s(Topology(7, 64), 600.0) == SLICE_S
    assert slice_s(Topology(7, 4096), 6.0) <= 1.0, "several looks before the deadline"
