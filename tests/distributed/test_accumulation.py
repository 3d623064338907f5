"""Saved between two micro-batches: gradients are stored, resumed bit for bit, refused by name or dropped by choice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.accumulation_jobs import (
    resume_and_train,
    resume_elsewhere,
    save_and_die,
    save_at,
    stop_within,
    train_straight,
)
from tests.support.ranks import RankPool

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    ("kind", "world_size", "place", "how"),
    [
        ("single", 1, (2, 1), "blocking"),
        ("ddp", 2, (2, 3), "async"),
        ("ddp-views", 2, (2, 1), "overlap"),
        ("ddp-sync", 2, (2, 2), "async"),
        ("fsdp", 2, (2, 1), "overlap"),
        ("fsdp", 3, (0, 2), "blocking"),
        ("fsdp", 2, (2, 4), "async"),  # the gradients are complete, the optimizer has not stepped
    ],
)
def test_a_run_killed_between_micro_batches_continues_bit_for_bit(
    ranks: RankPool, tmp_path: Path, kind: str, world_size: int, place: tuple[int, int], how: str
) -> None:
    has_group, root = kind != "single", str(tmp_path / "run")
    straight = ranks.run(train_straight, world_size, kind, (5, 2), has_group=has_group)
    killed = ranks.run(save_and_die, world_size, root, kind, place, how, has_group=has_group, allow_loss=True)
    assert all(result.exit_code == -9 for result in killed)
    resumed = ranks.run(resume_and_train, world_size, root, kind, (5, 2), has_group=has_group)

    for (seen, digests), (late_seen, late_digests, begun, report) in zip(straight, resumed, strict=True):
        assert begun == place
        assert late_seen == [row for row in seen if row[0] >= place]
        assert late_digests == digests
        assert (report["micro_step"], report["continued_micro_step"]) == (place[1], place[1])
        assert "grad" in report["parts"]
        assert [found for found in report["findings"] if found["severity"] in ("critical", "warning")] == []


def test_gradients_that_were_reduced_go_on_on_other_ranks_from_the_same_sample(ranks: RankPool, tmp_path: Path) -> None:
    root = str(tmp_path / "run")
    saved = ranks.run(save_at, 4, root, "fsdp", (1, 2), "store", 48)
    straight = ranks.run(save_at, 4, str(tmp_path / "other"), "fsdp", (2, 1), "store", 48)
    before = saved[0][3]
    for world_size, kind, micro, expected in ((2, "fsdp", 2, 4), (2, "ddp-sync", 4, 2), (1, "single", 2, 8)):
        found = ranks.run(
            resume_elsewhere, world_size, root, kind, 48, micro, "restore", (2, 0), has_group=kind != "single"
        )
        samples = sorted(i for rank in found for _, chosen, _ in rank[2] for i in chosen)
        rows = [(place, chosen) for rank in straight for place, chosen, _ in rank[2]]
        expected_samples = [i for place, chosen in rows if (1, 2) <= place < (2, 0) for i in chosen]
        for begun, gradients, _, report in found:
            assert begun == (1, expected)
            assert gradients.keys() == before.keys()
            assert all(torch.equal(gradients[name], before[name]) for name in before)
            assert (report["micro_step"], report["continued_micro_step"]) == (2, expected)
        assert samples == sorted(expected_samples)


def test_gradients_that_are_no_whole_number_of_new_micro_batches_are_refused_or_dropped(
    ranks: RankPool, tmp_path: Path
) -> None:
    root = str(tmp_path / "run")
    ranks.run(save_at, 4, root, "fsdp", (1, 1), "store", 48)

    for kind, message in ranks.run(resume_elsewhere, 2, root, "fsdp", 48, 8, "restore", (2, 0)):
        assert kind == "IncompatibleStateError"
        assert "8 samples of the step, which are not a whole number" in message
        assert 'ResumePolicy(gradients="drop")' in message
    for kind, message in ranks.run(resume_elsewhere, 2, root, "fsdp", 24, 2, "restore", (2, 0)):
        assert (kind, "a step of 48 samples, and a step has 24 now" in message) == ("IncompatibleStateError", True)
    for begun, gradients, seen, report in ranks.run(resume_elsewhere, 2, root, "fsdp", 48, 8, "drop", (2, 0)):
        assert (begun, gradients) == ((1, 0), {})
        assert seen[0][0] == (1, 0)
        assert (report["micro_step"], report["continued_micro_step"]) == (1, 0)
        told = [finding for finding in report["findings"] if finding["check"] == "accumulation"]
        assert [finding["severity"] for finding in told] == ["warning"]
        assert "1 micro-batch of step 1" in told[0]["message"]


def test_gradients_that_were_not_reduced_are_refused_by_name_on_other_ranks(ranks: RankPool, tmp_path: Path) -> None:
    root = str(tmp_path / "run")
    ranks.run(save_at, 2, root, "ddp", (1, 2), "store", 48)

    for kind, message in ranks.run(resume_elsewhere, 3, root, "ddp", 48, 2, "restore", (2, 0)):
        assert kind == "IncompatibleStateError"
        assert message.count("2 ranks had not reduced yet") == 1
        assert 'ResumePolicy(gradients="drop")' in message
    for begun, gradients, *_ in ranks.run(resume_elsewhere, 3, root, "ddp", 48, 2, "drop", (2, 0)):
        assert (begun, gradients) == ((1, 0), {})


@pytest.mark.parametrize(("kind", "world_size"), [("fsdp-no-sync", 2), ("hsdp-no-all-reduce", 4)])
def test_a_save_where_gradients_are_out_of_reach_is_refused_by_name_on_all_ranks(
    ranks: RankPool, tmp_path: Path, kind: str, world_size: int
) -> None:
    call = {"fsdp-no-sync": "set_requires_gradient_sync(False)", "hsdp-no-all-reduce": "set_requires_all_reduce(False)"}
    for error, message in ranks.run(save_at, world_size, str(tmp_path / "run"), kind, (1, 2)):
        assert error == "ConfigError"
        assert call[kind] in message
        assert 'save(state, gradients="drop")' in message
    # The same kind of run saves where its gradients are reduced: at the end of a step, and of its last micro-batch.
    for number, place in enumerate([(1, 0), (1, 4)]):
        found = ranks.run(save_at, world_size, str(tmp_path / f"other{number}"), kind, place)
        assert {result[0] for result in found} == {"committed"}


def test_gradients_dropped_at_the_save_begin_their_step_again(ranks: RankPool, tmp_path: Path) -> None:
    root = str(tmp_path / "run")
    found = ranks.run(save_at, 2, root, "fsdp-no-sync", (1, 2), "drop")
    assert {(outcome, name) for outcome, name, *_ in found} == {("committed", "step-0000000001.g0001.m2")}

    for begun, gradients, seen, report in ranks.run(
        resume_elsewhere, 2, root, "fsdp-no-sync", 16, 2, "restore", (2, 0)
    ):
        assert (begun, gradients) == ((1, 0), {})
        assert seen[0][0] == (1, 0)
        assert [f["severity"] for f in report["findings"] if f["check"] == "accumulation"] == ["warning"]


@pytest.mark.parametrize(
    ("kind", "within"), [("fsdp", True), ("ddp", True), ("fsdp-no-sync", False)], ids=["fsdp", "ddp", "fsdp-no-sync"]
)
def test_a_signal_within_a_step_is_obeyed_at_once_where_gradients_can_be_stored(
    ranks: RankPool, tmp_path: Path, kind: str, within: bool
) -> None:
    root = str(tmp_path / "run")
    found = ranks.run(stop_within, 2, root, kind, 1)
    ((step, micro_step, steps, is_early),) = {(s, m, tuple(all_), e) for s, m, all_, e in found}

    assert is_early
    assert steps == (step,)
    if not within:
        assert micro_step == 0
    for _, _, begun, _ in ranks.run(resume_and_train, 2, root, kind, (step + 1, 0)):
        assert begun == (step, micro_step)


def test_gradients_are_resharded_like_everything_else(ranks: RankPool, tmp_path: Path) -> None:
    root, there = str(tmp_path / "run"), str(tmp_path / "there")
    ranks.run(save_at, 4, root, "fsdp", (1, 3), "store", 48)
    command = Path(sys.executable).with_name("dckpt")
    subprocess.run([command, "reshard", root, there, "--world-size", "3"], check=True, capture_output=True)

    original = ranks.run(resume_elsewhere, 3, root, "fsdp", 48, 2, "restore", (2, 0))
    resharded = ranks.run(resume_elsewhere, 3, there, "fsdp", 48, 2, "restore", (2, 0))
    for (begun, gradients, seen, _), (again, same, seen_again, _) in zip(original, resharded, strict=True):
        assert begun == again == (1, 4)
        assert gradients.keys() == same.keys()
        assert all(torch.equal(gradients[name], same[name]) for name in gradients)
        assert seen == seen_again


def test_gradients_of_each_rank_alone_are_not_resharded(ranks: RankPool, tmp_path: Path) -> None:
    root = str(tmp_path / "run")
    ranks.run(save_at, 2, root, "ddp", (1, 2), "store", 48)
    command = Path(sys.executable).with_name("dckpt")
    found = subprocess.run(
        [command, "reshard", root, str(tmp_path / "there"), "--world-size", "3"], capture_output=True, text=True
    )

    assert found.returncode
    assert "2 ranks had not reduced yet" in found.stderr + found.stdout
