"""How a saved checkpoint is cut, in the axes of its mesh; and which meshes it can be laid out for."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dckpt.errors import ConfigError
from dckpt.format.grids import Grid
from dckpt.format.index import Chunk, build_index
from dckpt.format.layout import shard_file_name
from dckpt.format.manifest import FileEntry, Manifest
from dckpt.planning.cuts import SavedCuts, cuts_for, parameters_of, separate_tensors, unknown_axes
from dckpt.planning.mesh import choose_mesh, is_replicating
from tests.support.sharded_runs import named, unnamed

ATTEMPT = "a" * 32


def a_checkpoint(mesh, tensors, *, parts=1, values=None):
    """Manifest and index over files `rank r, part p`, numbered rank by rank; `tensors`: name -> shape, grid or chunks."""
    names = [shard_file_name(rank, part) for rank in range(mesh.world_size) for part in range(parts)]
    entries = tuple(
        FileEntry(f"{ATTEMPT}/{name}", 0, "0" * 32, "shard", number // parts) for number, name in enumerate(names)
    )
    places = tuple(tuple(mesh.coordinates(rank).values()) for rank in range(mesh.world_size))
    manifest = Manifest(
        "r", 1, 0, 1, ATTEMPT, 0.0, mesh.world_size, mesh.mesh, places if mesh.is_named else None,
        values=values or {}, files=entries,
    )  # fmt: skip
    listed = any(not isinstance(given, Grid) for _, given in tensors.values())
    rows = {name: ("F32", shape, given) for name, (shape, given) in tensors.items()}
    index = build_index(names, rows, data_begins=None if listed else [4096] * len(names))
    return manifest, index


def cuts_of(mesh, shape, given, *, is_told=False):
    manifest, index = a_checkpoint(mesh, {"model.w": (shape, given)})
    return SavedCuts(manifest, index, is_told=is_told).of("model.w")


def test_sharding_over_all_ranks_without_a_mesh_is_over_the_axis_rank():
    assert cuts_of(unnamed(4), (9, 2), Grid(((4,),), (0, 1, 2, 3))) == ((("rank",),),)
    assert cuts_of(unnamed(4), (9, 8), Grid(((), (4,)), (0, 1, 2, 3))) == ((), (("rank",),))
    assert cuts_of(unnamed(4), (9, 2), Grid((), (2,))) == ()


def test_replicas_without_a_mesh_need_a_mesh_that_says_which_axis_cuts():
    found = cuts_of(unnamed(4), (8,), Grid(((2,),), (0, 1)))
    assert isinstance(found, str) and "--mesh replicate=2,shard=4" in found
    assert cuts_of(unnamed(4), (8,), Grid(((2,),), (0, 1)), is_told=True) == ((("rank",),),)
    assert isinstance(cuts_of(unnamed(4), (8, 8), Grid(((2,), (2,)), (0, 1, 2, 3)), is_told=True), str)


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        (Grid(((2,),), (0, 2)), ((("dp",),),)),
        (Grid(((2,),), (1, 3)), ((("dp",),),)),  # the other replica wrote
        (Grid(((2,),), (0, 1)), ((("tp",),),)),
        (Grid(((), (2,)), (0, 1)), ((), (("tp",),))),
        (Grid(((2,), (2,)), (0, 1, 2, 3)), ((("dp",),), (("tp",),))),
        (Grid(((2,), (2,)), (0, 2, 1, 3)), ((("tp",),), (("dp",),))),
        (Grid(((2, 2),), (0, 2, 1, 3)), ((("tp",), ("dp",)),)),  # FSDP over tensor parallelism: the strided shard
        (Grid(((4,),), (0, 1, 2, 3)), ((("dp", "tp"),),)),  # one axis flattened from two
        (Grid((), (3,)), ()),
    ],
)
def test_the_axes_of_a_mesh_are_found_from_who_wrote_which_part(grid, expected):
    assert cuts_of(named(dp=2, tp=2), (8, 8), grid) == expected


def test_parts_along_no_axis_are_said_to_be_so():
    found = cuts_of(named(dp=2, tp=2), (8,), Grid(((2,),), (0, 3)))
    assert isinstance(found, str) and "dp=2,tp=2" in found


def test_unequal_chunks_one_a_rank_are_sharding_along_their_dimension():
    chunks = [Chunk((0, 0), (5, 2), 0, 0), Chunk((5, 0), (1, 2), 1, 0), Chunk((6, 0), (2, 2), 2, 0)]
    assert cuts_of(unnamed(3), (8, 2), chunks) == ((("rank",),),)
    assert cuts_of(named(dp=3), (8, 2), chunks) == ((("dp",),),)
    assert cuts_of(unnamed(3), (8, 2), [Chunk((0, 0), (8, 2), 1, 0)]) == ()
    backwards = [Chunk((0, 0), (5, 2), 1, 0), Chunk((5, 0), (3, 2), 0, 0)]
    assert isinstance(cuts_of(unnamed(3), (8, 2), backwards), str)
    assert isinstance(cuts_of(named(dp=3, tp=2), (8, 2), chunks), str)


def test_tensors_in_further_files_of_their_own_are_those_that_do_not_change():
    tensors = {
        "model.frozen": ((4,), Grid(((2,),), (1, 3))),
        "model.narrow": ((1,), Grid(((2,),), (1, 2))),  # its empty part may stand for any file
        "model.trained": ((4,), Grid(((2,),), (0, 2))),
    }
    _, index = a_checkpoint(unnamed(2), tensors, parts=2)
    assert separate_tensors(index) == {"model.frozen", "model.narrow"}
    chunks = {"model.twice": ((4,), [Chunk((0,), (2,), 0, 0), Chunk((2,), (2,), 1, 0)])}
    _, index = a_checkpoint(unnamed(2), chunks, parts=2)
    assert separate_tensors(index) == set()


def whole(*shape):
    return shape, Grid((), (0,))


def optim(*names, key=""):
    return {"optim": {"is_mapping": bool(key), "optimizers": {key: {"groups": [{"names": list(names)}]}}}}


def test_parameters_of_one_rank_are_those_of_the_optimizer_with_what_has_their_shape():
    tensors = {
        "model.w": whole(4, 2),
        "model.b": whole(3),
        "model.frozen": whole(5),
        "model.mean": whole(3),
        "model.count": whole(),
        "optim.w.exp_avg": whole(4, 2),
        "optim.w.step": whole(),
        "optim.w.row": whole(4),
        "optim.b.inner.exp_avg": whole(3),
        "optim.param_groups.0.lr": whole(),
        "ema.w": whole(4, 2),
        "ema.b": whole(7),
        "extra.w": whole(4, 2),
    }
    manifest, index = a_checkpoint(unnamed(1), tensors, values=optim("w", "b"))
    found = set(parameters_of(manifest, index, frozenset({"model.frozen"})))
    assert found == {"model.w", "model.b", "model.frozen", "optim.w.exp_avg", "optim.b.inner.exp_avg", "ema.w"}

    manifest, index = a_checkpoint(unnamed(1), tensors)
    found = set(parameters_of(manifest, index, frozenset()))
    assert found == {"model.w", "model.b", "model.frozen", "model.mean", "ema.w"}


def test_optimizers_by_key_have_their_key_in_the_names():
    tensors = {"model.a.w": whole(4), "optim.gen.a.w.exp_avg": whole(4), "optim.a.w.exp_avg": whole(4)}
    manifest, index = a_checkpoint(unnamed(1), tensors, values=optim("a.w", key="gen"))

    assert set(parameters_of(manifest, index, frozenset())) == {"model.a.w", "optim.gen.a.w.exp_avg"}


@pytest.mark.parametrize(
    "value", [None, [], {"optimizers": 3}, {"optimizers": {"": {"groups": [3, {"names": [7]}, {}]}}}]
)
def test_odd_values_of_an_optimizer_name_no_parameters(value):
    manifest, index = a_checkpoint(unnamed(1), {"model.w": whole(4)}, values={"optim": value})

    assert set(parameters_of(manifest, index, frozenset())) <= {"model.w"}


def test_the_mesh_is_the_saved_one_with_its_one_axis_made_longer():
    assert choose_mesh(unnamed(2), 3, None) == unnamed(3)
    assert choose_mesh(named(dp=2), 3, None) == named(dp=3)
    assert choose_mesh(named(dp=2, tp=1), 8, None) == named(dp=8, tp=1)
    assert choose_mesh(named(dp=1), 4, None) == named(dp=4)
    assert choose_mesh(named(dp=2, tp=2), 4, None) == named(dp=2, tp=2)
    assert choose_mesh(named(dp=2, tp=2), 8, {"dp": 4, "tp": 2}) == named(dp=4, tp=2)
    assert choose_mesh(named(dp=2, tp=2), None, {"dp": 1, "tp": 2}) == named(dp=1, tp=2)


@pytest.mark.parametrize(
    ("saved", "world_size", "axes", "message"),
    [
        (named(dp=2, tp=2), 8, None, r"--mesh dp=\.\.\.,tp=\.\.\."),
        (named(dp=1, tp=1), 8, None, r"--mesh dp=\.\.\.,tp=\.\.\."),
        (unnamed(2), 8, {"dp": 4}, "expected 8 ranks as --world-size says, found 4"),
        (unnamed(2), None, None, "found neither"),
        (unnamed(2), None, {"dp": 10**4, "tp": 10**4}, "1 to 1000000 ranks"),
    ],
)
def test_a_mesh_that_is_not_clear_is_asked_for(saved, world_size, axes, message):
    with pytest.raises(ConfigError, match=message):
        choose_mesh(saved, world_size, axes)


def test_an_axis_that_the_checkpoint_does_not_know_is_refused_unless_it_replicates():
    assert unknown_axes(named(dp=4), named(dp=2, tp=2))[0].startswith("axis tp: ")
    assert unknown_axes(named(dp=4, tp=1), named(dp=2, tp=2))[0].startswith("axis tp: ")
    assert not unknown_axes(named(dp=4), named(dp=2, dp_replicate=2))
    assert not unknown_axes(named(dp=2, tp=2), named(dp=4, tp=1))
    assert not unknown_axes(named(dp=2, tp=2), named(dp=4))
    assert not unknown_axes(unnamed(4), named(replicate=2, shard=4))
    assert not unknown_axes(named(dp=1, tp=1), named(dp=4, tp=1))
    assert unknown_axes(unnamed(4), named(dp=2, tp=2))[0].startswith("axes dp, tp: ")
    assert [is_replicating(axis) for axis in ("replicate", "dp_replicate", "HSDP_Replica", "dp", "rank")] == [
        True, True, True, False, False,
    ]  # fmt: skip


def test_cuts_without_names_become_those_of_the_axis_that_cuts():
    saved = ((("rank",),), ())
    assert cuts_for(saved, unnamed(4), unnamed(2)) == saved
    assert cuts_for(saved, unnamed(4), named(replicate=2, shard=3)) == ((("shard",),), ())
    assert cuts_for(((("dp",),),), named(dp=4), named(dp=2)) == ((("dp",),),)


def test_a_mesh_as_a_table_puts_the_cutting_axes_first_and_flattens_what_cuts_together():
    mesh = named(dp=2, cp=3, tp=2)
    table = mesh.table((("tp",), ("dp", "cp")))
    places = np.array(table.ranks).reshape(table.shape)
    assert table.shape == (2, 6)
    for dp, cp, tp in itertools.product(range(2), range(3), range(2)):
        assert places[tp, dp * 3 + cp] == dp * 6 + cp * 2 + tp
        assert mesh.coordinates(dp * 6 + cp * 2 + tp) == {"dp": dp, "cp": cp, "tp": tp}
    assert mesh.table((("gone",),)).shape == (1, 2, 3, 2)
