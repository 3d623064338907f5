"""`ls` and `show` tell what a run and a checkpoint hold, damaged ones included."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest

from dckpt.catalog.catalog import Catalog
from dckpt.errors import CheckpointNotFoundError, CorruptCheckpointError
from dckpt.format.manifest import Mesh
from dckpt.format.sealed_json import seal_json
from dckpt.storage.local import LocalStorage
from dckpt.tools.inspect import CheckpointRow, list_run
from dckpt.tools.show import show_checkpoint, summarise
from dckpt.tools.target import open_run, open_target, split_step
from tests.support.runs import training_tensors, write_checkpoint

NOW = 1_700_000_060.0


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    """Generation 1: steps 10, 20, 30. Generation 2 continues from 20: step 25."""
    storage = LocalStorage(str(tmp_path / "run"))
    write_checkpoint(storage, 10, 1, training_tensors(), metrics={"loss": 3.0})
    second = write_checkpoint(storage, 20, 1, training_tensors(), metrics={"loss": math.inf})
    write_checkpoint(storage, 30, 1, training_tensors())
    write_checkpoint(storage, 25, 2, training_tensors(world_size=4), world_size=4, parent=second)
    return storage


def rows_of(storage: LocalStorage) -> dict[int, CheckpointRow]:
    return {row.step: row for row in list_run(storage, now_unix_s=NOW).checkpoints}


def test_a_listing_is_newest_first_and_places_each_checkpoint_in_the_history(storage: LocalStorage) -> None:
    Catalog(storage).pin("step-0000000010.g0001")

    listing = list_run(storage, now_unix_s=NOW)

    assert [(row.step, row.states) for row in listing.checkpoints] == [
        (30, ("superseded",)),
        (25, ("latest",)),
        (20, ("on the line",)),
        (10, ("on the line", "pinned")),
    ]
    assert [(row.number, row.reason, row.parent) for row in listing.line_generations] == [
        (2, "resume", "step-0000000020.g0001"),
        (1, "start", None),
    ]
    assert listing.notes == ()
    assert listing.leftovers == ()


def test_a_listing_has_sizes_world_sizes_and_metrics_with_infinities(storage: LocalStorage) -> None:
    rows = rows_of(storage)

    assert rows[25].world_size == 4
    assert rows[10].metrics == {"loss": 3.0}
    assert rows[20].metrics == {"loss": math.inf}
    directory = Path(storage.root) / "step-0000000010.g0001"
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert rows[10].size_bytes == sum(path.stat().st_size for path in files)


def test_a_damaged_manifest_is_a_row_that_says_so_and_hides_no_other(storage: LocalStorage) -> None:
    path = Path(storage.root) / "step-0000000020.g0001" / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"world_size":2', b'"world_size":3', 1))

    rows = rows_of(storage)

    assert rows[20].states == ("on the line", "damaged manifest")
    assert rows[20].size_bytes is None
    assert "manifest.json" in (rows[20].damage or "")
    assert rows[25].damage is None


def test_a_sealed_manifest_without_the_facts_of_a_listing_is_damaged_and_not_a_crash(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path / "run"))
    write_checkpoint(storage, 10, 1, training_tensors())
    path = tmp_path / "run" / "step-0000000010.g0001" / "manifest.json"
    for content in ({"dckpt": "manifest"}, {"created_unix_s": None, "files": 3}):
        path.write_bytes(seal_json(content))
        assert rows_of(storage)[10].states == ("latest", "damaged manifest")


def test_a_damaged_generation_is_told_and_the_checkpoints_are_still_listed(storage: LocalStorage) -> None:
    path = Path(storage.root) / "generations" / "000002.json"
    path.write_bytes(path.read_bytes()[:-5])

    listing = list_run(storage, now_unix_s=NOW)

    assert len(listing.checkpoints) == 4
    assert any("000002.json" in note or "generation 2" in note.lower() for note in listing.notes)


def test_leftovers_of_dead_attempts_are_listed_with_size_and_age(storage: LocalStorage) -> None:
    directory = Path(storage.root) / f".tmp-{'a' * 32}"
    directory.mkdir()
    (directory / "half").write_bytes(bytes(1000))
    for path in (directory / "half", directory):
        os.utime(path, (NOW - 7200, NOW - 7200))

    (leftover,) = list_run(storage, now_unix_s=NOW).leftovers

    assert (leftover.name, leftover.size_bytes, round(leftover.age_s)) == (directory.name, 1000, 7200)


def test_a_place_that_is_no_run_is_not_found_instead_of_listed_as_empty(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    for place in (tmp_path / "empty", tmp_path / "mistyped"):
        with pytest.raises(CheckpointNotFoundError, match=place.name):
            open_run(str(place))
        with pytest.raises(CheckpointNotFoundError, match=place.name):
            open_target(str(place))


def test_show_counts_tensors_and_bytes_of_each_component(storage: LocalStorage) -> None:
    details = show_checkpoint(open_target(f"{storage.root}@25"))

    components = {row.name: row for row in details.components}
    tensors = training_tensors(world_size=4)
    for name in ("model", "optim"):
        found = [array for tensor, array in tensors.items() if tensor.startswith(f"{name}.")]
        assert components[name].num_tensors == len(found)
        assert components[name].num_bytes == sum(array.nbytes for array in found)
        assert components[name].num_ranks == 0
    assert components["rng"].num_ranks == 4
    assert components["scheduler"].is_present
    assert details.world_size == 4
    assert details.states == ("latest",)
    assert [row.number for row in details.lineage] == [2, 1]
    assert ("scheduler.last_epoch", "10") in [(row.name, row.summary) for row in details.values]
    assert [(row.stream, row.axes) for row in details.rng] == [("python", ())]
    assert details.tensors is None


def test_show_lists_tensors_with_dtype_shape_chunks_and_files(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path / "run"))
    tensors = {"model.w": np.zeros((6, 2), np.float32), "model.none": np.zeros((0, 3), np.int64)}
    write_checkpoint(storage, 1, 1, tensors, world_size=3, mesh=Mesh(axes=("dp",), shape=(3,)))

    details = show_checkpoint(open_target(storage.root), with_tensors=True)

    assert details.mesh == {"dp": 3}
    assert details.tensors is not None
    rows = {row.name: (row.dtype, row.shape, row.num_chunks, row.files) for row in details.tensors}
    files = tuple(f"rank0000{rank}.safetensors" for rank in range(3))
    assert rows == {"model.w": ("F32", (6, 2), 3, files), "model.none": ("I64", (0, 3), 0, ())}


def test_show_takes_a_checkpoint_directory_of_a_run_and_a_stand_alone_one(storage: LocalStorage) -> None:
    inside = show_checkpoint(open_target(f"{storage.root}/step-0000000030.g0001/"))
    assert (inside.step, inside.states) == (30, ("superseded",))

    parent = LocalStorage(os.path.dirname(storage.root))
    write_checkpoint(parent, None, 0, {"w": np.ones(4, np.float32)}, name="my export@5", parts=(), values={})
    alone = show_checkpoint(open_target(f"{parent.root}/my export@5"))
    assert (alone.name, alone.step, alone.lineage) == ("my export@5", None, ())


def test_a_step_resolves_on_the_line_and_a_superseded_one_by_its_full_name(storage: LocalStorage) -> None:
    assert open_target(f"{storage.root}@latest").checkpoint == "step-0000000025.g0002"
    assert open_target(f"{storage.root}@20").checkpoint == "step-0000000020.g0001"
    with pytest.raises(CheckpointNotFoundError, match=r"step-0000000030\.g0001"):
        open_target(f"{storage.root}@30")
    assert open_target(f"{storage.root}@step-0000000030.g0001").checkpoint == "step-0000000030.g0001"


def test_an_at_sign_in_a_path_stays_there() -> None:
    assert split_step("runs/a@b") == ("runs/a@b", None)
    assert split_step("runs/a@b@12") == ("runs/a@b", "12")
    assert split_step("runs/gpt@latest") == ("runs/gpt", "latest")
    assert split_step("runs/user@host/gpt") == ("runs/user@host/gpt", None)


def test_show_of_a_damaged_index_is_refused_with_the_file(storage: LocalStorage) -> None:
    path = next(Path(storage.root).glob("step-0000000025.g0002/*.index"))
    path.write_bytes(b"x" + path.read_bytes()[1:])

    with pytest.raises(CorruptCheckpointError, match=path.name):
        show_checkpoint(open_target(storage.root))


@pytest.mark.parametrize(
    ("value", "summary"),
    [
        (3, "3"),
        ("text", "'text'"),
        ([1, 2], "[1, 2]"),
        ([[1]], "[1 items]"),
        ({"a": 1}, "{1 entries}"),
        ({"$t": "tuple", "v": [0.9, 0.95]}, "tuple [0.9, 0.95]"),
        ({"$t": "float", "v": "inf"}, "inf"),
        ({"$t": "bytes", "v": "AAAA"}, "bytes, 3 of them"),
        ({"$t": "tensor", "v": "model.w"}, "tensor model.w"),
        ({"$t": "ndarray", "dtype": "int64", "shape": [2], "v": ""}, "ndarray int64[2]"),
        ({"$t": "Counter", "v": [["a", 1]]}, "Counter 1 entries"),
    ],
)
def test_values_are_summarised_in_one_line(value: object, summary: str) -> None:
    assert summarise(value) == summary
