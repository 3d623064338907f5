"""One process and its Checkpointer: what counts as saved, what is told, and what a stuck or failing storage does to it."""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import threading
import time
import weakref

import pytest
import torch
from torch import nn

import dckpt
from dckpt import failpoint


class Loop:
    """A training loop small enough to be its own reference."""

    def __init__(self, *, max_steps: int = 100) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(4, 4)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.progress = dckpt.TrainProgress(max_steps=max_steps)
        self.state = dckpt.TrainState(model=self.model, optimizer=self.optimizer, progress=self.progress)

    def step(self) -> None:
        self.model(torch.ones(4)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.advance()


@pytest.fixture(autouse=True)
def _disarmed():
    yield
    failpoint.disarm()


def _save_one(loop, root):
    """A run with one step, saved and closed."""
    with dckpt.Checkpointer(root, signals=()) as checkpointer:
        checkpointer.resume(loop.state)
        loop.step()
        assert checkpointer.save(loop.state, blocking=True).outcome == "committed"


def _manifest(root, name):
    return json.loads((root / name / "manifest.json").read_text())


def test_a_writer_that_is_stuck_in_the_storage_is_left_behind_and_the_next_save_commits(tmp_path):
    release, loop = threading.Event(), Loop()
    with dckpt.Checkpointer(tmp_path / "run", deadline_s=1, signals=()) as checkpointer:
        checkpointer.resume(loop.state)
        loop.step()
        failpoint.arm({"after_shard_write": lambda: release.wait(30)})
        stuck = checkpointer.save(loop.state)
        loop.step()
        began = time.monotonic()
        while not failpoint.hits("after_shard_write"):
            time.sleep(0.01)
        threading.Timer(4.0, failpoint.disarm).start()
        assert stuck.wait() == "failed"
        waited = time.monotonic() - began
        failpoint.disarm()
        later = checkpointer.save(loop.state, blocking=True)
        release.set()

        assert waited < 3.5
        assert "storage did not answer for 1 s" in str(stuck.error)
        assert later.outcome == "committed", later.error
        assert checkpointer.steps() == [2]
    time.sleep(0.3)  # the writer that woke up again must not change what was said
    assert stuck.outcome == "failed"
    assert [p.name for p in (tmp_path / "run").iterdir() if p.name.startswith("step-")] == ["step-0000000002.g0001"]


def test_a_partial_load_is_not_taken_for_a_save_of_that_step(tmp_path):
    first = Loop()
    with dckpt.Checkpointer(tmp_path / "run", signals=()) as checkpointer:
        checkpointer.resume(first.state)
        for _ in range(3):
            first.step()
        checkpointer.save(first.state, blocking=True)
    second = Loop()
    with dckpt.Checkpointer(tmp_path / "run", signals=()) as checkpointer:
        checkpointer.load(second.state, parts=("model",))
        for _ in range(3):
            second.step()
        pending = checkpointer.save(second.state, blocking=True)

        assert (pending.outcome, pending.checkpoint) == ("committed", "step-0000000003.g0002")


def test_after_a_whole_resume_the_same_step_is_saved_already(tmp_path):
    loop = Loop()
    _save_one(loop, tmp_path / "run")
    again = Loop()
    with dckpt.Checkpointer(tmp_path / "run", signals=()) as checkpointer:
        checkpointer.resume(again.state)
        pending = checkpointer.save(again.state, blocking=True)

        assert pending.checkpoint == "step-0000000001.g0001"
        assert os.listdir(tmp_path / "run" / "generations") == ["000001.json"]


def test_metrics_are_read_at_the_call_and_reach_the_manifest_also_through_step(tmp_path):
    loop, loss = Loop(), torch.tensor(1.0)
    with dckpt.Checkpointer(tmp_path / "run", save=dckpt.Every(steps=2), signals=()) as checkpointer:
        checkpointer.resume(loop.state)
        loop.step()
        checkpointer.save(loop.state, metrics={"val_loss": loss})
        loss.fill_(99)
        loop.step()
        checkpointer.step(loop.state, metrics={"val_loss": 0.5})
        checkpointer.wait()

    assert _manifest(tmp_path / "run", "step-0000000001.g0001")["metrics"] == {"val_loss": 1.0}
    assert _manifest(tmp_path / "run", "step-0000000002.g0001")["metrics"] == {"val_loss": 0.5}


def test_metrics_for_a_step_that_is_saved_already_are_said_to_be_dropped(tmp_path, caplog):
    loop = Loop()
    with dckpt.Checkpointer(tmp_path / "run", signals=()) as checkpointer:
        checkpointer.resume(loop.state)
        loop.step()
        checkpointer.save(loop.state)
        with caplog.at_level(logging.WARNING):
            checkpointer.save(loop.state, metrics={"val_loss": 0.5})

    assert "does not get val_loss" in caplog.text


def test_metrics_that_are_no_numbers_are_refused(tmp_path):
    loop = Loop()
    with dckpt.Checkpointer(tmp_path / "run", signals=()) as checkpointer:
        checkpointer.resume(loop.state)
        loop.step()
        with pytest.raises(dckpt.ConfigError, match="metrics"):
            checkpointer.save(loop.state, metrics={"val_loss": "low"})


def test_a_stop_whose_save_fails_twice_raises_instead_of_saying_saved(tmp_path):
    def fail() -> None:
        raise OSError(28, "No space left on device")

    loop = Loop()
    with dckpt.Checkpointer(tmp_path / "run", deadline_s=5) as checkpointer:
        checkpointer.resume(loop.state)
        loop.step()
        failpoint.arm({"before_shard_write": fail})
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(dckpt.DckptError):
            checkpointer.step(loop.state)

        assert failpoint.hits("before_shard_write") == 2
        assert checkpointer.steps() == []


def test_a_stop_whose_save_fails_once_is_saved_at_the_second_try(tmp_path):
    def fail_once() -> None:
        if failpoint.hits("before_shard_write") == 1:
            raise OSError(5, "Input/output error")

    loop = Loop()
    with dckpt.Checkpointer(tmp_path / "run", deadline_s=5) as checkpointer:
        checkpointer.resume(loop.state)
        loop.step()
        failpoint.arm({"before_shard_write": fail_once})
        os.kill(os.getpid(), signal.SIGUSR1)

        assert checkpointer.step(loop.state) is dckpt.Stop
        assert checkpointer.steps() == [1]


def test_an_idle_checkpointer_keeps_no_tensor_of_the_last_save_alive(tmp_path):
    loop = Loop()
    with dckpt.Checkpointer(tmp_path / "run", signals=()) as checkpointer:
        checkpointer.resume(loop.state)
        loop.step()
        checkpointer.save(loop.state, blocking=True)
        parameter = weakref.ref(loop.model.weight)
        del loop
        gc.collect()

        assert parameter() is None


def test_leftovers_that_cannot_be_swept_do_not_fail_the_save(tmp_path, caplog):
    loop, root = Loop(), tmp_path / "run"
    leftover = root / (".tmp-" + "a" * 32)
    leftover.mkdir(parents=True)
    (leftover / "link").symlink_to("/nowhere")
    with dckpt.Checkpointer(root, signals=()) as checkpointer:
        checkpointer.resume(loop.state)
        loop.step()
        pending = checkpointer.save(loop.state, blocking=True)

    assert pending.outcome == "committed", pending.error


def test_generators_that_do_not_fit_are_refused_before_anything_live_changes(tmp_path):
    import numpy as np

    first = Loop()
    first.state.generators["shuffle"] = torch.Generator()
    _save_one(first, tmp_path / "run")
    second = Loop()
    second.state.generators["shuffle"] = np.random.default_rng(1)
    before = second.model.weight.detach().clone()
    with dckpt.Checkpointer(tmp_path / "run", signals=()) as checkpointer:
        with pytest.raises(dckpt.ConfigError, match="shuffle"):
            checkpointer.resume(second.state)

        assert torch.equal(second.model.weight, before)
        assert second.progress.step == 0


def test_a_loop_that_ignores_the_end_saves_nothing_more(tmp_path, caplog):
    loop = Loop(max_steps=3)
    with dckpt.Checkpointer(tmp_path / "run", signals=()) as checkpointer:
        checkpointer.resume(loop.state)
        answers = []
        for _ in range(6):
            loop.step()
            answers.append(checkpointer.step(loop.state))

        assert answers == [dckpt.Continue, dckpt.Continue, dckpt.Stop, dckpt.Stop, dckpt.Stop, dckpt.Stop]
        assert checkpointer.steps() == [3]
    assert "after the end" in caplog.text


def test_a_finished_run_that_is_started_again_keeps_its_last_checkpoint(tmp_path):
    loop = Loop(max_steps=2)
    with dckpt.Checkpointer(tmp_path / "run", signals=()) as checkpointer:
        checkpointer.resume(loop.state)
        for _ in range(2):
            loop.step()
            checkpointer.step(loop.state)
    again = Loop(max_steps=2)
    with dckpt.Checkpointer(tmp_path / "run", signals=()) as checkpointer:
        with pytest.raises(dckpt.ResumeRejectedError, match=r"1 critical finding; .*no work remains"):
            checkpointer.resume(again.state)
        assert again.progress.done, "a script that is started again can tell that the run is finished"
        with pytest.raises(dckpt.ConfigError, match=r"call checkpointer\.resume"):
            checkpointer.save(again.state)
        report = checkpointer.resume(again.state, policy=dckpt.ResumePolicy(allow=("work_remains",)))
        again.step()

        assert report is not None
        assert [finding.check for finding in report.warnings] == ["work_remains"]
        assert checkpointer.step(again.state) is dckpt.Stop
        assert checkpointer.steps() == [2]


def test_a_resume_without_the_optimizer_is_refused_and_a_load_of_the_model_alone_is_not(tmp_path):
    loop = Loop()
    _save_one(loop, tmp_path / "run")
    other = Loop()
    bare = dckpt.TrainState(model=other.model, progress=other.progress)
    with dckpt.Checkpointer(tmp_path / "run", signals=()) as checkpointer:
        with pytest.raises(dckpt.IncompatibleStateError, match="optim: in the checkpoint"):
            checkpointer.resume(bare)
        loaded = checkpointer.load(bare)

        assert loaded.skipped_parts == ("optim",)


@pytest.mark.parametrize("inside", ["step-0000000001.g0001", "generations"])
def test_a_part_of_a_run_is_refused_as_a_root(tmp_path, inside):
    loop = Loop()
    _save_one(loop, tmp_path / "run")

    with pytest.raises(dckpt.ConfigError, match="expected the directory of a run"):
        dckpt.Checkpointer(tmp_path / "run" / inside)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [({"save": 10}, r"dckpt\.Every"), ({"retention": 3}, r"dckpt\.Retention"), ({"root": None}, "path or URL")],
)
def test_arguments_of_the_wrong_kind_are_refused_at_once(tmp_path, arguments, told):
    with pytest.raises(dckpt.ConfigError, match=told):
        dckpt.Checkpointer(**{"root": tmp_path / "run", **arguments})


