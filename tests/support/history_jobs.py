"""Jobs about a run's history: several jobs on one run, zombies, older steps loaded again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

import dckpt
from dckpt import failpoint
from dckpt.errors import DckptError
from tests.support.damage_jobs import make_run, warnings_of_dckpt
from tests.support.models import Kind, digests


class Small:
    """A training run that takes milliseconds; its weights say which steps they have seen."""

    def __init__(self, mark: float = 1.0) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.progress = dckpt.TrainProgress(max_steps=1000, batch=dckpt.Batch(micro=1, accumulation=1, data_parallel=1))
        self.mark = mark
        self.state = dckpt.TrainState(model=self.model, optimizer=self.optimizer, progress=self.progress)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            (self.mark * self.model(torch.ones(1, 3)).sum()).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.progress.advance(loss=1.0)

    @property
    def weight(self) -> list[float]:
        return [float(value) for value in self.model.weight.detach().flatten()]


def open_run(root: str, **options: Any) -> dckpt.Checkpointer:
    return dckpt.Checkpointer(root, deadline_s=20, signals=(), **options)


def committed(checkpointer: dckpt.Checkpointer, run: Any, **options: Any) -> str:
    """Saves, and the name that was committed."""
    pending = checkpointer.save(run.state, blocking=True, **options)
    assert pending.outcome == "committed", pending.error
    assert pending.checkpoint is not None
    return pending.checkpoint


def save_small(rank: int, world_size: int, root: str, steps: list[int]) -> list[float]:
    """A run of its own with a checkpoint at each step; the last weights."""
    run = Small()
    with open_run(root) as checkpointer:
        checkpointer.resume(run.state)
        for step in steps:
            run.train(step - run.progress.step)
            committed(checkpointer, run)
    return run.weight


def resume_small(rank: int, world_size: int, root: str) -> tuple[int | None, list[str]]:
    """The step that a new job resumes from (None: a new run), and what was announced."""
    with warnings_of_dckpt() as told, open_run(root) as checkpointer:
        report = checkpointer.resume(Small().state)
    return (None if report is None else report.step), told


def resume_and_save(rank: int, world_size: int, root: str, train: int) -> tuple[str, str]:
    """What a new job that resumes and trains on commits, and the error of `resume` if there is one."""
    run = Small()
    with open_run(root) as checkpointer:
        try:
            checkpointer.resume(run.state)
        except DckptError as error:
            return "", f"{type(error).__name__}: {error}"
        run.train(train)
        return committed(checkpointer, run), ""


def retrain(
    rank: int, world_size: int, root: str, kind: Kind, train: int, step: int | None = None
) -> tuple[str, dict[str, str], list[int]]:
    """Resumes (or loads `step`), trains on, saves: the name, the digests, and the steps of the line."""
    run = make_run(kind, rank, world_size, seed=5)
    with open_run(root) as checkpointer:
        if step is None:
            checkpointer.resume(run.state)
        else:
            checkpointer.load(run.state, step)
        run.train(train)
        name = committed(checkpointer, run)
        return name, digests(run.state), checkpointer.steps()


def digests_of(rank: int, world_size: int, root: str, kind: Kind, which: int | str) -> dict[str, str]:
    """The digests of one checkpoint, loaded by step or by name."""
    run = make_run(kind, rank, world_size, seed=6)
    with open_run(root) as checkpointer:
        checkpointer.load(run.state, which)
        return digests(run.state)


def two_jobs(rank: int, world_size: int, root: str, first: str, is_new: bool) -> dict[str, str]:
    """Jobs "a" and "b" start on the same run; `first` commits first; then the other one tries; then it resumes anew."""
    if not is_new:
        save_small(rank, world_size, root, [1])
    runs = {"a": Small(), "b": Small(2.0)}
    jobs = {name: open_run(root) for name in runs}
    found = {}
    for name, job in jobs.items():
        job.resume(runs[name].state)
        runs[name].train(1)
    second = "b" if first == "a" else "a"
    found["first"] = committed(jobs[first], runs[first])
    found["second"] = _refused(lambda: jobs[second].save(runs[second].state, blocking=True))
    report = jobs[second].resume(runs[second].state)
    found["resumed from"] = str(report.loaded.checkpoint) if report else ""
    runs[second].train(1)
    found["second again"] = committed(jobs[second], runs[second])
    runs[first].train(1)
    found["first again"] = _refused(lambda: jobs[first].save(runs[first].state, blocking=True))
    for job in jobs.values():
        job.close()
    return found


def _refused(call: Callable[[], Any]) -> str:
    try:
        call()
    except DckptError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


class _Hold:
    """Stops the first saving thread at a failpoint until it is released."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.released = threading.Event()

    def __call__(self) -> None:
        if not self.reached.is_set():
            self.reached.set()
            assert self.released.wait(30), "the zombie was never woken"


