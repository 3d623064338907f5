"""How a process with a Checkpointer ends: `python -m tests.support.lifecycle ROOT SCENARIO...`, alone or under torchrun.

Alone, each scenario runs in a child that is forked after the imports and ends as a process ends: through the interpreter's
own exit. Under torchrun each rank runs the one scenario itself. `ROOT/<scenario>` is the run; beside it lie a child's
stderr and what it reported.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import dckpt
from dckpt import failpoint
from tests.support.fault_jobs import SmallRun

SLOW_S = 0.4
SEED = 20  # of the moments at which `interrupt_anywhere` strikes
KEPT: list[Any] = []  # what a script holds in its module until the interpreter ends


class Scene:
    """One rank of one scenario."""

    def __init__(self, root: str, name: str) -> None:
        self.root, self.name = os.path.join(root, name), name
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self._report_path = f"{self.root}-{self.rank}.json"
        self._facts: dict[str, Any] = {}

    def report(self, **facts: Any) -> None:
        """Facts for the test; `at` is when the last of them was reported, on the clock that all processes share."""
        self._facts |= facts | {"at": time.monotonic(), "pid": os.getpid()}
        with open(f"{self._report_path}.new", "w") as file:
            json.dump(self._facts, file)
        os.replace(f"{self._report_path}.new", self._report_path)

    def open(self, **options: Any) -> tuple[dckpt.Checkpointer, SmallRun]:
        """A run with step 1 committed, at step 2."""
        run = SmallRun("plain")
        checkpointer = dckpt.Checkpointer(self.root, deadline_s=20.0, **options)
        checkpointer.resume(run.state)
        run.step()
        assert checkpointer.save(run.state, blocking=True).outcome == "committed"
        run.step()
        return checkpointer, run


def write_slowly() -> None:
    failpoint.arm({"before_shard_write": lambda: time.sleep(SLOW_S)})


def save_in_flight(scene: Scene, checkpointer: dckpt.Checkpointer, run: SmallRun) -> dckpt.PendingSave:
    write_slowly()
    pending = checkpointer.save(run.state)
    scene.report(done=pending.done)
    return pending


def close_in_flight(scene: Scene) -> None:
    checkpointer, run = scene.open()
    save_in_flight(scene, checkpointer, run)
    checkpointer.close()
    checkpointer.close()


def leave_the_block(scene: Scene) -> None:
    checkpointer, run = scene.open()
    with checkpointer:
        save_in_flight(scene, checkpointer, run)


def raise_in_the_loop(scene: Scene) -> None:
    checkpointer, run = scene.open()
    with checkpointer:
        save_in_flight(scene, checkpointer, run)
        raise ValueError("the loop's own error")


def raise_without_a_block(scene: Scene) -> None:
    checkpointer, run = scene.open()
    save_in_flight(scene, checkpointer, run)
    raise ValueError("the loop's own error")


def exit_without_close(scene: Scene) -> None:
    checkpointer, run = scene.open()
    save_in_flight(scene, checkpointer, run)


def exit_holding_it(scene: Scene) -> None:
    checkpointer, run = scene.open()
    KEPT.extend([checkpointer, run])
    save_in_flight(scene, checkpointer, run)


def sys_exit_in_the_block(scene: Scene) -> None:
    checkpointer, run = scene.open()
    with checkpointer:
        save_in_flight(scene, checkpointer, run)
        sys.exit(3)


def sys_exit_without_close(scene: Scene) -> None:
    checkpointer, run = scene.open()
    save_in_flight(scene, checkpointer, run)
    sys.exit(3)


def fail_at_the_end(scene: Scene) -> None:
    """The last save fails after the script has ended: only stderr can tell."""
    checkpointer, run = scene.open()

    def fail() -> None:
        time.sleep(SLOW_S)
        raise OSError(28, "No space left on device")

    failpoint.arm({"before_shard_write": fail})
    scene.report(done=checkpointer.save(run.state).done)


def interrupt_me(delay_s: float) -> None:
    threading.Timer(delay_s, lambda: os.kill(os.getpid(), signal.SIGINT)).start()


def interrupt_a_blocking_save(scene: Scene) -> None:
    checkpointer, run = scene.open()
    write_slowly()
    with checkpointer:
        scene.report(done=False)
        interrupt_me(SLOW_S / 2)
        checkpointer.save(run.state, blocking=True)


def interrupt_the_staging(scene: Scene) -> None:
    """Rank 0 (of two: rank 1) is interrupted while it copies."""
    checkpointer, run = scene.open()
    victim = dist.get_world_size() - 1 if dist.is_initialized() else 0
    with checkpointer:
        if scene.rank == victim:
            failpoint.arm({"before_stage": lambda: os.kill(os.getpid(), signal.SIGINT)})
        scene.report(done=False)
        pending = checkpointer.save(run.state)
        pending.wait(30)
        scene.report(outcome=pending.outcome, error=str(pending.error))


def interrupt_anywhere(scene: Scene) -> None:
    """Saves, interrupted at random moments; after each, close() must end at once and the next process goes on."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    draw, counts, slowest = random.Random(SEED), {"interrupted": 0, "finished": 0}, 0.0
    run = SmallRun("plain")
    for _ in range(100):
        checkpointer = dckpt.Checkpointer(scene.root, deadline_s=20.0, signals=())
        checkpointer.resume(run.state)
        torch.set_grad_enabled(True)  # an interrupt inside `no_grad().__exit__` of torch leaves it off
        run.step()
        try:
            signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.0001, 0.03))
            checkpointer.save(run.state, blocking=True)
            signal.setitimer(signal.ITIMER_REAL, 0)
            counts["finished"] += 1
        except KeyboardInterrupt:
            counts["interrupted"] += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        started = time.monotonic()
        checkpointer.close()
        slowest = max(slowest, time.monotonic() - started)
    scene.report(done=False, seed=SEED, slowest_close_s=slowest, **counts)


