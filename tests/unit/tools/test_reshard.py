"""A checkpoint rewritten for another mesh: the same tensors and values, the layout and the streams of a run there."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest

from dckpt.catalog.catalog import Catalog
from dckpt.catalog.generations import create_generation, read_generation
from dckpt.errors import (
    CommitConflictError,
    ConfigError,
    CorruptCheckpointError,
    IncompatibleStateError,
    StorageFullError,
)
from dckpt.format.generation import Generation
from dckpt.format.grids import Grid, parts_of
from dckpt.format.streams import encode_stream, python_record, rekey_stream, stream_digest, torch_cpu_state
from dckpt.format.values import dump_json, load_json
from dckpt.planning.mesh import NamedMesh
from dckpt.ranks.launched import launched_session
from dckpt.ranks.topology import Topology
from dckpt.storage.local import LocalStorage
from dckpt.tools import destination as destinations
from dckpt.tools.reshard_run import ReshardRequest, ReshardResult, ReshardRun, show_reshard
from dckpt.tools.target import open_target
from dckpt.tools.verify import verify_checkpoint
from tests.support.runs import RUN_ID, write_generation
from tests.support.sharded_runs import Saved, State, named, read_tensors, unnamed, write_state

OPTIM = {"is_mapping": False, "optimizers": {"": {"groups": [{"names": ["w", "b", "narrow"]}], "states": []}}}


def reshard(source: object, destination: object, mesh: NamedMesh) -> ReshardResult | None:
    """In this process, as `dckpt reshard` does it."""
    axes = dict(mesh.sizes) if mesh.is_named else None
    request = ReshardRequest(str(source), str(destination), None if axes else mesh.world_size, axes)
    topology = Topology(0, 1)
    with launched_session(topology, what="reshard", call="reshard", deadline_s=30) as session:
        return ReshardRun(request, session, topology).run()


def streams_of(rank: int) -> dict:
    words = np.random.RandomState(rank).get_state()[1]
    return {
        "python": encode_stream(python_record(random.Random(rank).getstate())),
        "torch": encode_stream({"kind": "torch", "device": "cpu", "state": torch_cpu_state(words, seed=70 + rank)}),
        "generator:shared": encode_stream({"kind": "numpy", "state": np.random.PCG64(5).state}),
    }


def numbers(shape: tuple[int, ...], start: int, dtype: str = "<f4") -> np.ndarray:
    return (np.arange(math.prod(shape)) + start).reshape(shape).astype(dtype)


def a_state(mesh: NamedMesh, level: tuple[str, ...], **changes) -> State:
    """Sharded over `level`, with whole, frozen, empty, narrow and odd tensors; 2 MiB, so that pieces and blocks have edges."""
    cut = (level,) if mesh.world_size > 1 else ()
    tensors = {
        "model.w": Saved(numbers((4001, 33), 0), cuts=(cut,)),
        "optim.w.exp_avg": Saved(numbers((4001, 33), 7), cuts=(cut,)),
        "optim.w.step": Saved(numbers((), 3)),
        "model.b": Saved(numbers((13,), 1, "<u2"), "BF16", cuts=(cut,)),
        "model.narrow": Saved(numbers((1, 5), 2, "<f8"), "F64", cuts=(cut,)),
        "model.frozen": Saved(numbers((10, 3), 9), cuts=(cut,), is_frozen=True),
        "model.table": Saved(numbers((300, 300), 4)),
        "model.flags": Saved(np.array([True, False, True]), "BOOL"),
        "model.nothing": Saved(np.zeros((0, 4), np.float32)),
    }
    fields = {
        "mesh": mesh,
        "tensors": tensors,
        "values": {"optim": OPTIM, "scheduler": {"last_epoch": 3}},
        "streams": [streams_of(rank) for rank in range(mesh.world_size)],
        "rng": {"python": tuple(mesh.sizes), "torch": tuple(mesh.sizes), "generator:shared": ()},
    }
    return State(**(fields | changes))


def write_run(path: Path, state: State, **options) -> LocalStorage:
    storage = LocalStorage(str(path / "run"))
    write_state(storage, state, **options)
    return storage


def ensure_same(state: State, storage: LocalStorage, checkpoint: str, mesh: NamedMesh, names=None):
    """Tensors and values of `state`, on the mesh asked for, each element in one file; returns (manifest, index)."""
    manifest, index, found = read_tensors(storage, checkpoint)
    plain = {name: array for name, array in found.items() if not name.startswith("rank.")}
    assert plain.keys() == set(state.tensors if names is None else names)
    for name, array in plain.items():
        expected = state.tensors[name].array
        assert array.dtype.itemsize == expected.dtype.itemsize
        assert array.tobytes() == expected.tobytes(), name
    assert (manifest.world_size, manifest.mesh) == (mesh.world_size, mesh.mesh)
    report = verify_checkpoint(storage, checkpoint, is_run=manifest.generation > 0)
    assert not report.damages, report.damages
    return manifest, index


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


# Where it goes.


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
