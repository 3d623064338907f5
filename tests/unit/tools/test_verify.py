"""`verify` finds every kind of damage and names the file, the bytes, the ranks and the tensors."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dckpt.errors import StorageError
from dckpt.format.checksum import BLOCK_BYTES
from dckpt.storage.local import LocalStorage
from dckpt.tools.target import open_target
from dckpt.tools.verify import Watch, verify_checkpoint
from dckpt.tools.verify_run import VerifyReport, verify_target
from tests.support.resealing import reseal_sums, with_one_more, without_fingerprints
from tests.support.runs import FULL_PARTS, training_tensors, write_checkpoint

STEP = "step-0000000010.g0001"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one complete checkpoint by two ranks; never changed."""
    root = tmp_path_factory.mktemp("pristine") / "run"
    write_checkpoint(LocalStorage(str(root)), 10, 1, training_tensors(), metrics={"loss": 1.5})
    return root


@pytest.fixture
def run(pristine: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "run"))


def verified(root: Path, **options: Any) -> VerifyReport:
    return verify_target(open_target(str(root)), **options)


def damaged_files(report: VerifyReport) -> set[str]:
    damages = [*report.run_damages, *(d for checkpoint in report.checkpoints for d in checkpoint.damages)]
    return {damage.file for damage in damages}