def stop_on_a_signal(scene: Scene) -> None:
    """Trains until told to stop; the test sends a signal to one rank."""
    run = SmallRun("plain")
    with dckpt.Checkpointer(scene.root, save=dckpt.Every(steps=100_000), deadline_s=20.0) as checkpointer:
        checkpointer.resume(run.state)
        scene.report(ready=True)
        for _ in range(20_000):
            run.step()
            dist.all_reduce(torch.ones(1))
            time.sleep(0.002)
            if checkpointer.step(run.state) is dckpt.Stop:
                scene.report(stopped_at=run.progress.step, steps=checkpointer.steps())
                return


def destroy_the_group_first(scene: Scene) -> None:
    checkpointer, run = scene.open()
    with checkpointer:
        save_in_flight(scene, checkpointer, run)
        dist.destroy_process_group()


def one_rank_raises(scene: Scene) -> None:
    """Rank 1 ends by an exception with a save in flight; rank 0 trains on and saves again."""
    checkpointer, run = scene.open(signals=())
    with checkpointer:
        pending = save_in_flight(scene, checkpointer, run)
        if scene.rank == 1:
            raise ValueError("the loop's own error")
        pending.wait(30)
        scene.report(first=pending.outcome)


def one_rank_leaves(scene: Scene) -> None:
    """Rank 1 ends without a word while rank 0 saves again."""
    checkpointer, run = scene.open(signals=())
    if scene.rank == 1:
        scene.report(done=True)
        sys.exit(0)
    checkpointer._deadline_s = checkpointer._coordination._deadline_s = 2.0
    with checkpointer:
        started = time.monotonic()
        pending = checkpointer.save(run.state, blocking=True)
        scene.report(outcome=pending.outcome, error=str(pending.error), seconds=time.monotonic() - started)


def run_scene(root: str, name: str) -> None:
    found: Callable[[Scene], None] = globals()[name]
    found(Scene(root, name))


def main() -> None:
    # Whoever starts the tests in the background hands down an ignored SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    root, *names = sys.argv[1:]
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        run_scene(root, names[0])
        return
    for name in names:
        child = os.fork()
        if child == 0:
            error_file = os.open(os.path.join(root, f"{name}.stderr"), os.O_WRONLY | os.O_CREAT)
            os.dup2(error_file, 2)
            run_scene(root, name)
            return
        ended = await_child(child)
        with open(os.path.join(root, f"{name}.exit"), "w") as file:
            json.dump({"code": ended, "at": time.monotonic()}, file)


def await_child(child: int) -> int | None:
    """The exit code (negative: a signal's number); None if it had to be killed."""
    limit = time.monotonic() + 40
    while time.monotonic() < limit:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


if __name__ == "__main__":
    main()
