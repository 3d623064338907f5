"""Every element has one writer, the index says where, and the coordinator needs no rank's own plan to know."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

from dckpt.engine.local_state import cut_row
from dckpt.errors import ConfigError
from dckpt.format.index import encode_index, parse_index
from dckpt.planning.files import plan_files
from dckpt.planning.indexing import RankReport, index_of, report_files
from dckpt.planning.layout import Layout, decide_layout
from dckpt.planning.records import record_capacity
from dckpt.planning.structure import Meshes, MeshTable, RankClass, Structure, TensorRow


def mesh_of(*shape: int, first: int = 0) -> MeshTable:
    return MeshTable(shape, tuple(range(first, first + math.prod(shape))))


def place_of(table: MeshTable, rank: int) -> tuple[int, ...]:
    return tuple(int(at) for at in np.argwhere(np.array(table.ranks).reshape(table.shape) == rank)[0])


class World:
    """Ranks with DTensors on meshes and plain tensors, described as a rank describes its own."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.rows: list[list[TensorRow]] = [[] for _ in range(size)]
        self.boxes: list[list[list]] = [[] for _ in range(size)]
        self.meshes: list[dict[MeshTable, int]] = [{} for _ in range(size)]
        self.digests: list[dict[str, str]] = [{} for _ in range(size)]
        self.values: list[dict[str, tuple[str, int]]] = [{"rng": (f"{rank}", 700)} for rank in range(size)]

    def add(self, name, shape, table, placements, *, dtype="F32", is_frozen=False):
        """A DTensor, on the ranks of `table`; torch says which box each of them holds."""
        for rank in table.ranks:
            place = place_of(table, rank)
            sizes, offsets = _compute_local_shape_and_global_offset(
                shape, table.shape, lambda at, p=place: p[at], placements
            )
            boxes = [] if 0 in sizes else [(tuple(offsets), tuple(sizes))]
            row = TensorRow(name, dtype, tuple(shape), is_frozen=is_frozen)
            self.rows[rank].append(cut_row(row, table, placements, place, tuple(boxes), self.meshes[rank]))
            self.boxes[rank].append(boxes)

    def add_plain(self, name, shape, *, ranks=None, contents=None, dtype="F32"):
        """A plain tensor; `contents(rank)` stands for its bytes, None for one that is trusted to be alike."""
        for rank in range(self.size) if ranks is None else ranks:
            self.rows[rank].append(TensorRow(name, dtype, tuple(shape), is_checked=contents is not None))
            self.boxes[rank].append([((0,) * len(shape), tuple(shape))] if math.prod(shape) else [])
            if contents is not None:
                self.digests[rank][name] = str(contents(rank))

    def add_boxes(self, name, shape, boxes_by_rank, *, dtype="F32"):
        """A tensor in boxes of no regular kind."""
        for rank, boxes in boxes_by_rank.items():
            self.rows[rank].append(TensorRow(name, dtype, tuple(shape), boxes=tuple(boxes)))
            self.boxes[rank].append(list(boxes))

    def decide(self):
        classes: dict[tuple, list[int]] = {}
        for rank in range(self.size):
            classes.setdefault((tuple(self.rows[rank]), tuple(self.meshes[rank])), []).append(rank)
        decision = decide_layout(
            [RankClass(Structure(rows), Meshes(meshes), tuple(ranks)) for (rows, meshes), ranks in classes.items()],
            self.values,
            dict(enumerate(self.digests)),
        )
        return decision, len(classes)

    def plan(self):
        """(decision, each rank's files) as the ranks plan them from what travels."""
        decision, _ = self.decide()
        layout = Layout.decode(decision.layout.blob)
        assert layout == decision.layout
        return decision, [
            plan_files(rank, Structure(tuple(self.rows[rank])), self.boxes[rank], layout, self.capacities(layout)[rank])
            for rank in range(self.size)
        ]

    def capacities(self, layout):
        return [
            {n: record_capacity(size) for n, (_, size) in v.items() if n in layout.rank_values} for v in self.values
        ]


def ensure_right(world: World):
    """Each element in exactly one file, and an index that says so; returns (index, bytes written by rank)."""
    decision, plans = world.plan()
    reports = [RankReport.from_json(report_files(plan, decision.layout.listed).to_json()) for plan in plans]
    index = index_of(decision, reports, world.capacities(decision.layout))
    index = parse_index(encode_index(index), key="k")
    written: dict[str, list] = {}
    loads = []
    number = 0
    for plan in plans:
        loads.append(0)
        for file, _ in plan:
            assert index.files[number] == file.file
            assert index.file_extent(number) == file.size
            for tensor, begin in zip(file.tensors, file.begins, strict=True):
                written.setdefault(tensor.name, []).append((tensor.offsets, tensor.shape, number, begin))
                loads[-1] += tensor.nbytes
            number += 1
    rows = {row.name: row for rank in range(world.size) for row in world.rows[rank]}
    for name in index.names():
        meta = index.meta(name)
        chunks = [(c.offsets, c.sizes, c.file, c.begin) for c in index.chunks(name)]
        assert chunks == sorted(written.get(name, [])), name
        counts = np.zeros(meta.shape, dtype=int)
        for offsets, sizes, _, _ in chunks:
            counts[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] += 1
        assert (counts == 1).all(), name
    plain = {name for name in rows if name not in decision.layout.rank_tensors}
    assert plain <= set(index.names())
    return index, loads


