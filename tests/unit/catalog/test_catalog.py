"""Looking things up in real runs: steps, names, metrics, pins, manifests that lie about who they are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dckpt.catalog.catalog import Catalog
from dckpt.errors import CheckpointNotFoundError, ConfigError, CorruptCheckpointError, StorageMissingError
from dckpt.format.layout import CheckpointId
from dckpt.storage.local import LocalStorage
from tests.support.runs import training_tensors, write_checkpoint


@pytest.fixture(name="storage")
def _storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "run")


def write(storage: LocalStorage, step: int, generation: int = 1, **more: object):
    return write_checkpoint(storage, step, generation, training_tensors(size=4), **more)  # type: ignore[arg-type]


def test_a_run_that_was_never_made_is_empty(storage: LocalStorage):
    catalog = Catalog(storage)

    assert (catalog.checkpoints(), catalog.newest_generation(), catalog.line(), catalog.pins()) == ([], 0, [], set())
    with pytest.raises(CheckpointNotFoundError, match="none at all"):
        catalog.resolve("latest")


def test_only_directories_with_exactly_a_checkpoints_name_are_checkpoints(storage: LocalStorage):
    write(storage, 9)
    for name in ("step-9", "step-0000000010.g0001.bak", ".tmp-" + "a" * 32, "other"):
        storage.make_dirs(name)
    storage.create("step-0000000011.g0001", b"a file")

    assert Catalog(storage).checkpoints() == [CheckpointId(9, 0, 1)]


def test_latest_is_the_newest_of_the_line_after_walking_back(storage: LocalStorage):
    write(storage, 100)
    good = write(storage, 200)
    write(storage, 300)
    write(storage, 250, 2, parent=good)
    catalog = Catalog(storage)

    assert [item.step for item in catalog.line()] == [250, 200, 100]
    assert catalog.resolve("latest") == CheckpointId(250, 0, 2)
    assert catalog.superseded() == [CheckpointId(300, 0, 1)]


def test_a_superseded_step_needs_its_full_name(storage: LocalStorage):
    good = write(storage, 200)
    write(storage, 300)
    write(storage, 250, 2, parent=good)
    catalog = Catalog(storage)

    with pytest.raises(CheckpointNotFoundError, match=r"step-0000000300.g0001"):
        catalog.resolve(300)
    assert catalog.resolve("step-0000000300.g0001") == CheckpointId(300, 0, 1)


def test_a_step_means_the_retrained_one(storage: LocalStorage):
    good = write(storage, 200)
    write(storage, 300)
    write(storage, 300, 2, parent=good)

    assert Catalog(storage).resolve(300) == Catalog(storage).resolve("300") == CheckpointId(300, 0, 2)


def test_a_step_means_its_end_not_the_middle_of_the_next_accumulation(storage: LocalStorage):
    write(storage, 100)
    write(storage, 100, micro_step=3)
    write(storage, 200, micro_step=1)
    catalog = Catalog(storage)

    assert catalog.resolve(100) == CheckpointId(100, 0, 1)
    assert catalog.resolve(200) == CheckpointId(200, 1, 1)
    assert catalog.resolve("latest") == CheckpointId(200, 1, 1)


@pytest.mark.parametrize("which", [77, "step-0000000077.g0001", "best", "step-100"])
def test_what_is_not_there_is_an_error_that_lists_what_is(storage: LocalStorage, which: str | int):
    write(storage, 100)

    with pytest.raises(CheckpointNotFoundError, match=r"step-0000000100.g0001"):
        Catalog(storage).resolve(which)


def test_a_run_that_lost_its_generation_records_never_gives_a_number_out_twice(storage: LocalStorage):
    write(storage, 100)
    write(storage, 200, 2)
    storage.discard("generations/000001.json")
    storage.discard("generations/000002.json")
    catalog = Catalog(storage)

    assert catalog.newest_generation() == 2
    assert catalog.resolve("latest") == CheckpointId(200, 0, 2)
    assert catalog.trace().notes


def test_find_best_compares_finite_metrics_on_the_line_and_passes_over_damage(storage: LocalStorage):
    good = write(storage, 100, metrics={"loss": 0.5})
    write(storage, 200, metrics={"loss": 0.1})
    write(storage, 300, 2, parent=good, metrics={"loss": 0.5})
    write(storage, 400, 2, metrics={"loss": float("nan")})
    damaged = write(storage, 500, 2, metrics={"loss": 0.2})
    write(storage, 600, 2)
    flip(Path(storage.locate(f"{damaged.id.name}/manifest.json")))  # type: ignore[union-attr]
    catalog = Catalog(storage)

    assert catalog.find_best("loss") == CheckpointId(300, 0, 2)
    assert catalog.find_best("loss", "max") == CheckpointId(300, 0, 2)
    with pytest.raises(CheckpointNotFoundError, match="'accuracy'"):
        catalog.find_best("accuracy")


def flip(path: Path, offset: int = 40) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_a_manifest_with_a_flipped_bit_or_none_is_told_apart(storage: LocalStorage):
    name = write(storage, 100).id.name
    manifest = Path(storage.locate(f"{name}/manifest.json"))
    flip(manifest)
    with pytest.raises(CorruptCheckpointError, match=r"manifest.json"):
        Catalog(storage).read_manifest(name)

    manifest.unlink()
    with pytest.raises(StorageMissingError):
        Catalog(storage).read_manifest(name)
    assert Catalog(storage).checkpoints() == [CheckpointId(100, 0, 1)]


def test_a_renamed_checkpoint_is_found_out(storage: LocalStorage):
    name = write(storage, 100).id.name
    os.rename(storage.locate(name), storage.locate("step-0000000900.g0001"))

    with pytest.raises(CorruptCheckpointError, match="expected the manifest of step-0000000900"):
        Catalog(storage).read_manifest("step-0000000900.g0001")


def test_a_stand_alone_checkpoint_may_have_any_name(storage: LocalStorage):
    write_checkpoint(storage, 7, 0, training_tensors(size=4), name="final weights")

    manifest, digest = Catalog(storage).read_manifest("final weights")

    assert (manifest.id, len(digest)) == (None, 64)
    assert "model.weight" in Catalog(storage).read_index("final weights", manifest)


@pytest.mark.parametrize("damage", ["flip", "cut", "grow"])
def test_a_damaged_layout_index_is_found_out(storage: LocalStorage, damage: str):
    manifest = write(storage, 100)
    name = manifest.id.name
    place = Path(storage.locate(f"{name}/{manifest.index_entry.path}"))
    if damage == "flip":
        flip(place)
    else:
        data = place.read_bytes()
        place.write_bytes(data[:-1] if damage == "cut" else data + b"\0")

    with pytest.raises(CorruptCheckpointError) as caught:
        Catalog(storage).read_index(name, manifest)
    assert manifest.index_entry.path in caught.value.key


def test_pins_survive_doubling_and_removing_twice(storage: LocalStorage):
    name = write(storage, 100).id.name
    catalog = Catalog(storage)

    catalog.pin(name)
    catalog.pin(name)
    assert catalog.pins() == {name}
    catalog.unpin(name)
    catalog.unpin(name)
    assert catalog.pins() == set()


def test_only_a_checkpoint_that_is_there_can_be_pinned(storage: LocalStorage):
    write(storage, 100)

    with pytest.raises(CheckpointNotFoundError):
        Catalog(storage).pin("step-0000000200.g0001")
    with pytest.raises((CheckpointNotFoundError, ConfigError)):
        Catalog(storage).pin("../generations/x")


def test_listing_a_run_imports_neither_numpy_nor_torch():
    program = (
        "import sys; import dckpt.catalog.catalog, dckpt.catalog.prune, dckpt.catalog.transaction;import "
        "dckpt.catalog.retention, dckpt.storage.opening;print([name for name in ('numpy', 'torch', "
        "'xxhash', 'safetensors', 'fsspec') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)

    assert done.stdout.strip() == "[]"
