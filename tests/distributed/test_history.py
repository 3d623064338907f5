"""A run's history: damage walked back over, older steps continued, two jobs on one run, zombies, mistyped roots, retention."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

import dckpt
from dckpt.catalog.catalog import Catalog
from dckpt.catalog.generations import read_generation
from dckpt.cli.main import main
from dckpt.errors import CheckpointNotFoundError
from dckpt.storage.local import LocalStorage
from tests.support import history_jobs as jobs
from tests.support.damage_jobs import flip, save_steps

pytestmark = pytest.mark.distributed


def catalog(root: Path) -> Catalog:
    return Catalog(LocalStorage(str(root)))


def names(found) -> list[str]:
    return [item.name for item in found]


def listing(root: Path) -> dict[str, str]:
    """Checkpoint -> its line of `dckpt ls`."""
    told = CliRunner().invoke(main, ["ls", str(root)], terminal_width=200)
    assert told.exit_code == 0, told.output
    rows = {}
    for item in catalog(root).checkpoints():
        start = [str(item.step), str(item.generation)]
        lines = [line for line in told.stdout.splitlines() if line.split()[:2] == start]
        assert len(lines) == 1, told.stdout
        rows[item.name] = lines[0]
    return rows


@pytest.fixture(scope="module")
def made(ranks, tmp_path_factory):
    """Steps 2, 4 and 6 of one generation by two ranks of FSDP2, with the digests at each: never changed."""
    root = tmp_path_factory.mktemp("history") / "run"
    return root, ranks.run(save_steps, 2, str(root), "fsdp", (2, 4, 6))


@pytest.fixture
def run(made, tmp_path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / "run"))


def test_a_run_walks_back_over_a_damaged_step_and_trains_past_it_again(ranks, made, run):
    damaged = next(run.glob("step-0000000006.g0001/*/rank00001.safetensors"))
    flip(str(damaged), damaged.stat().st_size - 1, 1)
    results = ranks.run(jobs.retrain, 2, str(run), "fsdp", 2)
    for rank, (name, digests, steps) in enumerate(results):
        assert name == "step-0000000006.g0002"
        assert digests == made[1][rank][2], "the same step again is the same step"
        assert steps == [2, 4, 6]
    assert names(catalog(run).line()) == [
        "step-0000000006.g0002", "step-0000000004.g0001", "step-0000000002.g0001",
    ]  # fmt: skip
    assert catalog(run).resolve(6).name == "step-0000000006.g0002"
    assert names(catalog(run).superseded()) == ["step-0000000006.g0001"]
    rows = listing(run)
    assert "superseded" in rows["step-0000000006.g0001"]
    assert "superseded" not in rows["step-0000000006.g0002"]
    assert ranks.run(jobs.digests_of, 2, str(run), "fsdp", 6) == [digests for _, digests, _ in results]


def test_an_older_step_is_loaded_and_continued_and_the_later_ones_are_superseded(ranks, made, run):
    for name, digests, steps in ranks.run(jobs.retrain, 2, str(run), "fsdp", 1, 2):
        assert (name, steps) == ("step-0000000003.g0002", [2, 3])
        assert digests
    storage = LocalStorage(str(run))
    record = read_generation(storage, 2)
    assert record.reason == "load"
    assert record.parent is not None
    assert record.parent.checkpoint == "step-0000000002.g0001"
    superseded = ["step-0000000004.g0001", "step-0000000006.g0001"]
    assert names(catalog(run).superseded()) == superseded
    for step in (4, 6):
        with pytest.raises(CheckpointNotFoundError, match=f"step-000000000{step}.g0001.*superseded.*full name"):
            catalog(run).resolve(step)
    assert catalog(run).resolve("latest").name == "step-0000000003.g0002"
    rows = listing(run)
    assert all(("superseded" in row) == (name in superseded) for name, row in rows.items()), rows
    loaded = ranks.run(jobs.digests_of, 2, str(run), "fsdp", "step-0000000006.g0001")
    assert loaded == [digests[2] for digests in made[1]], "by its full name it loads as it was"


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("first", ["a", "b"])
@pytest.mark.parametrize("is_new", [True, False], ids=["a new run", "a run that both resumed"])
def test_of_two_jobs_on_one_run_the_second_to_commit_is_refused(ranks, tmp_path, world_size, first, is_new):
    for found in ranks.run(jobs.two_jobs, world_size, str(tmp_path / "run"), first, is_new):
        step, generation = (1, 1) if is_new else (2, 2)
        assert found["first"] == f"step-{step:010d}.g{generation:04d}"
        assert found["second"].startswith("CommitConflictError")
        assert f"found generation {generation}" in found["second"]
        assert "stop one of the two" in found["second"]
        assert found["resumed from"] == found["first"]
        assert found["second again"] == f"step-{step + 1:010d}.g{generation + 1:04d}"
        assert found["first again"].startswith("CommitConflictError")


@pytest.mark.parametrize("point", ["before_commit", "before_rename"])
def test_a_zombie_that_wakes_after_its_job_was_replaced_commits_nothing(ranks, tmp_path, point):
    (found,) = ranks.run(jobs.zombie, 1, str(tmp_path / "run"), point, "late", has_group=False)
    assert found["resumed"] == 1
    assert found["outcome"] == "failed", found
    kind = {"before_commit": "CommitConflictError", "before_rename": "StorageMissingError"}[point]
    assert found["error"].startswith(kind), found
    assert names(catalog(tmp_path / "run").checkpoints()) == ["step-0000000001.g0001", "step-0000000002.g0002"]
    _ensure_replaced(found)


def test_a_zombie_that_renames_after_the_new_generation_began_does_not_become_latest(ranks, tmp_path):
    root = tmp_path / "run"
    (found,) = ranks.run(jobs.zombie, 1, str(root), "before_rename", "between", has_group=False)
    # It passed the fence in time and its bytes are whole; the line goes by generations, so nobody continues from it.
    assert found["outcome"] == "committed", found
    assert names(catalog(root).superseded()) == ["step-0000000003.g0001"]
    assert "superseded" in listing(root)["step-0000000003.g0001"]
    _ensure_replaced(found)


def _ensure_replaced(found) -> None:
    assert found["new"] == "step-0000000002.g0002"
    assert found["next save of the zombie"].startswith("CommitConflictError"), found
    assert found["steps"] == [1, 2]
    assert found["latest"] == "step-0000000002.g0002"
    assert found["is the new job's"]


def test_walking_back_is_told_once_not_by_every_rank(ranks, tmp_path):
    root = tmp_path / "run"
    ranks.run(jobs.save_small, 1, str(root), [1, 2], has_group=False)
    damaged = next(root.glob("step-0000000002.g0001/*/rank00000.safetensors"))
    flip(str(damaged), damaged.stat().st_size - 1, 1)
    (first, told), (second, silent) = ranks.run(jobs.resume_small, 2, str(root))

    assert (first, second) == (1, 1)
    assert "step-0000000002.g0001 is damaged, walking back" in "\n".join(told)
    assert "walking back" not in "\n".join(silent)


def test_a_mistyped_root_is_a_new_run_that_is_announced_with_its_neighbour(ranks, tmp_path):
    ranks.run(jobs.save_small, 1, str(tmp_path / "gpt"), [1, 2], has_group=False)
    for (step, told), rank in zip(ranks.run(jobs.resume_small, 2, str(tmp_path / "gtp")), range(2), strict=True):
        assert step is None
        text = "\n".join(told)
        if rank == 0:
            assert f"no checkpoint in {tmp_path}/gtp: starting a new run from step 0" in text
            assert f"{tmp_path}/gpt" in text
            assert "is the root mistyped?" in text
        else:
            assert text == "", "one rank announces it"
    assert not (tmp_path / "gtp").exists(), "looking made nothing"


def test_a_run_that_died_in_its_first_save_starts_again(ranks, tmp_path):
    root = tmp_path / "run"
    ranks.run(jobs.save_small, 1, str(root), [1], has_group=False)
    shutil.rmtree(root / "step-0000000001.g0001")
    for name, error in ranks.run(jobs.resume_and_save, 2, str(root), 1):
        assert (name, error) == ("step-0000000001.g0002", "")


def test_a_run_whose_checkpoints_are_gone_is_not_started_over(ranks, tmp_path):
    root = tmp_path / "run"
    ranks.run(jobs.save_small, 1, str(root), [1], has_group=False)
    ranks.run(jobs.resume_and_save, 1, str(root), 1, has_group=False)
    for path in root.glob("step-*"):
        shutil.rmtree(path)
    for name, error in ranks.run(jobs.resume_and_save, 2, str(root), 1):
        assert name == ""
        assert error.startswith("CheckpointNotFoundError")
        assert "found 2 generations and no checkpoint" in error
    assert sorted(path.name for path in (root / "generations").iterdir()) == ["000001.json", "000002.json"]


def test_a_run_that_lost_its_generation_records_keeps_counting(ranks, tmp_path):
    root = tmp_path / "run"
    ranks.run(jobs.save_small, 1, str(root), [1, 2], has_group=False)
    shutil.rmtree(root / "generations")
    ((name, error),) = ranks.run(jobs.resume_and_save, 1, str(root), 1, has_group=False)
    assert (name, error) == ("step-0000000003.g0002", "")
    assert names(catalog(root).line()) == ["step-0000000003.g0002", "step-0000000002.g0001", "step-0000000001.g0001"]


LOSSES = [0.9, 0.3, 0.8, 0.7, 0.6, 0.5, 0.4]


@pytest.mark.parametrize(
    ("retention", "pinned", "left"),
    [
        (dckpt.Retention(), [], [1, 2, 3, 4, 5, 6, 7]),
        (dckpt.Retention(last=2), [], [6, 7]),
        (dckpt.Retention(last=1, every=3), [], [3, 6, 7]),
        (dckpt.Retention(last=1, best=dckpt.Best("val_loss")), [], [2, 7]),
        (dckpt.Retention(last=1, best=dckpt.Best("val_loss", "max", keep=2)), [], [1, 3, 7]),
        (dckpt.Retention(last=1), [1, 4], [1, 4, 7]),
    ],
    ids=["all", "last", "every", "best", "worst", "pinned"],
)
def test_retention_is_applied_after_each_commit(ranks, tmp_path, retention, pinned, left):
    root = tmp_path / "run"
    ranks.run(jobs.keep, 2, str(root), retention, LOSSES, pinned)
    assert [item.step for item in catalog(root).checkpoints()] == left
    assert not [path.name for path in root.iterdir() if path.name.startswith(".")], "nothing is half deleted"


def test_an_unpinned_checkpoint_expires_with_the_next_commit(ranks, tmp_path):
    root = tmp_path / "run"
    last_two = dckpt.Retention(last=2)
    ranks.run(jobs.keep, 1, str(root), last_two, [1.0] * 4, [1], has_group=False)
    assert [item.step for item in catalog(root).line()] == [4, 3, 1]
    assert ranks.run(jobs.unpin, 1, str(root), 1, has_group=False) == ["step-0000000001.g0001"]
    ranks.run(jobs.keep, 1, str(root), last_two, [1.0], [], has_group=False)
    assert [item.step for item in catalog(root).line()] == [5, 4]


def test_retention_leaves_superseded_steps_alone(ranks, tmp_path):
    root = tmp_path / "run"
    ranks.run(jobs.rewind_with_retention, 1, str(root), has_group=False)
    assert names(catalog(root).line()) == ["step-0000000004.g0002"]
    assert names(catalog(root).superseded()) == ["step-0000000003.g0001", "step-0000000004.g0001"]
