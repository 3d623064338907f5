"""Saved on N ranks, resharded for M, resumed there: bit for bit what resuming the original there gives, streams included."""

from __future__ import annotations

import math
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from dckpt.catalog.catalog import Catalog
from dckpt.cli.main import main
from dckpt.format.manifest import Manifest
from dckpt.storage.local import LocalStorage
from tests.contract.test_plain_safetensors import assembled, stock_load
from tests.support.jobs import train_and_save
from tests.support.reshard_jobs import (
    describe_layout,
    reshard_together,
    resume_and_draw,
    resume_train_and_save,
    run_on_mesh,
)
from tests.support.stock_reader import digest

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """(kind, ranks) -> the root of a run that they saved."""
    made = {}

    def get(kind: str, world_size: int) -> Path:
        if (kind, world_size) not in made:
            root = made[kind, world_size] = tmp_path_factory.mktemp("saved") / "run"
            ranks.run(train_and_save, world_size, str(root), kind, 3, has_group=kind != "single")
        return made[kind, world_size]

    return get


def reshard(source: Path, destination: Path, world_size: int) -> None:
    arguments = ["reshard", str(source), str(destination), "--world-size", str(world_size)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, (result.stdout, result.stderr)


def newest(root: Path) -> tuple[Path, Manifest]:
    """The attempt's directory of the newest checkpoint, and its manifest."""
    catalog = Catalog(LocalStorage(str(root)))
    name = catalog.line()[0].name
    manifest, _ = catalog.read_manifest(name)
    return root / name / manifest.attempt, manifest


CASES = [
    ("fsdp", 2, "fsdp", 3),
    ("fsdp", 2, "fsdp", 1),
    ("fsdp", 2, "single", 1),
    ("fsdp", 3, "fsdp", 2),
    ("single", 1, "fsdp", 4),
    ("ddp", 2, "ddp", 3),
]


@pytest.mark.parametrize(("kind", "old", "new_kind", "new"), CASES)
def test_resuming_what_was_resharded_is_resuming_the_original(ranks, saved, tmp_path, kind, old, new_kind, new):
    root = saved(kind, old)
    reshard(root, tmp_path / "new", new)
    has_group = new_kind != "single"

    direct = ranks.run(resume_and_draw, new, str(root), new_kind, has_group=has_group)
    through = ranks.run(resume_and_draw, new, str(tmp_path / "new"), new_kind, has_group=has_group)

    for (digests, drawn, _), (new_digests, new_drawn, _) in zip(direct, through, strict=True):
        assert {name for name in digests if name.startswith("rng:")} == {"rng:python", "rng:numpy", "rng:torch"}
        assert new_digests == digests
        assert new_drawn == drawn
    assert len({tuple(drawn) for _, drawn, _ in through}) == new, "every rank has streams of its own"
    findings = [found for _, _, found in through]
    assert all("world_size" not in found for found in findings), "it was saved for these ranks"
    carried = old > 1
    assert all(("rank_tensors" in found) == carried for found in findings), "rank 0's buffers are still said to be so"


@pytest.mark.parametrize(
    ("old", "new"),
    [({"dp": 2}, {"dp": 3}), ({"replicate": 2, "shard": 2}, {"replicate": 1, "shard": 3}), ({"dp": 1}, {"dp": 2})],
)
def test_on_a_named_mesh_too_with_streams_by_its_axes(ranks, tmp_path, old, new):
    ranks.run(run_on_mesh, math.prod(old.values()), str(tmp_path / "run"), old, True)
    mesh = ",".join(f"{axis}={size}" for axis, size in new.items())
    arguments = ["reshard", str(tmp_path / "run"), str(tmp_path / "new"), "--mesh", mesh]
    assert CliRunner().invoke(main, arguments).exit_code == 0

    world_size = math.prod(new.values())
    direct = ranks.run(run_on_mesh, world_size, str(tmp_path / "run"), new, False)
    through = ranks.run(run_on_mesh, world_size, str(tmp_path / "new"), new, False)

    assert through == direct
    manifest = newest(tmp_path / "new")[1]
    assert manifest.mesh is not None
    assert dict(zip(manifest.mesh.axes, manifest.mesh.shape, strict=True)) == new


@pytest.mark.parametrize(("old", "new"), [(2, 3), (1, 2)])
def test_its_files_are_laid_out_as_a_save_on_those_ranks_lays_them_out(saved, tmp_path, old, new):
    """So a resume there reads its own files, whole: nothing is resharded any more."""
    reshard(saved("fsdp" if old > 1 else "single", old), tmp_path / "new", new)
    expected, found = describe_layout(str(saved("fsdp", new))), describe_layout(str(tmp_path / "new"))

    # Buffers that differed by rank are records there, and one copy here.
    buffers = set(found) - set(expected)
    assert buffers == {"model.blocks.0.norm.mean", "model.blocks.1.norm.mean"}
    assert {name: found[name] for name in expected} == expected


def test_training_goes_on_from_it_in_its_own_run_and_in_a_new_one(ranks, saved, tmp_path):
    shutil.copytree(saved("fsdp", 2), tmp_path / "run")
    reshard(tmp_path / "run", tmp_path / "new", 3)
    reshard(tmp_path / "run", tmp_path / "run", 3)

    continued = [ranks.run(resume_train_and_save, 3, str(tmp_path / name), "fsdp") for name in ("new", "run")]

    assert continued[0][0][0] == continued[1][0][0], "the same losses"
    assert [result[0][1] for result in continued] == ["step-0000000005.g0002", "step-0000000005.g0003"]


def test_stock_readers_read_what_was_resharded(saved, tmp_path):
    reshard(saved("fsdp", 2), tmp_path / "new", 3)
    directory, _ = newest(tmp_path / "new")
    before, after = assembled(newest(saved("fsdp", 2))[0]), assembled(directory)

    plain = {name for name in after if not name.startswith("rank.")}
    assert plain == {name for name in before if not name.startswith("rank.")} | {
        "model.blocks.0.norm.mean", "model.blocks.1.norm.mean",
    }  # fmt: skip
    for name in plain:
        expected = before[name] if name in before else before[f"rank.0.{name}"]
        assert digest(after[name]) == digest(expected), name
    loaded = stock_load(directory, 2, tmp_path)
    assert {name: loaded[name] for name in plain} == {name: digest(after[name]) for name in plain}


# Many processes.


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def contents(root: Path) -> dict[str, tuple[int, str]]:
    """Shard and index files of the newest checkpoint by name: size and digest."""
    return {Path(entry.path).name: (entry.size, entry.digest) for entry in newest(root)[1].files}


def test_several_processes_write_what_one_writes(ranks, saved, tmp_path):
    root = saved("fsdp", 2)
    reshard(root, tmp_path / "one", 3)
    results = ranks.run(reshard_together, 2, free_port(), str(root), str(tmp_path / "two"), 3, None, has_group=False)

    assert results == [("done", "step-0000000003.g0001")] * 2
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    again = ranks.run(reshard_together, 2, free_port(), str(root), str(tmp_path / "x"), 2, None, has_group=False)
    assert again == [("done", "nothing")] * 2


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("point", ["mid_shard_write", "after_directory_sync"])
def test_a_process_that_fails_fails_all_with_one_error_and_nothing_is_committed(ranks, saved, tmp_path, point, at):
    results = ranks.run(
        reshard_together, 2, free_port(), str(saved("fsdp", 2)), str(tmp_path / "new"), 3, (point, at), has_group=False
    )

    assert results[0] == results[1]
    assert f"rank {at} failed in phase write: " in results[0][1] and "a medium error" in results[0][1]
    assert not list((tmp_path / "new").glob("*"))


def test_damage_that_one_process_meets_is_damage_to_all(ranks, saved, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(saved("fsdp", 2), root)
    path = newest(root)[0] / "rank00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-30_000:] = bytes(byte ^ 1 for byte in data[-30_000:])
    path.write_bytes(data)
    results = ranks.run(reshard_together, 2, free_port(), str(root), str(tmp_path / "new"), 4, None, has_group=False)

    assert results[0] == results[1]
    assert results[0][0] == "CorruptCheckpointError"
    assert path.name in results[0][1]
    assert not list((tmp_path / "new").glob("*"))


def test_a_destination_that_is_refused_is_refused_by_all(ranks, saved, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "notes.txt").write_text("mine")
    results = ranks.run(
        reshard_together, 2, free_port(), str(saved("fsdp", 2)), str(tmp_path / "new"), 3, None, has_group=False
    )

    assert results[0] == results[1]
    assert results[0][0] == "ConfigError"
    assert "notes.txt" in results[0][1]


@pytest.mark.crash
def test_a_process_that_dies_is_named_by_the_other_and_nothing_is_committed(ranks, saved, tmp_path):
    fault = ("kill:mid_shard_write", 1)
    arguments = (free_port(), str(saved("fsdp", 2)), str(tmp_path / "new"), 3, fault, 3.0)
    results = ranks.run(reshard_together, 2, *arguments, has_group=False, allow_loss=True)

    assert results[1].exit_code == -9
    assert results[0][0] in ("CoordinationTimeoutError", "PeerFailedError")
    assert "rank 1" in results[0][1]
    assert not list((tmp_path / "new").glob("*"))


def test_torchrun_shares_the_work_and_every_process_ends_with_its_exit_code(saved, tmp_path):
    command = [
        *(
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "dckpt.cli.main",
        ),
        *("reshard", str(saved("fsdp", 2)), str(tmp_path / "new"), "--world-size", "3"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Committed in") == 1
    reshard(saved("fsdp", 2), tmp_path / "one", 3)
    assert contents(tmp_path / "new") == contents(tmp_path / "one")