def files_of(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def shard(root: Path, rank: int = 0) -> Path:
    return next(root.glob(f"{STEP}/*/rank{rank:05d}.safetensors"))


def flip(path: Path, position: int, mask: int = 0x10) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= mask
    path.write_bytes(data)


def test_a_whole_checkpoint_is_complete_and_every_byte_of_it_was_read(run: Path) -> None:
    report = verified(run)

    assert report.verdict == "COMPLETE"
    (checkpoint,) = report.checkpoints
    assert checkpoint.damages == ()
    assert checkpoint.findings == ()
    assert [row.name for row in checkpoint.components] == [*FULL_PARTS]
    on_disk = sum(path.stat().st_size for path in files_of(run / STEP))
    assert checkpoint.bytes_read == on_disk


def test_each_flipped_byte_in_any_file_is_reported_with_the_file(run: Path) -> None:
    flips = 0
    for path in files_of(run):
        data = path.read_bytes()
        # Every byte of the small files; of the shard files the length, some of the header and of each tensor.
        stride = 1 if len(data) < 1024 else 13 if path.suffix != ".safetensors" else 211
        for position in {*range(0, len(data), stride), *range(8), len(data) - 1}:
            flip(path, position)
            report = verified(run)
            path.write_bytes(data)
            key = str(path.relative_to(run))
            assert report.verdict == "CORRUPT", (key, position)
            assert key in damaged_files(report), (key, position, damaged_files(report))
            flips += 1
    assert flips > 500
    assert verified(run).verdict == "COMPLETE", "the loop put every byte back"


@pytest.mark.parametrize("damage", ["truncate by one byte", "truncate to nothing", "delete", "add a byte"])
def test_a_file_of_another_length_is_reported_with_the_file(run: Path, damage: str) -> None:
    for path in files_of(run):
        data = path.read_bytes()
        if damage == "delete":
            path.unlink()
        else:
            path.write_bytes({"truncate by one byte": data[:-1], "add a byte": data + b"x"}.get(damage, b""))
        if path.name == "manifest.json" and damage == "delete":
            path.write_bytes(data)
            continue  # Without its manifest it is no checkpoint; the next test says what happens then.
        report = verified(run, is_all=True)
        path.write_bytes(data)
        assert report.verdict == "CORRUPT", path
        assert str(path.relative_to(run)) in damaged_files(report), (path, damaged_files(report))


def test_a_checkpoint_directory_without_its_manifest_is_reported(run: Path) -> None:
    (run / STEP / "manifest.json").unlink()

    report = verify_checkpoint(LocalStorage(str(run)), STEP, is_run=True)

    assert report.verdict == "CORRUPT"
    assert [(damage.file, damage.what) for damage in report.damages] == [(f"{STEP}/manifest.json", "missing")]


def test_a_missing_shard_file_names_the_rank_and_the_tensors_lost(run: Path) -> None:
    shard(run, 1).unlink()

    (damage,) = verified(run).checkpoints[0].damages

    assert damage.what == "missing"
    assert damage.ranks == (1,)
    assert "model.weight" in damage.tensors
    assert "rank.1.values.rng" in damage.tensors
    assert "rank.0.values.rng" not in damage.tensors


def test_a_cut_file_names_the_missing_bytes_and_their_tensors(tmp_path: Path) -> None:
    tensors = {
        "model.first": np.arange(40_000, dtype=np.int64),
        "model.second": np.arange(40_000, dtype=np.int32),
    }
    write_checkpoint(LocalStorage(str(tmp_path / "run")), 10, 1, tensors, world_size=1, parts=())
    path = shard(tmp_path / "run")
    size = path.stat().st_size
    os.truncate(path, size - BLOCK_BYTES)

    (damage,) = verified(tmp_path / "run").checkpoints[0].damages

    assert damage.end == size
    assert damage.begin is not None
    assert size - 2 * BLOCK_BYTES <= damage.begin <= size - BLOCK_BYTES
    assert damage.tensors == ("model.second",)
    assert "cut short" in damage.what


def test_damaged_blocks_are_named_by_bytes_and_tensors_and_all_of_them_are(tmp_path: Path) -> None:
    tensors = {f"model.{letter}": np.full(40_000, 7, np.int64) for letter in "abcd"}
    write_checkpoint(LocalStorage(str(tmp_path / "run")), 10, 1, tensors, world_size=1, parts=())
    path = shard(tmp_path / "run")
    begin_of = {name: 4096 + 320_000 * place for place, name in enumerate(sorted(tensors))}
    flip(path, begin_of["model.b"] + 160_000)
    flip(path, begin_of["model.d"] + 160_000)

    first, second = verified(tmp_path / "run").checkpoints[0].damages

    for damage, name in ((first, "model.b"), (second, "model.d")):
        assert damage.tensors == (name,)
        assert damage.begin is not None
        assert damage.end == damage.begin + BLOCK_BYTES
        assert damage.begin <= begin_of[name] + 160_000 < damage.end


def test_damage_in_several_files_is_listed_in_one_pass(run: Path) -> None:
    for path in (shard(run, 0), shard(run, 1)):
        flip(path, path.stat().st_size - 1)
    index = next(run.glob(f"{STEP}/*.index"))
    flip(index, 100)

    report = verified(run)

    expected = {str(path.relative_to(run)) for path in (shard(run, 0), shard(run, 1), index)}
    assert damaged_files(report) == expected
    by_file = {damage.file: damage for damage in report.checkpoints[0].damages}
    # The index is lost, so the shard file's own header names the tensors.
    assert "model.weight" in by_file[str(shard(run, 0).relative_to(run))].tensors


def test_shard_files_that_changed_places_are_reported(run: Path) -> None:
    first, second = shard(run, 0), shard(run, 1)
    data = first.read_bytes(), second.read_bytes()
    first.write_bytes(data[1])
    second.write_bytes(data[0])

    assert damaged_files(verified(run)) >= {str(path.relative_to(run)) for path in (first, second)}


def test_a_shard_file_whose_sums_are_lost_is_still_judged_by_its_digest(run: Path) -> None:
    shard(run).with_suffix(".sums").unlink()
    flip(shard(run), 5000)

    report = verified(run)

    assert damaged_files(report) == {
        str(shard(run).relative_to(run)),
        str(shard(run).with_suffix(".sums").relative_to(run)),
    }


@pytest.mark.parametrize("is_quick", [True, False])
def test_fingerprints_of_chunks_that_are_not_there_are_damage_and_missing_ones_are_not(
    run: Path, is_quick: bool
) -> None:
    reseal_sums(run / STEP, 0, without_fingerprints)
    assert verified(run, is_quick=is_quick).verdict == "COMPLETE"

    reseal_sums(run / STEP, 1, with_one_more)
    report = verified(run, is_quick=is_quick)
    assert damaged_files(report) == {str(shard(run, 1).with_suffix(".sums").relative_to(run))}


@pytest.mark.parametrize("place", ["shard", "sums", "index", "manifest"])
def test_a_symbolic_link_is_refused_although_its_target_is_good(run: Path, tmp_path: Path, place: str) -> None:
    path = {
        "shard": shard(run),
        "sums": shard(run).with_suffix(".sums"),
        "index": next(run.glob(f"{STEP}/*.index")),
        "manifest": run / STEP / "manifest.json",
    }[place]
    path.rename(tmp_path / path.name)
    path.symlink_to(tmp_path / path.name)

    report = verified(run)

    assert report.verdict == "CORRUPT"
    assert str(path.relative_to(run)) in damaged_files(report)


@pytest.mark.timeout(20)
def test_a_named_pipe_in_place_of_a_file_is_refused_and_nothing_hangs(run: Path) -> None:
    path = shard(run)
    path.unlink()
    os.mkfifo(path)

    assert str(path.relative_to(run)) in damaged_files(verified(run))


def test_a_stray_file_is_named_and_does_not_condemn_the_checkpoint(run: Path) -> None:
    (run / STEP / "notes.txt").write_text("mine")

    report = verified(run)

    assert report.verdict == "COMPLETE"
    (finding,) = report.checkpoints[0].findings
    assert finding.found == f"{STEP}/notes.txt"


def test_a_stray_safetensors_file_in_the_attempt_is_damage_for_stock_readers_would_load_it(run: Path) -> None:
    stray = shard(run).with_name("rank00009.safetensors")
    shutil.copy(shard(run), stray)

    assert damaged_files(verified(run)) == {str(stray.relative_to(run))}


def test_a_renamed_checkpoint_is_reported(run: Path) -> None:
    (run / STEP).rename(run / "step-0000000020.g0001")

    assert damaged_files(verified(run)) == {"step-0000000020.g0001/manifest.json"}


LOST = {
    "model": "no weights",
    "optim": "loss spike",
    "scheduler": "learning rate restarts",
    "progress": "counts restart at zero",
    "data": "samples are repeated",
    "rng": "dropout and shuffling differ",
}


@pytest.mark.parametrize("component", LOST)
def test_a_missing_component_is_partial_and_says_what_training_will_feel(tmp_path: Path, component: str) -> None:
    tensors = {name: array for name, array in training_tensors().items() if component not in name.removeprefix("rank.")}
    values = {name: {"some": 1} for name in ("optim", "scheduler", "progress", "data") if name != component}
    parts = [name for name in FULL_PARTS if name != component]
    write_checkpoint(LocalStorage(str(tmp_path / "run")), 10, 1, tensors, values=values, parts=parts)

    (checkpoint,) = verified(tmp_path / "run").checkpoints

    assert checkpoint.verdict == "PARTIAL"
    (missing,) = [row for row in checkpoint.components if not row.is_present]
    assert missing.name == component
    assert LOST[component] in missing.consequence
    (finding,) = checkpoint.findings
    assert LOST[component] in finding.message


def test_a_scaler_is_missed_only_in_float16_training(tmp_path: Path) -> None:
    for place, dtype in (("half", "float16"), ("brain", "bfloat16")):
        facts = {"precision": {"autocast": dtype}}
        write_checkpoint(LocalStorage(str(tmp_path / place)), 10, 1, training_tensors(), facts=facts)

    assert verified(tmp_path / "half").verdict == "PARTIAL"
    assert "scaler" in verified(tmp_path / "half").checkpoints[0].findings[0].message
    assert verified(tmp_path / "brain").verdict == "COMPLETE"


@pytest.mark.parametrize(("parts", "planner_data"), [((), None), (("net",), {"net.w": ["net", "w"]})])
def test_a_checkpoint_of_plain_dcp_save_lacks_nothing_and_says_that_this_was_not_checked(
    tmp_path: Path, parts: tuple[str, ...], planner_data: object
) -> None:
    tensors = {"net.w": np.zeros(8, np.float32)}
    storage = LocalStorage(str(tmp_path))
    write_checkpoint(storage, None, 0, tensors, name="x", parts=parts, values={}, planner_data=planner_data)

    report = verified(tmp_path / "x")

    assert report.verdict == "COMPLETE"
    assert [finding.severity for finding in report.checkpoints[0].findings] == ["not checked"]


def test_random_streams_of_a_rank_that_the_index_lacks_are_reported(tmp_path: Path) -> None:
    tensors = training_tensors()
    del tensors["rank.1.values.rng"]
    write_checkpoint(LocalStorage(str(tmp_path / "run")), 10, 1, tensors)

    (damage,) = verified(tmp_path / "run").checkpoints[0].damages

    assert "random streams of rank 1" in damage.what


def test_quick_reads_no_tensor_data_and_still_finds_sizes_and_headers(run: Path) -> None:
    flip(shard(run), 20)
    assert damaged_files(verified(run, is_quick=True)) == {str(shard(run).relative_to(run))}
    flip(shard(run), 20)
    os.truncate(shard(run, 1), shard(run, 1).stat().st_size - 1)
    assert damaged_files(verified(run, is_quick=True)) == {str(shard(run, 1).relative_to(run))}


def test_quick_says_nothing_of_data_that_it_did_not_read(tmp_path: Path) -> None:
    tensors = {"model.weight": np.zeros(100_000, np.float32)}
    write_checkpoint(LocalStorage(str(tmp_path / "run")), 10, 1, tensors, world_size=1, parts=())
    flip(shard(tmp_path / "run"), 300_000)

    assert verified(tmp_path / "run", is_quick=True).verdict == "COMPLETE"
    assert verified(tmp_path / "run").verdict == "CORRUPT"


def test_without_a_step_the_latest_is_verified_and_with_all_every_one(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path / "run"))
    first = write_checkpoint(storage, 10, 1, training_tensors())
    write_checkpoint(storage, 20, 1, training_tensors())
    write_checkpoint(storage, 15, 2, training_tensors(), parent=first)

    assert [c.checkpoint for c in verified(tmp_path / "run").checkpoints] == ["step-0000000015.g0002"]
    report = verified(tmp_path / "run", is_all=True)
    assert {c.checkpoint for c in report.checkpoints} == {
        *("step-0000000020.g0001", "step-0000000015.g0002", "step-0000000010.g0001"),
    }
    superseded = verify_target(open_target(f"{tmp_path / 'run'}@step-0000000020.g0001"))
    assert [c.checkpoint for c in superseded.checkpoints] == ["step-0000000020.g0001"]


