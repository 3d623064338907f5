"""Frozen weights are not written again: links, references, and what happens to them when checkpoints come and go."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from safetensors import safe_open

import dckpt
from dckpt.catalog.catalog import Catalog
from dckpt.cli.main import main
from dckpt.format.manifest import Manifest
from dckpt.storage.local import LocalStorage
from dckpt.tools.target import open_target
from dckpt.tools.verify_run import verify_target
from tests.support import reuse_jobs as jobs

pytestmark = pytest.mark.distributed

NO_LINKS = errno.EPERM
WAYS = pytest.mark.parametrize("refuses", [0, NO_LINKS], ids=["links", "references"])


def manifest(root: Path, name: str) -> Manifest:
    return Catalog(LocalStorage(str(root))).read_manifest(name)[0]


def taken_over(root: Path, name: str) -> dict[str, tuple[int, str | None]]:
    """Shard -> how often it was taken over, and in which other checkpoint it lies."""
    return {entry.name: (entry.reused, entry.checkpoint) for entry in manifest(root, name).shard_entries}


def damages(root: Path) -> dict[str, list[str]]:
    """What is wrong with each checkpoint that is there."""
    report = verify_target(open_target(str(root)), is_all=True)
    return {found.checkpoint: [damage.what for damage in found.damages] for found in report.checkpoints}


def inode(root: Path, name: str, file: str) -> int:
    (path,) = (root / name).glob(f"*/{file}")
    return path.stat().st_ino


@WAYS
def test_the_second_save_writes_what_changed_and_nothing_else(ranks, tmp_path, refuses):
    root = tmp_path / "run"
    results = ranks.run(jobs.save_times, 2, str(root), 3, {"refuses": refuses, "width": jobs.WIDE})

    first, second, third = (found.name for found in results[0][0])
    changed = sum(changing for _, changing in results)
    for number in (1, 2):
        written = sum(saved[number].written for saved, _ in results)
        assert changed < written <= 1.03 * changed, (written, changed)
    assert sum(saved[0].written for saved, _ in results) > 30 * changed
    place = first if refuses else None
    for number, name in enumerate((first, second, third)):
        where = place if number else None
        assert taken_over(root, name) == {
            "rank00000.safetensors": (0, None),
            "rank00000-1.safetensors": (number, where),
            "rank00001.safetensors": (0, None),
            "rank00001-1.safetensors": (number, where),
        }
    if not refuses:
        shared = {inode(root, name, "rank00001-1.safetensors") for name in (first, second, third)}
        assert len(shared) == 1
        assert len({inode(root, name, "rank00001-1.sums") for name in (first, second, third)}) == 1
        assert [saved[1].links for saved, _ in results] == [2, 2], "shard and sums of each rank"
    assert damages(root) == {first: [], second: [], third: []}
    for number, name in enumerate((first, second, third)):
        loaded = ranks.run(jobs.digests_of, 2, str(root), name, jobs.WIDE)
        assert loaded == [saved[number].digests for saved, _ in results]
    alone = ranks.run(jobs.digests_of, 1, str(root), third, jobs.WIDE, has_group=False)
    weights = {name: found for name, found in results[0][0][2].digests.items() if name.startswith("model.")}
    assert weights.items() <= alone[0].items()


@WAYS
def test_what_changed_after_all_is_written(ranks, tmp_path, refuses):
    root = tmp_path / "run"
    results = ranks.run(jobs.change_between, 2, str(root), refuses)

    counts = [taken_over(root, saved.name)["rank00000-1.safetensors"][0] for saved in results[0]]
    assert counts == [0, 1, 0, 1]
    for number in (1, 2, 3):
        loaded = ranks.run(jobs.digests_of, 2, str(root), results[0][number].name)
        assert loaded == [saved[number].digests for saved in results]
    assert not any(damages(root).values())


@WAYS
def test_every_so_often_a_file_is_written_anew(ranks, tmp_path, refuses):
    root = tmp_path / "run"
    ((saved, _),) = ranks.run(
        jobs.save_times, 1, str(root), 5, {"refuses": refuses, "rewrite_every": 3}, has_group=False
    )

    found = [taken_over(root, one.name)["rank00000-1.safetensors"] for one in saved]
    assert [count for count, _ in found] == [0, 1, 2, 0, 1]
    if refuses:
        assert [place for _, place in found] == [None, saved[0].name, saved[0].name, None, saved[3].name]
    ((always, _),) = ranks.run(jobs.save_times, 1, str(root), 2, {"rewrite_every": 1}, has_group=False)
    assert [taken_over(root, one.name)["rank00000-1.safetensors"] for one in always] == [(0, None)] * 2


@WAYS
def test_after_a_restart_files_are_taken_over_from_what_was_loaded(ranks, tmp_path, refuses):
    root = tmp_path / "run"
    before = ranks.run(jobs.save_times, 2, str(root), 2, {"refuses": refuses})
    after = ranks.run(jobs.save_times, 2, str(root), 1, {"refuses": refuses})

    name = after[0][0][0].name
    assert name.endswith(".g0002")
    place = before[0][0][0].name if refuses else None
    assert taken_over(root, name)["rank00001-1.safetensors"] == (2, place)
    assert ranks.run(jobs.digests_of, 2, str(root), name) == [saved[0].digests for saved, _ in after]


@pytest.mark.parametrize("point", ["before_plan", "before_link"])
@pytest.mark.parametrize(("refuses", "world_size"), [(0, 2), (NO_LINKS, 1)], ids=["links", "references"])
def test_a_parent_that_is_gone_makes_a_full_write_and_no_failed_save(ranks, tmp_path, refuses, world_size, point):
    root = tmp_path / "run"
    results = ranks.run(jobs.prune_between, world_size, str(root), refuses, point, has_group=world_size > 1)

    first, second, third = (saved.name for saved in results[0])
    assert not (root / first).exists()
    assert taken_over(root, second)["rank00000-1.safetensors"] == (0, None)
    assert taken_over(root, third)["rank00000-1.safetensors"][0] == 1
    assert damages(root) == {third: [], second: []}


@WAYS
def test_a_failed_save_is_no_parent(ranks, tmp_path, refuses):
    root = tmp_path / "run"
    results = ranks.run(jobs.fail_between, 2, str(root), refuses)

    for before, error, after in results:
        assert "Input/output error" in error
        counts = [taken_over(root, saved.name)["rank00001-1.safetensors"][0] for saved in (*before, *after)]
        assert counts == [0, 1, 2, 3], "the failed one does not count"
    assert not any(damages(root).values())
    assert not [path.name for path in root.iterdir() if path.name.startswith(".")]


def test_retention_with_links_frees_names_and_keeps_the_bytes(ranks, tmp_path):
    root = tmp_path / "run"
    results = ranks.run(jobs.save_times, 2, str(root), 4, {"retention": dckpt.Retention(last=1)})

    last = results[0][0][3].name
    assert damages(root) == {last: []}
    assert taken_over(root, last)["rank00000-1.safetensors"] == (3, None)


def test_retention_keeps_what_is_referred_to_until_nobody_refers_to_it(ranks, tmp_path):
    root = tmp_path / "run"
    options = {"refuses": NO_LINKS, "retention": dckpt.Retention(last=1), "rewrite_every": 3}
    one = ranks.run(jobs.save_times, 2, str(root), 3, options)
    first, third = one[0][0][0].name, one[0][0][2].name
    assert damages(root) == {third: [], first: []}

    told = CliRunner().invoke(main, ["prune", str(root), "--last", "1", "--yes"], terminal_width=200)
    assert told.exit_code == 1, told.output
    assert f"files of {third} lie in it" in told.output
    assert damages(root) == {third: [], first: []}

    two = ranks.run(jobs.save_times, 2, str(root), 1, options)
    fourth = two[0][0][0].name
    assert damages(root) == {fourth: []}, "written anew, so nobody refers to the first any more"


def test_a_linked_file_is_plain_safetensors(ranks, tmp_path):
    root = tmp_path / "run"
    ranks.run(jobs.save_times, 1, str(root), 2, {}, has_group=False)

    (path,) = root.glob("step-0000000002.g0001/*/rank00000-1.safetensors")
    assert path.stat().st_nlink == 2
    with safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == ["model.0.base.weight", "model.1.base.weight"]
        assert file.get_tensor("model.0.base.weight").shape == (jobs.WIDTH, jobs.WIDTH)


@WAYS
def test_stock_dcp_load_reads_files_that_were_taken_over(ranks, tmp_path, refuses):
    root = tmp_path / "run"
    ranks.run(jobs.save_times, 2, str(root), 2, {"refuses": refuses})
    name = "model.0.base.weight"

    states = [{name: torch.zeros(jobs.WIDTH, jobs.WIDTH)} for _ in range(2)]
    for state, step in zip(states, (1, 2), strict=True):
        dcp.load(state, storage_reader=dckpt.DckptReader(root / f"step-000000000{step}.g0001"), no_dist=True)

    assert states[0][name].count_nonzero() == jobs.WIDTH**2
    assert torch.equal(states[0][name], states[1][name])