def zombie(rank: int, world_size: int, root: str, point: str, wakes: str) -> Mapping[str, Any]:
    """A job hangs at `point` of its save of step 3; a new job takes the run over and commits step 2.

    wakes: "late" when the new job has committed; "between" when it has created its generation and not yet swept.
    """
    old, new, hold = Small(), Small(2.0), _Hold()
    found: dict[str, Any] = {}
    zombie_job = open_run(root)
    zombie_job.resume(old.state)
    old.train(1)
    committed(zombie_job, old)
    old.train(2)
    actions: dict[str, Callable[[], None]] = {point: hold}
    failpoint.arm(actions)
    try:
        pending = zombie_job.save(old.state)
        assert hold.reached.wait(30), "the zombie did not come to the failpoint"

        def wake() -> None:
            hold.released.set()
            pending.wait(30)

        if wakes == "between":
            failpoint.arm({point: lambda: None, "after_generation": wake})
        with open_run(root) as new_job:
            report = new_job.resume(new.state)
            assert report is not None
            found["resumed"] = report.step
            new.train(1)
            found["new"] = committed(new_job, new)
            wake()
            found["outcome"], found["error"] = pending.outcome, f"{type(pending.error).__name__}: {pending.error}"
            old.train(1)
            found["next save of the zombie"] = _refused(lambda: zombie_job.save(old.state, blocking=True))
            found["steps"] = new_job.steps()
    finally:
        failpoint.disarm()
    try:
        zombie_job.close()
    except DckptError as error:
        found["close"] = str(error)
    last = Small()
    with open_run(root) as third:
        report = third.resume(last.state)
        assert report is not None
        found["latest"] = report.loaded.checkpoint
    found["is the new job's"] = last.weight == new.weight
    return found


def keep(
    rank: int, world_size: int, root: str, retention: dckpt.Retention, losses: list[float], pinned: list[int]
) -> None:
    """Resumes, saves a step for each loss and pins some of them at once. Deleting ends before `close` returns."""
    run = Small()
    with open_run(root, retention=retention) as checkpointer:
        checkpointer.resume(run.state)
        for loss in losses:
            run.train(1)
            committed(checkpointer, run, metrics={"val_loss": loss})
            if run.progress.step in pinned:
                checkpointer.pin("latest")


def unpin(rank: int, world_size: int, root: str, step: int) -> str:
    """Takes a pin away."""
    with open_run(root) as checkpointer:
        return checkpointer.unpin(step)


def rewind_with_retention(rank: int, world_size: int, root: str) -> None:
    """Loads step 2 of 4 and goes on with `last=1`."""
    save_small(rank, world_size, root, [1, 2, 3, 4])
    run = Small(3.0)
    with open_run(root, retention=dckpt.Retention(last=1)) as checkpointer:
        checkpointer.load(run.state, 2)
        for _ in range(2):
            run.train(1)
            committed(checkpointer, run)