def test_a_generation_that_descends_from_another_checkpoint_than_stands_there_is_reported(
    tmp_path: Path,
) -> None:
    storage = LocalStorage(str(tmp_path / "run"))
    first = write_checkpoint(storage, 10, 1, training_tensors())
    write_checkpoint(storage, 20, 2, training_tensors(), parent=first)
    shutil.rmtree(tmp_path / "run" / "step-0000000010.g0001")
    assert verified(tmp_path / "run").verdict == "COMPLETE", "an expired parent is no damage"
    other = LocalStorage(str(tmp_path / "other"))
    write_checkpoint(other, 10, 1, training_tensors(seed=1))
    shutil.copytree(tmp_path / "other" / "step-0000000010.g0001", tmp_path / "run" / "step-0000000010.g0001")

    report = verified(tmp_path / "run")

    assert damaged_files(report) == {"generations/000002.json"}


class _FlakyReader:
    """The reader it wraps, with one bit flipped in what it reads."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.size = inner.size

    def read_into(self, offset: int, target: memoryview) -> None:
        self.inner.read_into(offset, target)
        target[-1] ^= 1

    def close(self) -> None:
        self.inner.close()

    def __enter__(self) -> _FlakyReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Storage(LocalStorage):
    """A real storage whose readers of shard files go through `wrap`."""

    def __init__(self, root: str, wrap: Callable[[Any, bool], Any]) -> None:
        super().__init__(root)
        self.wrap = wrap

    def open_reader(self, key: str, *, uncached: bool = False) -> Any:
        reader = super().open_reader(key, uncached=uncached)
        return self.wrap(reader, uncached) if key.endswith(".safetensors") else reader


def test_a_first_read_that_lies_is_a_warning_and_not_corruption(run: Path) -> None:
    fired = []

    def wrap(reader: Any, uncached: bool) -> Any:
        if uncached:
            return reader
        fired.append(1)
        return _FlakyReader(reader)

    report = verify_checkpoint(_Storage(str(run), wrap), STEP, is_run=True)

    assert fired
    assert report.verdict == "COMPLETE"
    assert {finding.check for finding in report.findings} == {"stable reads"}


def test_a_storage_that_fails_is_unreadable_and_not_corrupt(run: Path) -> None:
    fired = []

    class Failing(_FlakyReader):
        def read_into(self, offset: int, target: memoryview) -> None:
            fired.append(1)
            raise StorageError("read: Input/output error", code=errno.EIO)

    report = verify_checkpoint(_Storage(str(run), lambda reader, _: Failing(reader)), STEP, is_run=True)

    assert fired
    assert report.verdict == "UNREADABLE"
    assert len(report.damages) == 2
    assert all(damage.is_unreadable for damage in report.damages)


def test_the_watch_sees_every_shard_byte(run: Path) -> None:
    begun: list[tuple[str, int]] = []
    read: list[int] = []

    verified(run, watch=Watch(lambda name, total: begun.append((name, total)), read.append))

    ((name, total),) = begun
    assert name == STEP
    assert sum(read) == total == shard(run, 0).stat().st_size + shard(run, 1).stat().st_size
