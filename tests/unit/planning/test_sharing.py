"""Loads shared by ranks: every element of every destination is filled exactly once, and every block is read once."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from dckpt.format.checksum import BLOCK_BYTES
from dckpt.format.index import Chunk, LayoutIndex
from dckpt.planning.indexing import RankReport, index_of, report_files
from dckpt.planning.pieces import FileChunks, StoredChunk, clip_box, find_pieces
from dckpt.planning.sharing import PEERS_MAX, STRIPE_BLOCKS_MAX, SURPLUS, Stripe, plan_file
from dckpt.planning.structure import Box, Meshes, RankClass, Structure
from dckpt.planning.wants import Wants
from tests.unit.planning.test_layout import World, mesh_of

SHAPES = ((1000, 96), (2, 70_001), (3, 5, 3001), (40_001,), (7,), (1, 3), (), (0, 4))


def make_world(size: int, kind: str, shapes: Any = SHAPES) -> World:
    """Each tensor laid out over `size` ranks in one way; I32, so that every element can hold its own number."""
    world = World(size)
    half = 2 if size % 2 == 0 else 1
    for number, shape in enumerate(shapes):
        name = f"t{number}"
        can_cut_columns = len(shape) > 1
        if kind == "plain" or not shape:
            world.add_plain(name, shape, dtype="I32")
        elif kind == "rows":
            world.add(name, shape, mesh_of(size), [Shard(0)], dtype="I32")
        elif kind == "columns":
            world.add(name, shape, mesh_of(size), [Shard(1 if can_cut_columns else 0)], dtype="I32")
        elif kind == "replicas of rows":
            world.add(name, shape, mesh_of(size // half, half), [Replicate(), Shard(0)], dtype="I32")
        elif kind == "rows and columns":
            placements = [Shard(0), Shard(1)] if can_cut_columns else [Shard(0), Replicate()]
            world.add(name, shape, mesh_of(size // half, half), placements, dtype="I32")
        elif kind == "strided":
            world.add(
                name, shape, mesh_of(size // half, half), [_StridedShard(0, split_factor=half), Shard(0)], dtype="I32"
            )
        elif kind == "boxes":
            edges = [rank * shape[0] // size for rank in range(size)] + [shape[0]]
            boxes: dict[int, list[Box]] = {
                rank: [((first, *([0] * (len(shape) - 1))), (stop - first, *shape[1:]))] if stop > first else []
                for rank, (first, stop) in enumerate(pairwise(edges))
            }
            world.add_boxes(name, shape, boxes, dtype="I32")
    return world


KINDS = ("plain", "rows", "columns", "replicas of rows", "rows and columns", "strided", "boxes")


def index_of_world(world: World) -> LayoutIndex:
    decision, plans = world.plan()
    reports = [RankReport.from_json(report_files(plan, decision.layout.listed).to_json()) for plan in plans]
    return index_of(decision, reports, world.capacities(decision.layout))


def classes_of(world: World) -> list[RankClass]:
    found: dict[tuple, list[int]] = {}
    for rank in range(world.size):
        found.setdefault((tuple(world.rows[rank]), tuple(world.meshes[rank])), []).append(rank)
    return [RankClass(Structure(rows), Meshes(meshes), tuple(ranks)) for (rows, meshes), ranks in found.items()]


def chunks_of(index: LayoutIndex, file: int) -> FileChunks:
    return FileChunks([StoredChunk(name, item, chunk) for name, item, chunk in index.located_chunks(file)])


def number_elements(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(math.prod(shape), dtype=np.int32).reshape(shape)


def image_of(index: LayoutIndex, file: int) -> np.ndarray:
    """The file's bytes, every element of a tensor being its row-major number in the tensor."""
    image = np.zeros(index.file_extent(file), dtype=np.uint8)
    for name, _, chunk in index.located_chunks(file):
        if not name.startswith("rank."):
            data = number_elements(index.meta(name).shape)[box_slices(chunk.offsets, chunk.sizes)].tobytes()
            image[chunk.begin : chunk.begin + len(data)] = np.frombuffer(data, dtype=np.uint8)
    return image


def box_slices(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))