def test_fsdp_over_all_ranks_is_a_grid_without_owners_to_tell():
    world = World(4)
    for name, shape in (("a.weight", (8, 6)), ("b.bias", (5,)), ("c.narrow", (1, 3)), ("d.none", (0, 4)), ("e", ())):
        world.add(name, shape, mesh_of(4), [Shard(0)] if shape else [Replicate()])
    decision, num_classes = world.decide()
    index, _ = ensure_right(world)

    assert num_classes == 1
    assert decision.layout.listed == frozenset()
    assert set(decision.layout.column_of) == {"e"}, "only what several ranks hold needs an owner"
    assert index.num_chunks == 4 + 3 + 1 + 0 + 1 + 4  # ceil(5 / 4) = 2: three parts; a record of each rank


@pytest.mark.parametrize("shape", [(64, 2048), (7, 2048), (2048, 64), (1, 5)])
def test_hybrid_sharding_writes_each_part_once_and_balances_bytes(shape):
    world = World(8)
    for number in range(12):
        world.add(f"w{number}", shape, mesh_of(2, 4), [Replicate(), Shard(0)])
    _, loads = ensure_right(world)
    loads = [load - record_capacity(700) for load in loads]

    if math.prod(shape) * 4 // 4 >= 64 * 1024 and shape[0] % 4 == 0:
        assert max(loads) == min(loads)
    assert sum(loads) == 12 * math.prod(shape) * 4


def test_two_dimensional_sharding_is_regular_also_where_it_is_uneven():
    world = World(8)
    table = mesh_of(4, 2)
    world.add("rows.then.columns", (16, 6), table, [Shard(0), Shard(1)])
    world.add("rows.twice", (16, 6), table, [Shard(0), Shard(0)])
    world.add("rows.twice.uneven", (13, 6), table, [Shard(0), Shard(0)])
    world.add("columns.only", (3, 4), table, [Replicate(), Shard(1)])
    decision, _ = world.decide()
    ensure_right(world)

    assert decision.layout.listed == frozenset()
    assert decision.grids["rows.then.columns"].levels == ((4,), (2,))
    assert decision.grids["rows.twice.uneven"].levels == ((4, 2),)
    assert decision.grids["columns.only"].levels == ((), (2,))


def test_strided_shards_are_regular_with_the_later_axis_as_the_major_cut():
    from torch.distributed.tensor.placement_types import _StridedShard

    table, world = mesh_of(2, 4), World(8)
    # As torch lays it out: the tensor-parallel axis cuts first, FSDP cuts each of those parts.
    for rank in table.ranks:
        dp, tp = place_of(table, rank)
        at = (tp * 2 + dp) * 2
        boxes = [((at, 0), (2, 6))]
        row = TensorRow("w", "F32", (16, 6))
        placements = [_StridedShard(0, split_factor=4), Shard(0)]
        world.rows[rank].append(cut_row(row, table, placements, (dp, tp), tuple(boxes), world.meshes[rank]))
        world.boxes[rank].append(boxes)
    decision, num_classes = world.decide()
    ensure_right(world)

    assert (num_classes, decision.layout.listed) == (1, frozenset())
    assert decision.grids["w"].writers == (0, 4, 1, 5, 2, 6, 3, 7)


def test_tensor_parallelism_without_fsdp_has_a_mesh_a_group_and_one_writer_a_part():
    world = World(8)
    for group in range(4):
        world.add("w", (64, 4096), mesh_of(2, first=2 * group), [Shard(1)])
    world.add_plain("norm", (100_000,))
    decision, num_classes = world.decide()
    _, loads = ensure_right(world)

    assert num_classes == 4
    assert decision.layout.listed == frozenset()
    assert sum(loads) - 8 * record_capacity(700) == 64 * 4096 * 4 + 400_000


