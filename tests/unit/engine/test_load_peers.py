"""How the ranks of a load find each other, and what each of them hears of the others."""

from __future__ import annotations

import json

import pytest
import torch

from dckpt.dcp.chunks import LocalChunk
from dckpt.engine.load_peers import LoadPeers, children_of
from dckpt.engine.wanted import Wanted, group_ranks, own_blobs, rank_classes
from dckpt.planning.structure import Meshes, MeshTable, Structure, TensorRow


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 8, 33, 4096])
def test_the_tree_reaches_every_rank_once_in_few_steps(world_size):
    depth = {0: 0}
    for rank in range(world_size):
        for child in children_of(rank, world_size):
            assert child not in depth
            depth[child] = depth[rank] + 1

    assert sorted(depth) == list(range(world_size))
    assert max(depth.values()) <= max(1, (world_size - 1).bit_length())


def test_ranks_are_introduced_only_if_all_of_them_listen():
    offers = [json.dumps([f"node{rank // 2}", ["10.0.0.1"], 4000 + rank, f"s{rank}"]).encode() for rank in range(4)]

    found = LoadPeers.introduce(offers)

    assert found is not None
    assert len(found["hosts"]) == 2, "ranks of one host share its names"
    assert found["ranks"][3] == [1, 4003, "s3"]
    assert LoadPeers.introduce([*offers[:3], b""]) is None
    assert LoadPeers.introduce(offers[:1]) is None


def wanted(name: str, mesh: int) -> Wanted:
    tensor = torch.zeros(2)
    row = TensorRow(name, "F32", (2,))
    return Wanted(Structure((row,)), Meshes((MeshTable((2,), (mesh, mesh + 1)),)), [[LocalChunk((0,), (2,), tensor)]])


def test_each_distinct_description_travels_once_and_all_ranks_see_the_same_classes():
    # Two structures on three meshes.
    ranks = [wanted("a", 0), wanted("a", 0), wanted("a", 2), wanted("b", 2), wanted("a", 0)]
    classes = group_ranks([one.keys for one in ranks])
    blobs = [own_blobs(one, classes, rank) for rank, one in enumerate(ranks)]
    merged = {key: text for found in blobs for key, text in found.items()}

    assert [len(found) for found in blobs] == [2, 0, 1, 1, 0]
    views = [rank_classes(one, classes, merged) for one in ranks]
    assert all(view == views[0] for view in views)
    assert [found.ranks for found in views[0]] == [(0, 1, 4), (2,), (3,)]
    assert rank_classes(ranks[0], classes[:1], {}) == views[0][:1], "alike ranks need to hear nothing"
