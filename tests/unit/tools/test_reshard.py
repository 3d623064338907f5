"""A checkpoint rewritten for another mesh: the same tensors and values, the layout and the streams of a run there."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from dckpt.catalog.catalog import Catalog
from dckpt.errors import CorruptCheckpointError, IncompatibleStateError, StorageFullError
from dckpt.format.grids import Grid, parts_of
from dckpt.format.streams import rekey_stream, stream_digest
from dckpt.format.values import dump_json, load_json
from dckpt.planning.mesh import NamedMesh
from dckpt.storage.local import LocalStorage
from dckpt.tools.reshard_run import ReshardRequest, show_reshard
from dckpt.tools.target import open_target
from tests.support.resharding import a_state, ensure_same, numbers, reshard, streams_of, write_run
from tests.support.runs import RUN_ID
from tests.support.sharded_runs import Saved, State, named, read_tensors, unnamed, write_state

PAIRS = [(1, 4), (2, 3), (4, 2), (8, 3), (3, 1), (2, 8), (1, 40)]


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_every_element_goes_over_once_and_is_cut_by_the_rule_of_torch_chunk(tmp_path, old, new):
    state = a_state(unnamed(old), ("rank",))
    write_run(tmp_path, state)
    result = reshard(tmp_path / "run", tmp_path / "new", unnamed(new))

    assert result is not None
    storage = LocalStorage(str(tmp_path / "new"))
    _, index = ensure_same(state, storage, result.checkpoint, unnamed(new))
    for name in ("model.w", "optim.w.exp_avg", "model.b", "model.narrow", "model.frozen"):
        grid = index.grid(name)
        assert isinstance(grid, Grid)
        assert parts_of(grid.levels) == ((new,) if new > 1 else ())
    for name in ("model.table", "model.flags", "optim.w.step"):
        assert len(index.chunks(name)) == 1
    assert all(index.files[chunk.file].endswith("-1.safetensors") for chunk in index.chunks("model.frozen"))


MESHES = [
    (named(dp=2, tp=2), named(dp=3, tp=2)),
    (named(dp=2, tp=2), named(dp=1, tp=2)),
    (named(dp=2, tp=2), named(dp=4)),
    (named(dp=4, tp=2), named(dp=2, tp=4)),
    (named(dp=2, tp=2), named(replicate=2, dp=2, tp=2)),
    (named(replicate=2, dp=2), named(replicate=1, dp=3)),
    (named(dp=2, tp=2), named(tp=2, dp=2)),
]


def a_state_of_two_axes(mesh: NamedMesh) -> State:
    other = "tp" if "tp" in mesh.sizes else "replicate"
    dp, tp = ("dp",), (other,)
    tensors = {
        "model.column": Saved(numbers((101, 37), 0), cuts=((tp, dp),)),
        "model.row": Saved(numbers((64, 129), 3), cuts=((dp,), (tp,))),
        "model.last": Saved(numbers((3, 5, 41), 3, "<f8"), "F64", cuts=((), (), (tp, dp))),
        "model.norm": Saved(numbers((50,), 8), cuts=((dp,),)),
        "model.whole": Saved(numbers((200, 100), 8)),
    }
    if other == "replicate":
        tensors = {name: tensors[name] for name in ("model.norm", "model.whole")}
    return State(mesh, tensors, streams=[streams_of(r) for r in range(mesh.world_size)], rng={"torch": ("dp",)})


@pytest.mark.parametrize(("old", "new"), MESHES)
def test_meshes_of_several_axes_keep_which_axis_cuts_which_dimension(tmp_path, old, new):
    state = a_state_of_two_axes(old)
    write_run(tmp_path, state)
    result = reshard(tmp_path / "run", tmp_path / "new", new)

    assert result is not None
    _, index = ensure_same(state, LocalStorage(str(tmp_path / "new")), result.checkpoint, new)
    for name, saved in state.tensors.items():
        levels = tuple(
            tuple(size for level in dimension if (size := new.sizes.get(level[0], 1)) > 1) for dimension in saved.cuts
        )
        while levels and not levels[-1]:
            levels = levels[:-1]
        grid = index.grid(name)
        assert grid is not None
        assert grid.levels == levels, name


def test_axes_that_were_flattened_into_one_stay_so(tmp_path):
    """Data and context parallelism under one FSDP: 10 rows are 4 pieces of 3, 3, 3, 1, not two of two."""
    cuts = ((("dp", "cp"),),)
    state = State(named(dp=2, cp=2), {"model.w": Saved(numbers((10, 3), 0), cuts=cuts)})
    write_run(tmp_path, state)
    result = reshard(tmp_path / "run", tmp_path / "new", named(dp=3, cp=2))

    assert result is not None
    _, index = ensure_same(state, LocalStorage(str(tmp_path / "new")), result.checkpoint, named(dp=3, cp=2))
    assert [chunk.sizes[0] for chunk in index.chunks("model.w")] == [2, 2, 2, 2, 2]


@pytest.mark.parametrize("seed", range(25))
def test_any_sharding_of_any_tensors_goes_over_to_any_mesh_of_the_same_axes(tmp_path, seed):
    rng = random.Random(seed)
    axes = ["a", "b", "c"][: rng.randint(1, 3)]
    old = named(**{axis: rng.randint(1, 4) for axis in axes})
    new = named(**{axis: rng.randint(1, 4) if old.sizes[axis] > 1 else 1 for axis in axes})
    if (old.world_size == 1) or (old.sizes == new.sizes):
        new = named(**{**new.sizes, "replicate": 2})
    tensors = {}
    for number in range(rng.randint(1, 12)):
        shape = tuple(rng.randint(1, 40) for _ in range(rng.randint(0, 4)))
        free = [axis for axis in axes if old.sizes[axis] > 1]
        rng.shuffle(free)
        cuts = tuple(tuple((free.pop(),) for _ in range(rng.randint(0, min(2, len(free))))) for _ in shape)
        kind, dtype = rng.choice([("F32", "<f4"), ("F64", "<f8"), ("BF16", "<u2"), ("U8", "u1")])
        tensors[f"model.{number}"] = Saved(numbers(shape, number, dtype), kind, cuts, is_frozen=rng.random() < 0.2)
    state = State(old, tensors, streams=[streams_of(rank) for rank in range(old.world_size)])
    write_run(tmp_path, state)
    result = reshard(tmp_path / "run", tmp_path / "new", new)

    assert result is not None
    ensure_same(state, LocalStorage(str(tmp_path / "new")), result.checkpoint, new)


@pytest.mark.parametrize(("old", "new"), [(2, 3), (1, 4), (3, 1)])
def test_streams_that_varied_are_derived_for_every_rank_and_shared_ones_copied(tmp_path, old, new):
    write_run(tmp_path, a_state(unnamed(old), ("rank",)), step=1200, generation=3)
    result = reshard(tmp_path / "run", tmp_path / "new", unnamed(new))

    assert result is not None
    manifest, _, found = read_tensors(LocalStorage(str(tmp_path / "new")), result.checkpoint)
    seed = 70
    for rank in range(new):
        streams = load_json(found[f"rank.{rank}.values.rng"].tobytes(), key="k", limit=2**20)
        for stream in ("python", "torch", "generator:shared"):
            derived = rekey_stream(
                stream, run_seed=seed, generation=3, step=1200, coordinates={"rank": rank}, like=streams_of(0)[stream]
            )
            is_shared = stream == "generator:shared" and old > 1
            assert streams[stream] == load_json(
                dump_json(streams_of(0)[stream] if is_shared else derived), key="k", limit=2**20
            )
    varied = ("rank",) if new > 1 else ()
    shared = varied if old == 1 else ()
    assert manifest.rng == {"python": varied, "torch": varied, "generator:shared": shared}


def test_on_a_mesh_streams_follow_the_axes_over_which_they_varied(tmp_path):
    state = a_state_of_two_axes(named(dp=2, tp=2))
    write_run(tmp_path, state)
    result = reshard(tmp_path / "run", tmp_path / "new", named(dp=3, tp=2))

    assert result is not None
    manifest, _, found = read_tensors(LocalStorage(str(tmp_path / "new")), result.checkpoint)
    digests = []
    for rank in range(6):
        streams = load_json(found[f"rank.{rank}.values.rng"].tobytes(), key="k", limit=2**20)
        assert set(streams) == {"torch"}, "what the manifest does not classify, no resume sets"
        digests.append(stream_digest(streams["torch"]))
    assert digests[0::2] == digests[1::2]
    assert len(set(digests)) == 3
    assert manifest.rng == {"torch": ("dp",)}
    assert manifest.coordinates == ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1))


def test_values_and_facts_go_over_and_the_manifest_says_where_it_comes_from(tmp_path):
    means = [np.full(6, rank, np.float32) for rank in range(2)]
    state = a_state(unnamed(2), ("rank",))
    state.tensors["model.mean"] = Saved(means[0], by_rank=means)
    state.values_by_rank["progress"] = [{"step": 10, "loss": 0.5}, {"step": 10, "loss": 0.7}]
    state.parts = ("model", "optim", "progress", "rng")
    storage = write_run(tmp_path, state)
    old, sha256 = Catalog(storage).read_manifest("step-0000000010.g0001")
    assert (old.rank_tensors, old.rank_values) == (("model.mean",), ("progress", "rng"))
    result = reshard(tmp_path / "run", tmp_path / "new", unnamed(3))

    assert result is not None
    manifest, _ = ensure_same(state, LocalStorage(str(tmp_path / "new")), result.checkpoint, unnamed(3))
    assert manifest.values == {**old.values, "progress": {"step": 10, "loss": 0.5}}
    assert (manifest.rank_tensors, manifest.rank_values) == ((), ("rng",))
    assert (manifest.step, manifest.parts, manifest.facts, manifest.metrics) == (10, old.parts, old.facts, old.metrics)
    assert manifest.writer["torch"] == "0.0"
    lineage = manifest.lineage
    assert lineage is not None
    assert (lineage.how, lineage.run_id, lineage.checkpoint) == ("reshard", RUN_ID, "step-0000000010.g0001")
    assert (lineage.manifest_sha256, lineage.world_size, lineage.carried) == (sha256, 2, ("model.mean",))
    assert result.plan is not None
    assert result.plan.carried == ("model.mean", "progress")


def test_what_has_no_meaning_on_another_mesh_is_refused_by_name_and_nothing_is_written(tmp_path):
    state = a_state(unnamed(2), ("rank",))
    state.tensors["extra.noise"] = Saved(
        np.zeros(2, np.float32), by_rank=[np.zeros(2, np.float32), np.ones(2, np.float32)]
    )
    state.values_by_rank["data"] = [{"at": 1}, {"at": 2}]
    state.parts = ("model", "optim", "data", "extra.noise", "rng")
    write_run(tmp_path, state)

    with pytest.raises(IncompatibleStateError) as caught:
        reshard(tmp_path / "run", tmp_path / "new", unnamed(3))

    assert [text.split(":")[0] for text in caught.value.differences] == ["data", "extra.noise"]
    assert not (tmp_path / "new").exists()


def test_several_obstacles_are_all_listed(tmp_path):
    state = a_state_of_two_axes(named(dp=2, tp=2))
    state.mesh = named(dp=4)  # the manifest names one axis, the tensors are cut along two
    storage = LocalStorage(str(tmp_path / "run"))
    state.tensors = {
        name: Saved(saved.array, saved.dtype, ((("dp",),),) if saved.cuts else ())
        for name, saved in state.tensors.items()
    }
    write_state(storage, state)

    with pytest.raises(IncompatibleStateError, match="axis tp: the checkpoint was saved on the mesh dp=4"):
        reshard(tmp_path / "run", tmp_path / "new", named(dp=2, tp=2))


def test_a_checkpoint_that_is_laid_out_so_already_is_left_alone(tmp_path):
    write_run(tmp_path, a_state(unnamed(2), ("rank",)))

    assert reshard(tmp_path / "run", tmp_path / "new", unnamed(2)) is None
    assert not (tmp_path / "new").exists()


# What goes wrong.


def damage(storage: LocalStorage, tensor: str) -> Path:
    """Flips a byte in the middle of a tensor's first chunk."""
    checkpoint = Catalog(storage).line()[0].name
    manifest, _ = Catalog(storage).read_manifest(checkpoint)
    index = Catalog(storage).read_index(checkpoint, manifest)
    chunk = index.chunks(tensor)[0]
    path = Path(storage.locate(f"{checkpoint}/{manifest.attempt}/{index.files[chunk.file]}"))
    data = bytearray(path.read_bytes())
    data[chunk.begin + index.meta(tensor).chunk_nbytes(chunk) // 2] ^= 4
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("tensor", ["model.w", "model.flags", "rank.0.values.rng"])
def test_a_flipped_byte_in_the_source_is_found_and_nothing_is_committed(tmp_path, tensor):
    storage = write_run(tmp_path, a_state(unnamed(2), ("rank",)))
    path = damage(storage, tensor)

    with pytest.raises(CorruptCheckpointError, match=path.name):
        reshard(tmp_path / "run", tmp_path / "new", unnamed(3))

    assert not [found for found in tmp_path.glob("new/*") if found.name != "generations"]
    assert not list((tmp_path / "new").glob("generations/*"))


def test_a_shard_file_that_is_missing_is_damage_of_the_source(tmp_path):
    storage = write_run(tmp_path, a_state(unnamed(2), ("rank",)))
    damage(storage, "model.w").unlink()

    with pytest.raises(CorruptCheckpointError, match="expected a file"):
        reshard(tmp_path / "run", tmp_path / "new", unnamed(3))


def test_a_disk_without_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    write_run(tmp_path, a_state(unnamed(2), ("rank",)))
    monkeypatch.setattr(LocalStorage, "free_bytes", lambda _: 2**20)

    with pytest.raises(StorageFullError, match="found 1,048,576"):
        reshard(tmp_path / "run", tmp_path / "new", unnamed(3))

    assert not (tmp_path / "new").exists()


def test_the_plan_alone_creates_nothing_and_says_what_will_be(tmp_path):
    state = a_state(unnamed(2), ("rank",))
    state.tensors |= {f"model.table.{number}": Saved(numbers((150, 150), number)) for number in range(8)}
    storage = write_run(tmp_path, state)
    plan = show_reshard(ReshardRequest(storage.url, str(tmp_path / "new"), 3))

    assert plan is not None
    assert not (tmp_path / "new").exists()
    result = reshard(tmp_path / "run", tmp_path / "new", unnamed(3))
    assert result is not None
    assert result.plan is not None
    manifest, _ = Catalog(LocalStorage(str(tmp_path / "new"))).read_manifest(result.checkpoint)
    shards = [entry for entry in manifest.files if entry.kind != "index"]
    assert plan.num_bytes == sum(entry.size for entry in shards)
    assert plan.num_files == len(manifest.shard_entries)
    assert (plan.num_tensors, plan.num_cut, plan.world_size) == (17, 5, 3)
    assert plan.rank_bytes_max < 1.3 * plan.rank_bytes_min, "balanced by bytes"
    assert plan.streams == {"generator:shared": "copied", "python": "re-derived", "torch": "re-derived"}
    assert open_target(str(tmp_path / "new")).is_run