def test_pipeline_stages_hold_different_tensors_and_compare_what_they_share():
    world = World(4)
    for stage in range(2):
        for layer in range(3):
            world.add(f"layer.{3 * stage + layer}", (8, 8), mesh_of(2, first=2 * stage), [Shard(0)])
        world.add_plain(f"step.{stage}", (), ranks=[2 * stage, 2 * stage + 1], contents=lambda rank: "five")
    world.add_plain("shared.embedding", (9, 9), contents=lambda rank: "same")
    world.add_plain("mean", (3,), contents=lambda rank: f"own {rank}")
    decision, num_classes = world.decide()
    index, _ = ensure_right(world)

    assert num_classes == 2
    assert decision.layout.rank_tensors == {"mean"}
    assert [name for name in index.names() if name.endswith(".mean")] == [f"rank.{rank}.mean" for rank in range(4)]
    assert sorted(itertools.chain(*decision.layout.groups)) == ["shared.embedding", "step.0", "step.1"]


def test_boxes_that_no_grid_describes_are_listed_and_balanced():
    world = World(3)
    left, right = ((0, 0), (512, 100)), ((0, 100), (512, 412))
    world.add_boxes("w", (512, 512), {0: [left], 1: [right, left], 2: [right]})
    world.add_boxes("several", (4, 2), {0: [((0, 0), (1, 2)), ((3, 0), (1, 2))], 2: [((1, 0), (2, 2))]})
    decision, _ = world.decide()
    index, loads = ensure_right(world)

    assert decision.layout.listed == {"w", "several"}
    assert len([file for file in index.files if file.startswith("rank00000")]) == 2, "two chunks of a tensor, two files"
    assert max(loads) < 512 * 512 * 4, "the two halves have two writers"


def test_frozen_parameters_lie_in_files_of_their_own():
    world = World(4)
    world.add("base", (64, 8), mesh_of(4), [Shard(0)], is_frozen=True)
    world.add("tiny", (2, 8), mesh_of(4), [Shard(0)], is_frozen=True)
    world.add("lora", (64, 2), mesh_of(4), [Shard(0)])
    index, _ = ensure_right(world)
    holding = {name: {index.files[chunk.file] for chunk in index.chunks(name)} for name in ("base", "tiny", "lora")}

    assert all(file.endswith("-1.safetensors") for file in holding["base"] | holding["tiny"])
    assert not any("-1" in file for file in holding["lora"])


def test_a_rank_whose_frozen_pieces_are_all_empty_has_no_file_for_them():
    world = World(4)
    world.add("tiny", (2, 8), mesh_of(4), [Shard(0)], is_frozen=True)
    index, _ = ensure_right(world)

    assert [file for file in index.files if "-1" in file] == [f"rank0000{rank}-1.safetensors" for rank in range(2)]


@pytest.mark.parametrize("seed", range(25))
def test_any_mixture_is_written_exactly_once(seed):
    rng = random.Random(seed)
    size = rng.choice([1, 2, 3, 4, 6, 8])
    world = World(size)
    shapes = [s for s in itertools.product(range(1, 9), repeat=2) if math.prod(s) == size]
    for number in range(rng.randrange(1, 9)):
        shape = tuple(rng.randrange(0, 12) for _ in range(rng.randrange(1, 4)))
        kind = rng.randrange(4)
        if kind == 0:
            holders = sorted(rng.sample(range(size), rng.randrange(1, size + 1)))
            contents = rng.choice([None, lambda rank: "same", lambda rank: rank % 2])
            world.add_plain(
                f"t{number}", shape, ranks=holders, contents=contents, dtype=rng.choice(["F32", "BF16", "U8"])
            )
            continue
        table = mesh_of(*rng.choice(shapes))
        dims = [rng.choice([None, *range(len(shape))]) for _ in table.shape]
        placements = [Replicate() if dim is None else Shard(dim) for dim in dims]
        world.add(f"t{number}", shape, table, placements, is_frozen=rng.random() < 0.3)
    ensure_right(world)


def test_ranks_that_disagree_about_a_tensor_are_named():
    world = World(2)
    world.add_plain("w", (3,), ranks=[0])
    world.add_plain("w", (4,), ranks=[1])
    with pytest.raises(ConfigError, match=r"Tensor w: rank 0 has F32 \[3\], rank 1 has F32 \[4\]"):
        world.decide()


def test_what_travels_grows_with_tensors_plus_ranks_not_with_their_product():
    sizes = {}
    for size, tensors in ((8, 40), (64, 40), (8, 320)):
        world = World(size)
        for number in range(tensors):
            world.add(f"layers.{number}.weight", (1024, 8), mesh_of(size), [Shard(0)])
            world.add_plain(f"layers.{number}.step", (), contents=lambda rank: "one")
        decision, _ = world.decide()
        reports = [report_files(plan, frozenset()) for plan in world.plan()[1]]
        index = index_of(decision, reports, world.capacities(decision.layout))
        sizes[size, tensors] = (len(decision.layout.blob), len(encode_index(index)))

    assert sizes[64, 40][0] < sizes[8, 40][0] + 64
    assert sizes[64, 40][1] < sizes[8, 40][1] + 56 * 160
    assert sizes[8, 320][1] < 9 * sizes[8, 40][1]
