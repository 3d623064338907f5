"""Runs on an S3 server: resumed bit for bit, whole after a kill at any stage of a commit, nothing left after a sweep."""

from __future__ import annotations

import time
import uuid

import pytest

from dckpt.catalog.catalog import Catalog
from dckpt.catalog.prune import find_leftovers, sweep
from dckpt.storage.opening import open_storage
from tests.support.jobs import resume_and_digest, resume_and_train, train_and_save, train_save_die, train_straight
from tests.support.object_server import ObjectServer
from tests.support.ranks import RankPool
from tests.support.store_jobs import save_and_lose_rank_zero

pytestmark = pytest.mark.distributed


@pytest.fixture
def root(object_server: ObjectServer) -> str:
    return object_server.url(f"{uuid.uuid4().hex}/gpt")


@pytest.mark.parametrize(("kind", "world_size"), [("single", 1), ("fsdp", 2)])
def test_a_killed_run_continues_bit_identically(ranks: RankPool, root: str, kind: str, world_size: int):
    has_group = kind != "single"
    straight = ranks.run(train_straight, world_size, kind, 8, has_group=has_group)
    killed = ranks.run(train_save_die, world_size, root, kind, 4, 1, has_group=has_group, allow_loss=True)
    resumed = ranks.run(resume_and_train, world_size, root, kind, 4, has_group=has_group)

    assert all(result.exit_code == -9 for result in killed)
    for rank in range(world_size):
        assert resumed[rank][0] == straight[rank][0][4:]
        assert resumed[rank][1] == straight[rank][1]


def test_another_number_of_ranks_loads_the_same_values(ranks: RankPool, root: str):
    before = ranks.run(train_and_save, 2, root, "fsdp", 2)
    after, report = ranks.run(resume_and_digest, 1, root, "single", has_group=False)[0]

    own = ("rng:", "values:progress")
    assert report["step"] == 2
    assert {k: v for k, v in after.items() if not k.startswith(own)} == {
        k: v for k, v in before[0].items() if not k.startswith(own)
    }


@pytest.mark.parametrize(
    ("kind", "world_size", "point", "step"),
    [
        ("single", 1, "mid_shard_write", 1),
        ("single", 1, "after_manifest", 1),
        ("single", 1, "after_rename", 2),
        ("fsdp", 2, "before_rename", 1),
    ],
)
def test_the_latest_is_whole_after_a_kill_and_a_sweep_leaves_only_checkpoints(
    ranks: RankPool, root: str, kind: str, world_size: int, point: str, step: int
):
    has_group = kind != "single"
    lost = ranks.run(save_and_lose_rank_zero, world_size, root, kind, point, has_group=has_group, allow_loss=True)
    storage = open_storage(root)
    left = find_leftovers(storage, older_than_s=0, now_unix_s=time.time() + 60)
    found = [item.step for item in Catalog(storage).line()]
    sweep(storage, [item.name for item in left])

    assert lost[0].exit_code == -9
    assert found == list(range(step, 0, -1))
    assert [item.kind for item in left] == ["staging"]
    assert find_leftovers(storage, older_than_s=0, now_unix_s=time.time() + 60) == []
    results = ranks.run(resume_and_digest, world_size, root, kind, has_group=has_group)
    assert {report["step"] for _, report in results} == {step}
