"""A reshard that is killed leaves its source untouched and no checkpoint where it was writing; the same command goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dckpt.catalog.catalog import Catalog
from dckpt.storage.local import LocalStorage
from tests.support.runs import training_tensors, write_checkpoint

pytestmark = pytest.mark.crash

KILLED = """
import os, signal, sys
from dckpt import failpoint
from dckpt.cli.main import main
failpoint.arm({sys.argv.pop(1): lambda: os.kill(os.getpid(), signal.SIGKILL)})
main()
"""


def content(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def reshard(point: str | None, source: Path, destination: Path) -> int:
    arguments = ["reshard", str(source), str(destination), "--world-size", "3"]
    command = ["-m", "dckpt.cli.main"] if point is None else ["-c", KILLED, point]
    return subprocess.run(
        [sys.executable, *command, *arguments], capture_output=True, timeout=60, check=False
    ).returncode


@pytest.mark.parametrize("place", ["new", "run"])
@pytest.mark.parametrize(
    "point",
    [
        "mid_shard_write",
        "after_shard_sync",
        "before_manifest",
        "before_generation",
        "after_generation",
        "before_rename",
    ],
)
def test_a_reshard_killed_before_its_commit_is_as_if_it_had_not_been(tmp_path: Path, point: str, place: str) -> None:
    source, destination = tmp_path / "run", tmp_path / place
    write_checkpoint(LocalStorage(str(source)), 10, 1, training_tensors())
    before = content(source)

    assert reshard(point, source, destination) == -9

    assert {path: data for path, data in content(source).items() if path in before} == before
    names = [item.name for item in Catalog(LocalStorage(str(destination))).checkpoints()]
    assert names == ([] if place == "new" else ["step-0000000010.g0001"])
    assert reshard(None, source, destination) == 0
    storage = LocalStorage(str(destination))
    latest = Catalog(storage).line()[0]
    assert Catalog(storage).read_manifest(latest.name)[0].world_size == 3
    assert not list(destination.glob(".tmp-*"))


def test_a_reshard_killed_after_its_commit_is_done(tmp_path: Path) -> None:
    source, destination = tmp_path / "run", tmp_path / "new"
    write_checkpoint(LocalStorage(str(source)), 10, 1, training_tensors())

    assert reshard("after_rename", source, destination) == -9

    catalog = Catalog(LocalStorage(str(destination)))
    assert catalog.read_manifest(catalog.line()[0].name)[0].world_size == 3
