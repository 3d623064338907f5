"""Small real training runs for crash tests: what a killed process does, and what its successor must find.

Each step is a function of the seed alone, so the state at every step is known beforehand, whoever trained it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import dckpt
from dckpt import checkpointer as checkpointer_module
from dckpt import failpoint
from dckpt.catalog.catalog import Catalog
from dckpt.catalog.prune import find_leftovers
from dckpt.storage.local import LocalStorage
from dckpt.storage.posix import Posix
from dckpt.tools.target import open_target
from dckpt.tools.verify_run import verify_target
from tests.support.fork_server import Child
from tests.support.models import digests

Facts = list[dict[str, Any]]
"""What was acknowledged, oldest first: reports of the kinds committed, pinned, unpinned."""

Careless = Literal["", "files", "directories"]


@dataclass(frozen=True)
class PointPlan:
    """Which rank meets its end where. `last`: how many checkpoints retention keeps, None for all."""

    point: str
    hit: int = 1
    victim: int = 0
    action: Literal["kill", "stop"] = "kill"
    last: int | None = 1
    careless: Careless = ""
    is_first_save: bool = False
    deadline_s: float = 30.0


DEADLINE_S = 30.0
BULK_BYTES = 256 * 2**10


class DataPosition:
    """Stands for a data loader."""

    def __init__(self) -> None:
        self.cursor = 0

    def state_dict(self) -> dict[str, int]:
        return {"cursor": self.cursor}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.cursor = state["cursor"]


class SmallRun:
    """A complete training state: model with dropout and a large buffer, AdamW, scheduler, data, progress."""

    def __init__(self, rank: int = 0, world_size: int = 1, *, seed: int = 1, bulk_bytes: int = BULK_BYTES) -> None:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(8, 17), nn.Dropout(0.1), nn.Linear(17, 8))
        # Moves at each step, so that a file of one step is never mistaken for that of another.
        self.model.register_buffer("bulk", torch.arange(bulk_bytes // 8))
        # Never moves: its file is taken over from checkpoint to checkpoint.
        self.model.register_parameter("frozen", nn.Parameter(torch.arange(64.0), requires_grad=False))
        if world_size > 1:
            fully_shard(self.model)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.01, foreach=False)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=3, gamma=0.9)
        self.data = DataPosition()
        self.progress = dckpt.TrainProgress(
            max_steps=10**6, batch=dckpt.Batch(micro=24 // world_size, data_parallel=world_size)
        )
        self.state = dckpt.TrainState(
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            data=self.data,
            progress=self.progress,
        )
        torch.manual_seed(1000 * seed + rank)

    @property
    def step(self) -> int:
        return self.progress.step

    def train(self, steps: int = 1) -> None:
        for _ in range(steps):
            loss = self.model(torch.randn(4, 8)).square().mean()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            with torch.no_grad():
                self.model.get_buffer("bulk").add_(1)
            self.data.cursor += 4
            self.progress.advance()

    def differences(self, reference: str, rank: int) -> list[str]:
        """What is not as the uninterrupted run has it at this step. A collective on several ranks."""
        found = digests(self.state)
        expected = json.loads(_reference_file(reference, rank, self.step).read_text())
        names = sorted(found.keys() | expected.keys())
        return [f"step {self.step}: {name} differs" for name in names if found.get(name) != expected.get(name)]


def rehearse() -> None:
    """Imports and builds everything that a run needs, in this process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(2):
            run = SmallRun()
            with dckpt.Checkpointer(directory, signals=()) as checkpointer:
                checkpointer.resume(run.state)
                run.train()
                checkpointer.save(run.state, blocking=True)
            digests(run.state)


# --- programs for the fork server


def compute_reference(child: Child, reference: str, steps: int) -> None:
    """Writes the digests of the state after each step of a run that nothing interrupts."""
    run = _start_run(child)
    for _ in range(steps):
        run.train()
        path = _reference_file(reference, child.rank, run.step)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(digests(run.state)))


def _reference_file(reference: str, rank: int, step: int) -> Path:
    return Path(reference) / f"rank{rank}" / f"{step}.json"


def commit_steps(child: Child, root: str, steps: int) -> None:
    """Resumes or starts, commits one checkpoint after each of `steps` steps, and ends well."""
    run = _start_run(child)
    with open_checkpointer(root) as checkpointer:
        checkpointer.resume(run.state)
        for _ in range(steps):
            train_and_commit(child, run, checkpointer)


def save_until_point(child: Child, root: str, plan: PointPlan) -> None:
    """Resumes and saves one more step; the victim meets its end when it passes the point for the nth time.

    Survivors report how their save ended, and go.
    """
    _forget_syncs(plan.careless)
    run = _start_run(child)
    checkpointer = open_checkpointer(root, last=plan.last, deadline_s=plan.deadline_s)
    if plan.is_first_save:
        assert checkpointer.resume(run.state) is None
    else:
        assert checkpointer.resume(run.state) is not None
    run.train()
    if child.rank == plan.victim:
        arm(child, plan)
    if train_and_commit(child, run, checkpointer, advance=0):
        checkpointer.close()


