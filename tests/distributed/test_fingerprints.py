"""What was loaded is compared with what was saved: whatever the layouts, no false alarm, and every difference by name."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from dckpt.cli.main import main
from tests.support import fingerprint_jobs as jobs
from tests.support.resealing import reseal_sums, with_one_more, without_fingerprints

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module", name="saved")
def _saved(ranks, tmp_path_factory):
    """Runs by (kind, ranks, whether a buffer differs by rank), each made once."""
    made: dict[tuple[str, int, bool], Path] = {}

    def run(kind: str, world_size: int, *, differs: bool = False) -> str:
        key = kind, world_size, differs
        if key not in made:
            made[key] = tmp_path_factory.mktemp("fingerprints") / "run"
            taken_over = ranks.run(jobs.save, world_size, str(made[key]), kind, differs)
            assert all(taken_over), "frozen parameters are not written again"
        return str(made[key])

    return run


def newest(root: Path) -> Path:
    return max(root.glob("step-*"))


def compared(ranks, world_size: int, root: str, kind: str, *spoilings: str | None, **options):
    """The comparisons of one rank; all ranks have the same."""
    found = ranks.run(jobs.load_and_compare, world_size, root, kind, spoilings or (None,), options)
    assert all(one == found[0] for one in found)
    return found[0] if spoilings else found[0][0]


@pytest.mark.parametrize(
    ("before", "num_before", "after", "num_after"),
    [
        ("plain", 1, "plain", 1),
        ("plain", 1, "fsdp", 3),
        ("plain", 2, "tp", 2),
        ("fsdp", 3, "fsdp", 3),
        ("fsdp", 3, "fsdp", 2),
        ("fsdp", 3, "hsdp", 4),
        ("fsdp", 3, "plain", 2),
        ("tp", 2, "fsdp", 3),
        ("tp", 2, "fsdp-tp", 4),
        ("hsdp", 4, "tp", 2),
        ("hsdp", 4, "hsdp", 4),
        ("fsdp-tp", 4, "fsdp", 2),
        ("fsdp-tp", 4, "fsdp-tp", 4),
    ],
)
def test_a_clean_load_differs_nowhere(ranks, saved, before, num_before, after, num_after):
    found = compared(ranks, num_after, saved(before, num_before), after)

    assert (found.reason, found.differ, found.drifted, found.cast, found.without) == (None, (), {}, (), ())
    assert found.num_checked == jobs.NUM_TENSORS


@pytest.mark.parametrize(("kind", "world_size"), [("plain", 1), ("plain", 2), ("fsdp", 2), ("tp", 2), ("hsdp", 4)])
def test_every_spoiled_tensor_is_named_and_no_other(ranks, saved, kind, world_size):
    found = compared(ranks, world_size, saved("fsdp", 3), kind, *jobs.EXPECTED)

    assert {name: one.differ for name, one in zip(jobs.EXPECTED, found, strict=True)} == jobs.EXPECTED
    assert all(one.drifted == {} for one in found)


def test_a_replica_that_drifted_is_named_with_its_rank(ranks, saved):
    (plain,) = compared(ranks, 3, saved("fsdp", 3), "plain", "rank 1 alone")
    (hybrid,) = compared(ranks, 4, saved("fsdp", 3), "hsdp", "rank 1 alone")

    assert (plain.differ, plain.drifted) == ((), {"model.blocks.0.up.weight": "rank 1"})
    # Ranks 1 and 3 hold the same shard; rank 1 counts it.
    assert hybrid.differ == ("model.blocks.0.up.weight",)
    assert hybrid.drifted == {"model.blocks.0.up.weight": "rank 3"}


def test_tensors_that_differed_by_rank_are_compared_rank_by_rank(ranks, saved):
    root = saved("plain", 2, differs=True)
    clean, spoiled = compared(ranks, 2, root, "plain", None, "own buffer of rank 1")
    elsewhere, told = compared(ranks, 3, root, "fsdp", None, "own buffer of rank 1")

    assert (clean.differ, clean.drifted, clean.num_checked) == ((), {}, jobs.NUM_TENSORS + 1)
    assert spoiled.differ == ("rank.1.model.running",)
    assert (elsewhere.differ, elsewhere.num_checked) == ((), jobs.NUM_TENSORS)
    assert told.differ == ()


def test_only_what_was_loaded_is_compared(ranks, saved):
    root = saved("fsdp", 2)
    model, spoiled = compared(ranks, 2, root, "fsdp", None, "ema is the model", parts=["model"])
    assert (model.num_checked, model.differ, spoiled.differ) == (jobs.NUM_MODEL, (), ())

    cast = compared(ranks, 2, root, "fsdp", dtype=torch.float64, cast="allow", parts=["model"])
    assert (cast.differ, cast.num_checked) == ((), 1)  # the counter
    assert len(cast.cast) == jobs.NUM_MODEL - 1


def test_a_rank_that_cannot_say_what_it_holds_is_named_on_all(ranks, saved):
    found = ranks.run(jobs.fail_on_one_rank, 2, saved("plain", 2))

    assert found[0] == found[1]
    assert "rank 1" in found[0]
    assert "complex128" in found[0]


def test_a_resharded_checkpoint_has_its_own(ranks, saved, tmp_path):
    root = Path(shutil.copytree(saved("fsdp", 3), tmp_path / "run"))
    told = CliRunner().invoke(main, ["reshard", str(root), str(root), "--world-size", "2"])
    assert told.exit_code == 0, told.output
    found = compared(ranks, 2, str(root), "fsdp", None, "one bit")

    assert (found[0].differ, found[0].num_checked) == ((), jobs.NUM_TENSORS)
    assert found[1].differ == jobs.EXPECTED["one bit"]


def test_sums_without_fingerprints_are_not_checked(ranks, saved, tmp_path):
    root = Path(shutil.copytree(saved("fsdp", 2), tmp_path / "run"))
    reseal_sums(newest(root), 1, without_fingerprints)
    clean, spoiled = compared(ranks, 2, str(root), "fsdp", None, "one bit")

    assert (clean.differ, clean.num_checked + len(clean.without)) == ((), jobs.NUM_TENSORS)
    assert "model.blocks.1.down.weight" in clean.without
    assert asdict(spoiled) == asdict(clean)


def test_sums_with_another_number_of_fingerprints_are_damage(ranks, saved, tmp_path):
    root = Path(shutil.copytree(saved("plain", 2), tmp_path / "run"))
    reseal_sums(newest(root), 1, with_one_more)
    found = ranks.run(jobs.load_error, 2, str(root))

    assert found[0] == found[1]
    assert found[0].startswith("CorruptCheckpointError")
    assert "rank00001" in found[0]
    assert "a fingerprint for each of its" in found[0]
