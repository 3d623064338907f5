"""A run resumes from its repaired checkpoint as from the one that was damaged, and trains and saves on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from dckpt.catalog.catalog import Catalog
from dckpt.cli.main import main
from dckpt.storage.local import LocalStorage
from tests.support.repair_jobs import resume_train_save, train_and_save_twice

STEP = "step-0000000006.g0001"
WIDE = 192
"""A model whose tensors are larger than a block."""


def repair(root: Path, *options: str) -> str:
    result = CliRunner().invoke(main, ["repair", f"{root}@{STEP}", "--yes", *options])
    # The state of these tests has no data part: PARTIAL, before and after.
    assert result.exit_code == 1 and "is committed" in result.output, result.output
    report = json.loads(CliRunner().invoke(main, ["verify", str(root), "--json"]).output)
    assert report["verdict"] == "PARTIAL" and not report["checkpoints"][0]["damages"]
    return result.output


def shard(root: Path, rank: int) -> Path:
    return next(root.glob(f"{STEP}/*/rank{rank:05d}.safetensors"))


def where(root: Path, tensor: str, rank: int) -> tuple[int, int]:
    catalog = Catalog(LocalStorage(str(root)))
    index = catalog.read_index(STEP, catalog.read_manifest(STEP)[0])
    number = index.files.index(shard(root, rank).name)
    return next((begin, end) for name, begin, end in index.chunks_in_file(number) if name == tensor)


def overwrite(path: Path, begin: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[begin : begin + len(data)] = data
    path.write_bytes(content)


@pytest.mark.parametrize(("kind", "world_size"), [("ddp", 2), ("fsdp", 3)])
@pytest.mark.parametrize("damage", ["bit", "frozen"])
def test_a_run_resumes_bit_for_bit_from_what_was_restored(
    ranks, tmp_path: Path, kind: str, world_size: int, damage: str
):
    root = tmp_path / "run"
    before = ranks.run(train_and_save_twice, world_size, str(root), kind, 3)
    if damage == "bit":
        data = shard(root, 1).read_bytes()
        overwrite(shard(root, 1), len(data) // 2, bytes([data[len(data) // 2] ^ 0x40]))
    else:
        # The frozen file is one with that of the step before: only what is beside it can be gone, its checksums.
        next(root.glob(f"{STEP}/*/rank00000-1.sums")).unlink()

    repair(root)
    resumed = ranks.run(resume_train_save, world_size, str(root), kind, 2)

    for saved, (found, losses, _) in zip(before, resumed, strict=True):
        assert found == saved
        assert len(losses) == 2
    assert Catalog(LocalStorage(str(root))).line()[0].name == "step-0000000008.g0003"


def test_weights_in_the_block_of_a_damaged_record_are_not_taken_on_trust(ranks, tmp_path: Path):
    """Nothing proves which bytes of a damaged block are good: without a copy it is lost with all that lies in it."""
    root, copy = tmp_path / "run", tmp_path / "copy"
    before = ranks.run(train_and_save_twice, 2, str(root), "fsdp", 3)
    shutil.copytree(root, copy)
    begin, end = where(root, "rank.1.values.rng", 1)
    assert begin < 65_536, "the same block as the tensors"
    overwrite(shard(root, 1), begin + 10, os.urandom(40))
    assert end > begin + 50

    refused = CliRunner().invoke(main, ["repair", f"{root}@{STEP}", "--yes"])
    repair(root, "--from", str(copy))
    resumed = ranks.run(resume_train_save, 2, str(root), "fsdp", 1)

    assert "bytes of blocks." in refused.output.replace("model.", "") and "are lost" in refused.output, refused.output
    assert [found for found, _, _ in resumed] == before


def test_a_run_goes_on_without_the_moments_that_were_given_up(ranks, tmp_path: Path):
    """Those of one parameter, on every rank; everything else is as it was saved, and the resume says what is missing."""
    root = tmp_path / "run"
    before = ranks.run(train_and_save_twice, 2, str(root), "fsdp", 3, WIDE)
    name = "blocks.0.up.weight"
    begin, end = where(root, f"optim.{name}.exp_avg", 1)
    block = -(-begin // 65_536) * 65_536
    assert block + 65_536 <= end, "a block in which nothing else lies"
    overwrite(shard(root, 1), block, os.urandom(65_536))

    told = repair(root, "--accept-loss")
    resumed = ranks.run(resume_train_save, 2, str(root), "fsdp", 2, WIDE)

    assert f"optim.{name}.exp_avg in rank00001.safetensors" in told and "moments are lost and are not invented" in told
    for saved, (found, losses, findings) in zip(before, resumed, strict=True):
        gone = {f"optim.{name}.{key}" for key in ("exp_avg", "exp_avg_sq", "step")}
        assert saved.keys() - found.keys() == gone
        assert all(found[key] == saved[key] for key in found)
        assert len(losses) == 2
        assert any("lacks what was lost there" in line for line in findings), findings
