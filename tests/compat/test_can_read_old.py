"""Every golden checkpoint of every format version loads into exactly the values that were recorded beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dckpt.cli.main import main
from tests.support import golden

pytestmark = pytest.mark.distributed

VERSIONS = sorted(path.name for path in golden.DATA.iterdir())


@pytest.fixture(params=VERSIONS)
def version(request) -> Path:
    return golden.DATA / request.param


@pytest.fixture
def old(version, tmp_path) -> Path:
    """A copy: reading must not need to write, yet nothing shall ever touch the originals."""
    return Path(shutil.copytree(version, tmp_path / version.name))


def expected(version: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((version / golden.EXPECTED).read_text())
    return record


@pytest.mark.parametrize(
    ("record", "kind", "world_size"),
    [
        *(("single", "single", 1), ("fsdp", "fsdp", 2)),
        *(("fsdp on one rank", "single", 1), ("single on two ranks", "fsdp", 2)),
    ],
)
def test_an_old_run_resumes_with_its_values_and_its_random_streams(ranks, version, old, record, kind, world_size):
    root = old / record.split()[0]
    before = golden.content(root)
    found = ranks.run(golden.read_run, world_size, str(root), kind, has_group=kind != "single")
    assert found == expected(version)[record]
    assert golden.content(root) == before, "reading changes nothing"


def test_per_rank_records_of_an_old_run_differ_by_rank(version):
    first, second = expected(version)["fsdp"]
    assert first["tensors"]["flags"] != second["tensors"]["flags"]
    assert first["draws"] != second["draws"]
    assert first["tensors"]["embed.weight"] == second["tensors"]["embed.weight"]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_old_stand_alone_checkpoint_loads_through_dcp(ranks, version, old, world_size):
    found = ranks.run(golden.read_alone, world_size, str(old / "alone" / "step-7"))
    assert found == [expected(version)["alone"][0]] * world_size


@pytest.mark.parametrize("name", ["single", "fsdp", "alone/step-7"])
def test_an_old_checkpoint_verifies(old, name):
    told = CliRunner().invoke(main, ["verify", "--json", str(old / name)])
    report = json.loads(told.stdout)
    assert report["verdict"] in ("COMPLETE", "PARTIAL"), told.stdout
    assert not report["run_damages"]
    assert all(not checkpoint["damages"] for checkpoint in report["checkpoints"])


def test_this_dckpt_still_writes_the_same_bytes(ranks, tmp_path):
    """A change of the bytes is allowed where FORMAT.md allows it. Then say so there, and add goldens beside these."""
    record = golden.write_all(ranks, tmp_path)
    newest = golden.DATA / VERSIONS[-1]
    assert json.loads(json.dumps(record)) == expected(newest)
    old, new = golden.content(newest), golden.content(tmp_path)
    del old[golden.EXPECTED]
    assert set(new) == set(old)
    # Records in JSON name the time and the versions of torch and Python that wrote them.
    assert [name for name in old if old[name] != new[name] and not name.endswith(".json")] == []
