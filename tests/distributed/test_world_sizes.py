"""Saved on N ranks, loaded on M: everything equal bit for bit; and a killed run continues as if nothing had happened."""

from __future__ import annotations

import pytest

from tests.support.jobs import resume_and_digest, resume_and_train, train_and_save, train_save_die, train_straight

pytestmark = pytest.mark.distributed

KINDS = {"single": (1,), "ddp": (1, 2, 3, 4), "fsdp": (1, 2, 3, 4)}


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """(kind, world size) -> (run directory, digests by rank), made when first asked for."""
    made = {}

    def get(kind, world_size):
        if (kind, world_size) not in made:
            root = tmp_path_factory.mktemp("run") / "gpt"
            made[(kind, world_size)] = (
                root,
                ranks.run(train_and_save, world_size, str(root), kind, 3, has_group=kind != "single"),
            )
        return made[(kind, world_size)]

    return get


def _comparable(digests, *, same_world: bool):
    """On another number of ranks random streams are re-derived and the batch differs; buffers follow rank 0's."""
    own = ("rng:", "values:progress")
    return {name: value for name, value in digests.items() if same_world or not name.startswith(own)}


@pytest.mark.parametrize("loaded_by", ["single", "ddp", "fsdp"])
@pytest.mark.parametrize(("kind", "world_size"), [(k, n) for k, sizes in KINDS.items() for n in sizes])
def test_everything_is_equal_bit_for_bit_on_any_number_of_ranks(ranks, saved, kind, world_size, loaded_by):
    root, before = saved(kind, world_size)
    for target in KINDS[loaded_by]:
        results = ranks.run(resume_and_digest, target, str(root), loaded_by, has_group=loaded_by != "single")
        same = target == world_size
        for rank, (after, report) in enumerate(results):
            expected = before[rank] if same else before[0]
            assert _comparable(after, same_world=same) == _comparable(expected, same_world=same), (target, rank)
            assert (report["step"], report["saved_world_size"]) == (3, world_size)


@pytest.mark.parametrize(
    ("kind", "world_size"), [("single", 1), ("ddp", 2), ("ddp", 4), ("fsdp", 1), ("fsdp", 2), ("fsdp", 4)]
)
def test_a_killed_run_continues_bit_identically_on_the_same_ranks(ranks, tmp_path, kind, world_size):
    has_group = kind != "single"
    straight = ranks.run(train_straight, world_size, kind, 8, has_group=has_group)
    killed = ranks.run(
        train_save_die, world_size, str(tmp_path / "run"), kind, 4, 1, has_group=has_group, allow_loss=True
    )
    assert all(result.exit_code == -9 for result in killed)
    resumed = ranks.run(resume_and_train, world_size, str(tmp_path / "run"), kind, 4, has_group=has_group)

    for (losses, digests), (late_losses, late_digests) in zip(straight, resumed, strict=True):
        assert losses[4:] == late_losses
        assert digests == late_digests
    if world_size > 1 and kind == "ddp":
        means = [digests["model.blocks.0.norm.mean"] for _, digests in straight]
        assert len(set(means)) == world_size, "the buffers were meant to differ by rank"


@pytest.mark.parametrize(("kind", "world_size"), [("single", 1), ("ddp", 2), ("fsdp", 3)])
def test_an_optimizer_that_never_stepped_is_carried_over_as_such(ranks, tmp_path, kind, world_size):
    """Saving or loading at step 0 takes no step for the optimizer, and none of its hooks runs."""
    root = str(tmp_path / "run")
    before = ranks.run(train_and_save, world_size, root, kind, 0, has_group=kind != "single")

    for loaded_by, target in (("single", 1), ("ddp", 2), ("fsdp", 2), ("fsdp", 4)):
        results = ranks.run(resume_and_digest, target, root, loaded_by, 2, True, has_group=loaded_by != "single")
        for after, report in results:
            assert report["step"] == 0
            assert not [name for name in after if name.endswith((".exp_avg", ".step"))]
            assert _comparable(after, same_world=False) == _comparable(before[0], same_world=False)