def count_points(child: Child, root: str) -> None:
    """Saves one more step untouched and reports how often this rank passed each point."""
    run = _start_run(child)
    with open_checkpointer(root, last=1) as checkpointer:
        checkpointer.resume(run.state)
        run.train()
        failpoint.arm({})
        train_and_commit(child, run, checkpointer, advance=0)
    child.report("points", hits={name: failpoint.hits(name) for name in failpoint.POINTS})


def save_until_cut(child: Child, root: str, last: int | None, careless: Careless) -> None:
    """Resumes or starts, says "ready", then trains and saves until somebody ends it."""
    _forget_syncs(careless)
    run = _start_run(child)
    checkpointer = open_checkpointer(root, last=last)
    checkpointer.resume(run.state)
    child.report("ready")
    for _ in range(50):
        train_and_commit(child, run, checkpointer)


def storm_trial(child: Child, root: str, reference: str, facts: Facts) -> None:
    """Examines what the killed predecessor left, resumes from it, says "ready" and saves on until it is killed too.

    Then a checkpoint of each step piles up; two commits later retention leaves one, and says "pruned".
    """
    child.report("start")
    storage = LocalStorage(root)
    problems, latest = look(root, facts, is_all_kept=False)
    remains = _leftovers(storage)
    run = SmallRun(seed=7)
    checkpointer = open_checkpointer(root)
    assert checkpointer.resume(run.state) is not None
    problems += run.differences(reference, 0)
    child.report("found", latest=latest, problems=problems, remains=remains)
    assert not problems, problems
    child.report("ready")
    train_and_commit(child, run, checkpointer)
    swept = set(remains) - set(_leftovers(storage))
    child.report("swept", left=sorted(set(remains) - swept))
    train_and_commit(child, run, checkpointer)
    checkpointer.close()
    checkpointer = open_checkpointer(root, last=1)
    checkpointer.resume(run.state)
    child.report("about to prune")
    train_and_commit(child, run, checkpointer)
    child.report("pruning")
    checkpointer.close()
    child.report("pruned", steps=checkpointer.steps())
    time.sleep(60)


def pin_and_wait(child: Child, root: str, wish: str, name: str) -> None:
    """Pins or unpins, says so, and waits for its end."""
    catalog = Catalog(LocalStorage(root))
    (catalog.pin if wish == "pinned" else catalog.unpin)(name)
    child.report(wish, name=name)
    time.sleep(60)


def examine(child: Child, root: str, reference: str, facts: Facts, is_all_kept: bool) -> None:
    """Reports everything that is not as promised, and the latest step that was found.

    The run is verified whole, compared with what was acknowledged, resumed, compared with the uninterrupted run,
    trained and saved again; after that nothing is left of the dead.
    """
    problems, latest = look(root, facts, is_all_kept=is_all_kept) if child.rank == 0 else ([], None)
    if latest is not None or child.rank > 0:
        problems += go_on(child, root, reference, latest)
    child.report("examined", latest=latest, problems=problems)


def examine_damaged(child: Child, root: str, facts: Facts) -> None:
    """Only looks: for runs that are expected to be broken."""
    problems, latest = look(root, facts, is_all_kept=True)
    child.report("examined", latest=latest, problems=problems)


def start_again(child: Child, root: str, reference: str, facts: Facts, is_all_kept: bool) -> None:
    """Like `examine`, for a run that was killed before its first commit: it starts again, and nothing is wrong."""
    problems, latest = look(root, facts, is_all_kept=is_all_kept)
    run = _start_run(child)
    with open_checkpointer(root) as checkpointer:
        assert checkpointer.resume(run.state) is None
        if not train_and_commit(child, run, checkpointer):
            problems.append("the next save did not commit")
        problems += run.differences(reference, child.rank)
    problems += look(root, [*facts, *child.sent("committed")], is_all_kept=True)[0]
    problems += [f"still there after the next commit: {name}" for name in _leftovers(LocalStorage(root))]
    child.report("examined", latest=latest, problems=problems)


class CarelessPosix(Posix):
    """A program that forgot its fsyncs: of files, or of directories."""

    def __init__(self, forgets: Careless) -> None:
        self._forgets = forgets

    def fsync(self, fd: int) -> None:
        kind = "directories" if os.path.isdir(f"/proc/self/fd/{fd}") else "files"
        if kind != self._forgets:
            super().fsync(fd)


def _forget_syncs(careless: Careless) -> None:
    if careless:
        checkpointer_module.open_storage = lambda url, **_: LocalStorage(url, CarelessPosix(careless))