def test_keeping_the_best_by_a_metric_that_no_checkpoint_has_deletes_nothing(tmp_path, caplog):
    loop = Loop()
    policy = dckpt.Retention(best=dckpt.Best("val_loss"))
    with dckpt.Checkpointer(tmp_path / "run", retention=policy, signals=()) as checkpointer:
        checkpointer.resume(loop.state)
        for _ in range(3):
            loop.step()
            checkpointer.save(loop.state, blocking=True)
        checkpointer.close()

    assert len([p for p in (tmp_path / "run").iterdir() if p.name.startswith("step-")]) == 3
    assert "no checkpoint has the metric 'val_loss'" in caplog.text


def test_the_report_of_a_resume_reads_as_a_sentence(tmp_path):
    loop = Loop()
    _save_one(loop, tmp_path / "run")
    again = Loop()
    with dckpt.Checkpointer(tmp_path / "run", signals=()) as checkpointer:
        report = checkpointer.resume(again.state)

    assert str(report).startswith(
        "Resumed from step-0000000001.g0001: step 1, saved by 1 rank, loaded by 1; parts: model"
    )


@pytest.mark.parametrize(
    ("error", "blames"),
    [
        (dckpt.PeerFailedError("lost", rank=0), True),
        (dckpt.PeerFailedError("lost", rank=1), False),
        (dckpt.CoordinationTimeoutError("late", ranks=[0, 2]), True),
        (dckpt.CoordinationTimeoutError("late", ranks=[1]), False),
        (dckpt.StorageFullError("full"), False),
    ],
)
def test_a_loss_of_rank_0_is_told_by_the_ranks_that_are_left(error, blames):
    """Otherwise rank 0 alone speaks, and a dead one says nothing."""
    from dckpt.engine.failure_policy import blames_coordinator

    assert blames_coordinator(error) is blames


def test_a_rollback_continues_from_an_earlier_step_and_fences_whoever_does_not_load_it(tmp_path):
    root = tmp_path / "run"
    loop, weights = Loop(), {}
    with dckpt.Checkpointer(root, signals=(), on_save_error="raise") as checkpointer:
        checkpointer.resume(loop.state)
        for step in (1, 2, 3):
            loop.step()
            weights[step] = loop.model.weight.detach().clone()
            checkpointer.save(loop.state, blocking=True)

        assert checkpointer.rollback(2) == "step-0000000002.g0001"

        loop.step()
        with pytest.raises(dckpt.CommitConflictError, match="rollback"):
            checkpointer.save(loop.state, blocking=True)
        report = checkpointer.resume(loop.state)
        assert report is not None and loop.progress.step == 2
        assert torch.equal(loop.model.weight, weights[2])
        loop.step()
        assert torch.equal(loop.model.weight, weights[3])
        assert checkpointer.save(loop.state, blocking=True).outcome == "committed"

        assert checkpointer.steps() == [1, 2, 3]
    assert sorted(path.name for path in root.glob("step-*"))[2:] == ["step-0000000003.g0001", "step-0000000003.g0003"]
