"""Jobs in which one rank fails, dies, stands still or leaves a call out; each rank returns what it saw of every save."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import dckpt
from dckpt import failpoint
from tests.support.recording import FailingPosix

Layout = Literal["plain", "fsdp"]
Seen = dict[str, Any]

PHASE_POINTS = {"plan": "before_plan", "stage": "before_stage", "write": "mid_shard_write", "commit": "before_commit"}


class SmallRun:
    """A model with moments that trains in microseconds; `step` works on every rank, with a collective when sharded."""

    def __init__(
        self,
        layout: Layout,
        *,
        seed: int = 0,
        max_steps: int | None = None,
        width: int = 48,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if dist.is_initialized():
            dist.barrier()  # a fresh process imports for seconds: that is not to count against any deadline
        torch.manual_seed(seed)
        self.model: nn.Module = nn.Sequential(nn.Linear(width, width), nn.Linear(width, 7)).to(dtype)
        if layout == "fsdp":
            fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, foreach=False)
        self.progress = dckpt.TrainProgress(max_steps=max_steps)
        self.state = dckpt.TrainState(model=self.model, optimizer=self.optimizer, progress=self.progress)
        self.width = width

    def step(self) -> None:
        loss = self.model(torch.ones(2, self.width)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.progress.advance(loss=loss.detach())


def observe(save: Callable[[], dckpt.PendingSave]) -> Seen:
    """The outcome of one save on this rank, or the error that it raised, and the seconds until it was known."""
    started = time.monotonic()
    seen: Seen = {"outcome": None, "type": None, "message": None, "raised": False, "checkpoint": None}
    try:
        pending = save()
        pending.wait(60)
        error = pending.error
        seen |= {"outcome": pending.outcome, "checkpoint": pending.checkpoint}
    except dckpt.DckptError as raised:
        error = raised
        seen["raised"] = True
    if error is not None:
        seen |= {"type": type(error).__name__, "message": str(error), "fields": error.fields()}
    seen["seconds"] = time.monotonic() - started
    return seen


def start(root: str, run: SmallRun, deadline_s: float, **options: Any) -> dckpt.Checkpointer:
    """A run with one checkpoint. Its deadline is short only from here on: connecting and importing may take long."""
    checkpointer = dckpt.Checkpointer(root, deadline_s=60.0, signals=(), **options)
    checkpointer.resume(run.state)
    run.step()
    assert checkpointer.save(run.state, blocking=True).outcome == "committed"
    checkpointer._deadline_s = checkpointer._coordination._deadline_s = deadline_s
    return checkpointer


def collective_works(world_size: int) -> bool:
    total = torch.ones(1)
    dist.all_reduce(total)
    return total.item() == world_size


def end_with(number: signal.Signals) -> Callable[[], None]:
    """Kills or stops this process, a moment later: the others have then come out of the phase before."""

    def act() -> None:
        time.sleep(0.3)
        os.kill(os.getpid(), number)

    return act


@contextmanager
def fault(checkpointer: dckpt.Checkpointer, phase: str, kind: str) -> Iterator[Callable[[], int]]:
    """Arms one failure on this rank and puts all back afterwards; the value tells how often it struck.

    kind: "EIO" or "ENOSPC" of a system call of this rank in the phases write and commit, of the point in plan and stage.
    """
    code = getattr(errno, kind)
    storage: Any = checkpointer._storage
    healthy = storage._posix
    calls = {
        ("write", "EIO"): "fsync",
        ("write", "ENOSPC"): "write",
        ("commit", "EIO"): "fsync",
        ("commit", "ENOSPC"): "rename",
    }
    call = calls.get((phase, kind))
    if call is None:

        def fail() -> None:
            raise OSError(code, os.strerror(code))

        point = PHASE_POINTS[phase]
        failpoint.arm({point: fail})
        try:
            yield lambda: failpoint.hits(point)
        finally:
            failpoint.disarm()
        return
    failing = FailingPosix(kind=call, errno=code, at=1)

    def strike() -> None:
        storage._posix = failing

    # In the commit only what the coordinator does after all ranks have written is to fail.
    failpoint.arm({"before_index" if phase == "commit" else "before_shard_write": strike})
    try:
        yield lambda: failing.num_failed
    finally:
        failpoint.disarm()
        storage._posix = healthy


def break_writes(checkpointer: dckpt.Checkpointer, count: int = 1) -> FailingPosix:
    """The next `count` saves meet a full disk in their first write."""
    storage: Any = checkpointer._storage
    healthy = storage._posix
    failing = FailingPosix(kind="write", errno=errno.ENOSPC, at=1)
    left = [count]

    def strike() -> None:
        failing.num_calls = 0
        storage._posix = failing if left[0] > 0 else healthy
        left[0] -= 1

    failpoint.arm({"before_shard_write": strike, "before_plan": lambda: setattr(storage, "_posix", healthy)})
    return failing


def fail_in_turn(
    rank: int, world_size: int, root: str, layout: Layout, cases: list[tuple[str, str, int]], deadline_s: float
) -> list[Seen]:
    """A good save, then for each (phase, kind, failing rank) a save that fails, a collective, and a save that commits."""
    run = SmallRun(layout)
    found = []
    with start(root, run, deadline_s, give_up_after=2) as checkpointer:
        for phase, kind, at_rank in cases:
            run.step()
            if rank == at_rank:
                with fault(checkpointer, phase, kind) as struck:
                    seen = observe(lambda: checkpointer.save(run.state))
                    seen["struck"] = struck()
            else:
                seen = observe(lambda: checkpointer.save(run.state))
            seen |= {"step": run.progress.step, "collective": collective_works(world_size)}
            seen["steps"] = checkpointer.steps()
            dist.barrier()
            seen["names"] = sorted(name for name in os.listdir(root) if not name.startswith("step-"))
            run.step()
            seen["next"] = checkpointer.save(run.state, blocking=True).outcome
            found.append(seen)
    return found


def die_in_a_save(
    rank: int, world_size: int, root: str, phase: str, victim: int, deadline_s: float, moment: str | None = None
) -> Seen:
    """A good save of step 1, then the victim is killed in the middle of the save of step 2."""
    run = SmallRun("plain")
    pids: list[int] = [0] * world_size
    dist.all_gather_object(pids, os.getpid())
    checkpointer = start(root, run, deadline_s)
    run.step()
    point = moment or PHASE_POINTS[phase]
    if phase == "commit" and victim != 0 and rank == 0:
        # Once the coordinator has everything, the victim has nothing left to do but wait for the conclusion.
        failpoint.arm({point: lambda: os.kill(pids[victim], signal.SIGKILL)})
    elif rank == victim and (phase != "commit" or victim == 0):
        failpoint.arm({point: end_with(signal.SIGKILL)})
    try:
        seen = observe(lambda: checkpointer.save(run.state))
    finally:
        failpoint.disarm()
    started = time.monotonic()
    checkpointer.close()
    return seen | {"close_s": time.monotonic() - started}


def stop_in_turn(
    rank: int, world_size: int, root: str, cases: list[tuple[str, int]], signals: str, deadline_s: float
) -> list[Seen]:
    """For each (phase, victim) a save in which the victim stops itself until the test continues it; then a good save."""
    run = SmallRun("plain")
    found = []
    with start(root, run, deadline_s, give_up_after=2) as checkpointer:
        for number, (phase, victim) in enumerate(cases):
            run.step()
            if rank == victim:
                failpoint.arm({PHASE_POINTS[phase]: end_with(signal.SIGSTOP)})
            seen = observe(lambda: checkpointer.save(run.state))
            failpoint.disarm()
            with open(os.path.join(signals, f"{number}-{rank}"), "w"):
                pass  # tells the test that this rank waits no more
            seen |= {"step": run.progress.step, "collective": collective_works(world_size)}
            seen["steps"] = checkpointer.steps()
            run.step()
            seen["next"] = observe(lambda: checkpointer.save(run.state))
            found.append(seen)
    return found


def leave_a_save_out(
    rank: int, world_size: int, root: str, absent: list[int], deadline_s: float, calls: int = 1
) -> dict[str, Any]:
    """Some ranks do not call save(step=100) (and as many later ones as `calls` says); then every rank saves step 200."""
    run = SmallRun("plain")
    with start(root, run, deadline_s, give_up_after=9) as checkpointer:
        seen = []
        for number in range(calls):
            run.step()
            if rank not in absent:
                seen.append(observe(lambda step=100 + number: checkpointer.save(run.state, step=step)))
        works = collective_works(world_size)
        run.step()
        after = observe(lambda: checkpointer.save(run.state, step=200))
        return {"seen": seen, "collective": works, "after": after, "steps": checkpointer.steps()}


def disagree(rank: int, world_size: int, root: str, about: str, deadline_s: float) -> dict[str, Any]:
    """The last rank differs from the others in one thing; then all agree again and save."""
    odd = rank == world_size - 1
    # Sharded: what plain tensors hold may differ by rank, and is then kept for each rank.
    dtype = torch.float64 if odd and about == "dtype" else torch.float32
    run = SmallRun("fsdp", width=50 if odd and about == "shape" else 48, dtype=dtype)
    step = 11 if odd and about == "step" else 10
    if odd and about == "values":
        run.state.extra["notes"] = object()
    with dckpt.Checkpointer(root, deadline_s=deadline_s, signals=()) as checkpointer:
        checkpointer.resume(run.state)
        if about == "optimizer":
            assert checkpointer.save(run.state, step=10, blocking=True).outcome == "committed"
            run.step()
            step = 10 if odd else 11
        seen = observe(lambda: checkpointer.save(run.state, step=step))
        works = collective_works(world_size)
        good = SmallRun("fsdp")
        after = observe(lambda: checkpointer.save(good.state, step=20))
        return {"seen": seen, "collective": works, "after": after, "steps": checkpointer.steps()}


def skip_when_busy(rank: int, world_size: int, root: str) -> list[int]:
    """The last rank writes the save of step 2 slowly; step 3 comes due meanwhile. Returns the steps that were saved."""
    run = SmallRun("plain")
    every = dckpt.Every(steps=1)
    with dckpt.Checkpointer(root, save=every, when_busy="skip", deadline_s=60.0, signals=()) as checkpointer:
        checkpointer.resume(run.state)
        for number in range(1, 5):
            slow = number == 2 and rank == world_size - 1
            failpoint.arm({"before_shard_write": (lambda: time.sleep(0.7)) if slow else (lambda: None)})
            run.step()
            checkpointer.step(run.state)
            if number != 2:
                checkpointer.wait()
        failpoint.disarm()
        return checkpointer.steps()


def count_calls(checkpointer: dckpt.Checkpointer) -> Callable[[], int]:
    """Counts the round trips to the store from now on."""
    link: Any = checkpointer._coordination._link
    number = [0]
    call = link.call

    def counted(*args: Any, **options: Any) -> Any:
        number[0] += 1
        return call(*args, **options)

    link.call = counted
    return lambda: number[0]


def count_step_costs(rank: int, world_size: int, root: str, steps: int) -> tuple[int, float]:
    """Store calls and seconds for many steps in which nothing is due."""
    run = SmallRun("plain")
    with dckpt.Checkpointer(root, save=dckpt.Every(minutes=60), deadline_s=60.0, signals=()) as checkpointer:
        checkpointer.resume(run.state)
        calls = count_calls(checkpointer)
        started = time.monotonic()
        for _ in range(steps):
            run.progress.advance()
            checkpointer.step(run.state)
        return calls(), time.monotonic() - started


def stop_by_signal(rank: int, world_size: int, root: str, victim: int) -> tuple[int, list[int]]:
    """The victim gets a signal at step 4. Returns the step at which this rank was told to stop, and what is committed."""
    run = SmallRun("plain")
    with dckpt.Checkpointer(root, deadline_s=60.0, signals=(signal.SIGUSR1,)) as checkpointer:
        checkpointer.resume(run.state)
        for number in range(1, 400):
            run.step()
            if number == 4 and rank == victim:
                os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.002 * (rank + 1))
            if checkpointer.step(run.state) is dckpt.Stop:
                return run.progress.step, checkpointer.steps()
    raise AssertionError("never told to stop")