class Loading:
    """All ranks of a job load by their plans; counts what each reads."""

    def __init__(self, saved: LayoutIndex, live: World) -> None:
        self.index, self.live = saved, live
        self.classes = classes_of(live)
        # -1 is an element that nobody filled; a second fill is found when it is written.
        self.filled = [[[np.full(sizes, -1) for _, sizes in boxes] for boxes in rows] for rows in live.boxes]
        self.files = range(len(saved.files))
        self.plans: list[dict[int, list[Stripe]]] = []
        self.block_reads = {
            file: np.zeros(-(-saved.file_extent(file) // BLOCK_BYTES), dtype=int) for file in self.files
        }
        self.needed = {file: np.zeros_like(reads, dtype=bool) for file, reads in self.block_reads.items()}

    def run(self) -> None:
        images = {file: image_of(self.index, file) for file in self.files}
        for rank in range(self.live.size):
            wants = Wants(self.classes)  # each rank its own: numbering of groups must not matter
            plan = {}
            order = self.files if rank % 2 else reversed(self.files)
            for file in order:
                chunks = chunks_of(self.index, file)
                found = plan_file(wants, file, len(images[file]), chunks, rank)
                stripes = list(found.stripes) if found is not None else []
                plan[file] = stripes
                self._mark_needed(wants, file, chunks, rank, is_direct=found is None)
                alone = found.alone if found is not None else ((0, len(images[file])),)
                for begin, end in [*((s.begin, s.end) for s in stripes), *alone]:
                    self._fill(wants, chunks, rank, begin, images[file][begin:end])
                for begin, end in alone if found is not None else ():
                    self.block_reads[file][begin // BLOCK_BYTES : -(-end // BLOCK_BYTES)] += 1
                for stripe in stripes:
                    if stripe.owner == rank:
                        self.block_reads[file][stripe.begin // BLOCK_BYTES : -(-stripe.end // BLOCK_BYTES)] += 1
            self.plans.append(plan)

    def _mark_needed(self, wants: Wants, file: int, chunks: FileChunks, rank: int, *, is_direct: bool) -> None:
        mine = np.zeros_like(self.needed[file])
        for stored in chunks.chunks:
            for found in wants.intervals(stored.name, stored.chunk, stored.item_bytes):
                for begin, end, group in zip(found.begins, found.ends, found.groups, strict=True):
                    if rank in wants.group(group):
                        mine[(stored.begin + begin) // BLOCK_BYTES : -(-(stored.begin + end) // BLOCK_BYTES)] = True
        self.needed[file] |= mine
        if is_direct:
            self.block_reads[file] += mine

    def _fill(self, wants: Wants, chunks: FileChunks, rank: int, begin: int, data: np.ndarray) -> None:
        for piece in find_pieces(wants, chunks, rank, begin, begin + len(data)):
            source = np.ndarray(piece.sizes, "<i4", data, piece.offset, piece.strides)
            target, where = self.filled[rank][piece.row][piece.place], box_slices(piece.origin, piece.sizes)
            assert (target[where] == -1).all(), "filled twice"
            target[where] = source

    def check(self) -> None:
        for rank in range(self.live.size):
            for row, boxes, arrays in zip(self.live.rows[rank], self.live.boxes[rank], self.filled[rank], strict=True):
                for (offsets, sizes), array in zip(boxes, arrays, strict=True):
                    assert (array == number_elements(row.shape)[box_slices(offsets, sizes)]).all(), (rank, row.name)
            for stripes in self.plans[rank].values():
                for stripe in stripes:
                    assert stripe.owner in stripe.takers
                    assert rank in stripe.takers
                    assert stripe.end - stripe.begin <= STRIPE_BLOCKS_MAX * BLOCK_BYTES
                    for taker in stripe.takers:
                        assert stripe in self.plans[taker][stripe.file], "the plan is one"

    def reads(self) -> tuple[int, int]:
        """Blocks read by all ranks together, and distinct blocks that anybody wants."""
        for file in self.files:
            assert (self.block_reads[file][self.needed[file]] >= 1).all(), "a wanted block that nobody reads"
        return sum(int(r.sum()) for r in self.block_reads.values()), sum(int(n.sum()) for n in self.needed.values())


def load(saved: World, live: World) -> Loading:
    loading = Loading(index_of_world(saved), live)
    loading.run()
    loading.check()
    return loading


@settings(max_examples=25, deadline=None)
@given(
    saved_kind=st.sampled_from(KINDS),
    live_kind=st.sampled_from(KINDS),
    saved_size=st.integers(1, 6),
    live_size=st.integers(1, 6),
)
def test_every_element_is_filled_once_and_blocks_are_read_once(saved_kind, live_kind, saved_size, live_size):
    loading = load(make_world(saved_size, saved_kind), make_world(live_size, live_kind))

    read, wanted = loading.reads()
    assert read <= wanted * (1 + SURPLUS)


def test_replicas_read_each_block_once_and_evenly():
    loading = load(make_world(2, "rows", [(4096, 512), (100,)]), make_world(4, "plain", [(4096, 512), (100,)]))

    read, wanted = loading.reads()
    assert read == wanted
    owned = [
        sum(s.end - s.begin for stripes in plan.values() for s in stripes if s.owner == rank)
        for rank, plan in enumerate(loading.plans)
    ]
    assert max(owned) <= 1.3 * min(owned), owned


def test_disjoint_parts_of_several_megabytes_are_read_without_a_neighbour():
    loading = load(make_world(2, "rows", [(8192, 512)]), make_world(3, "rows", [(8192, 512)]))

    assert not any(stripes for plan in loading.plans for stripes in plan.values())
    read, wanted = loading.reads()
    assert read <= 1.05 * wanted


def test_a_rank_outside_a_mesh_takes_no_part():
    live = World(4)
    live.add("t0", (1500, 96), mesh_of(2), [Shard(1)], dtype="I32")
    loading = load(make_world(2, "rows", [(1500, 96)]), live)

    assert all(not stripes for rank in (2, 3) for stripes in loading.plans[rank].values())
    assert any(loading.plans[0].values())


def test_more_ranks_than_share_a_stripe_read_it_once_a_group():
    shapes = [(1024, 256)]
    loading = load(make_world(1, "rows", shapes), make_world(PEERS_MAX + 8, "plain", shapes))

    read, wanted = loading.reads()
    assert wanted < read <= 2 * wanted
    takers = {s.takers for plan in loading.plans for stripes in plan.values() for s in stripes if len(s.takers) > 1}
    assert sorted(len(found) for found in takers) == [20, 20]


def test_elements_that_lie_across_blocks_are_not_shared():
    wants = Wants(classes_of(make_world(2, "plain", [(100_000,)])))
    chunks = FileChunks([StoredChunk("t0", 4, Chunk((0,), (100_000,), 0, 4098))])

    assert plan_file(wants, 0, 404_098, chunks, 0) is None


def test_a_plan_for_one_rank_of_thousands_needs_only_its_own_file():
    """512 ranks read parts of one file: their plan is made from arrays, not rank by rank."""
    world = World(1)
    shape = (4096, 4096)
    for number in range(200):
        world.add_plain(f"t{number:03}", shape, dtype="I32")
    table = mesh_of(512)
    rows = make_row_structure(shape, table, 200)
    live_classes = [RankClass(Structure(rows), Meshes((table,)), table.ranks)]
    index = index_of_world(world)
    found = plan_file(Wants(live_classes), 0, index.file_extent(0), chunks_of(index, 0), 17)

    assert found is not None
    # Parts of 128 KiB have neighbours in every second block: shared, and only with those neighbours.
    assert all(len(stripe.takers) == 2 for stripe in found.stripes)
    assert 2 * 200 >= len(found.stripes) >= 200
    assert len(found.alone) == 200


def make_row_structure(shape, table, count):
    from dckpt.planning.structure import Cut, TensorRow

    return tuple(TensorRow(f"t{number:03}", "I32", shape, cut=Cut(0, ((0,),))) for number in range(count))


@given(
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=4),
    data=st.data(),
)
def test_a_clipped_box_holds_exactly_the_elements_in_the_range(shape, data):
    offsets = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    sizes = tuple(data.draw(st.integers(1, size - o)) for size, o in zip(shape, offsets, strict=True))
    count = math.prod(shape)
    first = data.draw(st.integers(-3, count))
    stop = data.draw(st.integers(first, count + 3))
    numbers = np.arange(count).reshape(shape)

    found = [numbers[box_slices(o, s)].reshape(-1) for o, s in clip_box(shape, offsets, sizes, first, stop)]

    inside = numbers[box_slices(offsets, sizes)].reshape(-1)
    expected = inside[(inside >= first) & (inside < stop)]
    assert np.array_equal(np.concatenate([*found, []]), expected)
    assert len(found) <= 2 * len(shape) + 1


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_a_file_are_those_that_the_index_names(kind):
    index = index_of_world(make_world(4, kind))
    by_name = {(name, chunk) for name in index.names() for chunk in index.chunks(name) if chunk.file >= 0}

    assert {(n, c) for file in range(len(index.files)) for n, _, c in index.located_chunks(file)} == by_name
