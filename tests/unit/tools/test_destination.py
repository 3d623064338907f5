"""What DST of a reshard means: a run of its own, its source's run, a stand-alone checkpoint; everything else is refused."""

from __future__ import annotations

import numpy as np
import pytest

from dckpt.catalog.catalog import Catalog
from dckpt.catalog.generations import create_generation, read_generation
from dckpt.errors import CommitConflictError, ConfigError
from dckpt.format.generation import Generation
from dckpt.storage.local import LocalStorage
from dckpt.tools import destination as destinations
from dckpt.tools.reshard_run import ReshardRequest, show_reshard
from tests.support.resharding import a_state, ensure_same, numbers, reshard, write_run
from tests.support.runs import RUN_ID, write_generation
from tests.support.sharded_runs import Saved, State, unnamed, write_state


def test_a_new_run_begins_with_generation_one_and_no_parent(tmp_path):
    write_run(tmp_path, a_state(unnamed(2), ("rank",)), step=30, generation=4)
    (tmp_path / "new").mkdir()
    result = reshard(f"{tmp_path / 'run'}@30", tmp_path / "new", unnamed(3))

    assert result is not None
    storage = LocalStorage(str(tmp_path / "new"))
    record = read_generation(storage, 1)
    assert (record.reason, record.parent, record.world_size) == ("reshard", None, 3)
    assert record.run_id != RUN_ID
    assert [item.name for item in Catalog(storage).line()] == [result.checkpoint] == ["step-0000000030.g0001"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["generations", "step-0000000030.g0001"]


def test_in_its_own_run_it_is_a_new_generation_that_continues_from_the_source(tmp_path):
    state = a_state(unnamed(2), ("rank",))
    storage = write_run(tmp_path, state, step=10)
    write_state(storage, state, step=20)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    result = reshard(f"{tmp_path / 'run'}@10", f"{tmp_path}/./run", unnamed(3))

    assert result is not None
    assert result.plan is not None
    assert result.plan.superseded == ("step-0000000020.g0001",)
    record = read_generation(storage, 2)
    assert record.parent is not None
    assert (record.reason, record.parent.checkpoint, record.run_id) == ("reshard", "step-0000000010.g0001", RUN_ID)
    assert [item.name for item in Catalog(storage).line()] == ["step-0000000010.g0002", "step-0000000010.g0001"]
    assert all(path.read_bytes() == data for path, data in before.items())
    ensure_same(state, storage, result.checkpoint, unnamed(3))


def test_of_the_latest_nothing_is_superseded(tmp_path):
    state = a_state(unnamed(2), ("rank",))
    storage = write_run(tmp_path, state, step=10)
    write_state(storage, state, step=20)
    plan = show_reshard(ReshardRequest(storage.url, storage.url, 3))

    assert plan is not None
    assert (plan.superseded, plan.checkpoint, plan.is_new_run) == ((), "step-0000000020.g0002", False)


def test_a_stand_alone_checkpoint_stays_one(tmp_path):
    state = a_state(unnamed(2), ("rank",), streams=None, rng={})
    write_state(LocalStorage(str(tmp_path)), state, alone="old")
    result = reshard(tmp_path / "old", tmp_path / "new", unnamed(5))

    assert result is not None
    manifest, _ = ensure_same(state, LocalStorage(str(tmp_path)), "new", unnamed(5))
    assert (manifest.generation, manifest.run_id) == (0, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]
    with pytest.raises(CommitConflictError, match="expected a free name"):
        reshard(tmp_path / "old", tmp_path / "new", unnamed(5))
    with pytest.raises(ConfigError, match="a name of your own"):
        reshard(tmp_path / "old", tmp_path / "step-0000000010.g0001", unnamed(5))


def test_ranks_that_write_nothing_need_no_file(tmp_path):
    """Without random streams a rank may hold empty parts only; its chunks are listed then."""
    tensors = {
        "model.w": Saved(numbers((3, 2), 0), cuts=((("rank",),),)),
        "model.none": Saved(np.zeros((0, 3), np.float32)),
    }
    state = State(unnamed(3), tensors)
    write_state(LocalStorage(str(tmp_path)), state, alone="old")
    result = reshard(tmp_path / "old", tmp_path / "new", unnamed(8))

    assert result is not None
    _, index = ensure_same(state, LocalStorage(str(tmp_path)), "new", unnamed(8))
    assert len(index.files) == 3


@pytest.mark.parametrize("kind", ["run", "foreign", "checkpoint", "file", "part", "begun"])
def test_a_place_with_something_else_is_refused_and_left_as_it_is(tmp_path, kind):
    write_run(tmp_path, a_state(unnamed(2), ("rank",)))
    new = tmp_path / "new"
    if kind == "run":
        write_state(LocalStorage(str(new)), State(unnamed(1), {"model.w": Saved(numbers((3,), 0))}))
    elif kind == "foreign":
        new.mkdir()
        (new / "notes.txt").write_text("mine")
    elif kind == "checkpoint":
        write_state(LocalStorage(str(tmp_path)), State(unnamed(1), {"model.w": Saved(numbers((3,), 0))}), alone="new")
    elif kind == "file":
        new.write_text("mine")
    elif kind == "begun":
        write_generation(LocalStorage(str(new)), 1)
    else:
        new = tmp_path / "run" / "step-0000000099.g0009"
    before = sorted(str(path) for path in tmp_path.rglob("*"))

    with pytest.raises(ConfigError, match=str(new)):
        reshard(tmp_path / "run", new, unnamed(3))

    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_what_a_killed_reshard_left_behind_is_in_nobodys_way_and_goes(tmp_path):
    state = a_state(unnamed(2), ("rank",))
    write_run(tmp_path, state)
    storage = LocalStorage(str(tmp_path / "new"))
    storage.ensure_root()
    create_generation(storage, Generation(1, "half", None, "reshard", 3, 0.0, "n"), expected_newest=0)
    (tmp_path / "new" / f".tmp-{'a' * 32}").mkdir()
    result = reshard(tmp_path / "run", tmp_path / "new", unnamed(3))

    assert result is not None
    manifest, _ = ensure_same(state, storage, "step-0000000010.g0002", unnamed(3))
    assert manifest.run_id == "half"
    assert not list((tmp_path / "new").glob(".tmp-*"))


def test_a_job_that_commits_meanwhile_is_a_conflict_and_its_run_stays_as_it_is(tmp_path, monkeypatch):
    storage = write_run(tmp_path, a_state(unnamed(2), ("rank",)))
    choose = destinations._same_run

    def overtaken(*arguments):
        found = choose(*arguments)
        write_generation(storage, 2, reason="resume")
        return found

    monkeypatch.setattr(destinations, "_same_run", overtaken)
    with pytest.raises(CommitConflictError, match="generation 2"):
        reshard(tmp_path / "run", tmp_path / "run", unnamed(3))

    assert [item.name for item in Catalog(storage).checkpoints()] == ["step-0000000010.g0001"]
    assert not list((tmp_path / "run").glob(".tmp-*"))