def _start_run(child: Child, seed: int = 1) -> SmallRun:
    if child.world_size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{child.rendezvous}", rank=child.rank, world_size=child.world_size
        )
    return SmallRun(child.rank, child.world_size, seed=seed)


# --- what they are made of


def open_checkpointer(root: str, *, last: int | None = None, deadline_s: float = DEADLINE_S) -> dckpt.Checkpointer:
    return dckpt.Checkpointer(root, retention=dckpt.Retention(last=last), deadline_s=deadline_s, signals=())


def train_and_commit(child: Child, run: SmallRun, checkpointer: dckpt.Checkpointer, *, advance: int = 1) -> bool:
    """One more step, saved; reports the acknowledgement only when the save says so, and how it failed otherwise."""
    run.train(advance)
    child.report("saving", step=run.step)
    started = time.monotonic()
    pending = checkpointer.save(run.state, blocking=True)
    seconds = time.monotonic() - started
    if pending.outcome == "committed":
        child.report("committed", step=run.step, name=pending.checkpoint, seconds=seconds)
        return True
    error = type(pending.error).__name__
    child.report("not committed", outcome=pending.outcome, error=error, text=str(pending.error), seconds=seconds)
    return False


def arm(child: Child, plan: PointPlan) -> None:
    number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[plan.action]

    def act() -> None:
        if failpoint.hits(plan.point) == plan.hit:
            child.report("reached", point=plan.point, hit=plan.hit)
            # To this very thread: a stop that another thread is to handle lets this one run on for a moment.
            signal.pthread_kill(threading.get_ident(), number)

    failpoint.arm({plan.point: act})


def look(root: str, facts: Facts, *, is_all_kept: bool) -> tuple[list[str], int | None]:
    """What is wrong with the run as it lies there, and the latest step of its line."""
    acknowledged = {fact["name"]: fact["step"] for fact in facts if fact["kind"] == "committed"}
    storage = LocalStorage(root)
    catalog = Catalog(storage)
    present = {item.name for item in catalog.checkpoints()}
    if not present:
        return [f"acknowledged but lost: {sorted(acknowledged)}"] if acknowledged else [], None
    report = verify_target(open_target(root), is_all=True)
    problems = [f"{damage.file}: {damage.what}" for damage in report.run_damages]
    for found in report.checkpoints:
        problems += [f"{damage.file}: {damage.what}" for damage in found.damages]
        if found.verdict != "COMPLETE":
            problems.append(f"{found.checkpoint} is {found.verdict}")
    if is_all_kept:
        problems += [f"acknowledged but lost: {name}" for name in sorted(acknowledged.keys() - present)]
    try:
        latest = catalog.resolve("latest").step
    except dckpt.DckptError as error:
        return [*problems, str(error)], None
    if latest < max(acknowledged.values(), default=0):
        problems.append(f"latest is step {latest}, behind the acknowledged {max(acknowledged.values())}")
    for name in {fact["name"] for fact in facts if fact["kind"] in ("pinned", "unpinned")}:
        wish = [fact["kind"] for fact in facts if fact.get("name") == name and "pinned" in fact["kind"]][-1]
        if (name in catalog.pins()) != (wish == "pinned"):
            problems.append(f"acknowledged as {wish}, and it is not: {name}")
    return problems, latest


def go_on(child: Child, root: str, reference: str, latest: int | None) -> list[str]:
    """Resumes from what is there, trains and saves; what went otherwise than in an untouched run."""
    storage = LocalStorage(root)
    remains = _leftovers(storage) if child.rank == 0 else []
    run = _start_run(child, seed=7)
    with open_checkpointer(root) as checkpointer:
        assert checkpointer.resume(run.state) is not None
        problems = run.differences(reference, child.rank)
        if child.rank == 0 and run.step != latest:
            problems.append(f"resumed at step {run.step}, the latest is {latest}")
        if not train_and_commit(child, run, checkpointer):
            problems.append("the next save did not commit")
        problems += run.differences(reference, child.rank)
        steps = checkpointer.steps()
        if not steps or steps[-1] != run.step:
            problems.append(f"after the save of step {run.step}: steps {steps}")
    if child.rank == 0:
        child.report("remains", names=remains)
        problems += [f"still there after the next commit: {name}" for name in _leftovers(storage)]
        problems += [f"{found.checkpoint} is {found.verdict}" for found in _verify_latest(root)]
    return problems


def _verify_latest(root: str) -> list[Any]:
    report = verify_target(open_target(f"{root}@latest"))
    return [found for found in report.checkpoints if found.verdict != "COMPLETE"]


def _leftovers(storage: LocalStorage) -> list[str]:
    return [item.name for item in find_leftovers(storage, older_than_s=0, now_unix_s=time.time() + 10)]
