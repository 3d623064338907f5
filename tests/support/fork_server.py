"""Children for crash tests: forked in milliseconds from a process that has imported torch once, with a single thread.

A child talks through a pipe, one JSON line per report, so that a line is either there or not when it is killed.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import select
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.support.loop_disk import shut_down
from tests.support.ranks import RankPool

_PR_SET_PDEATHSIG = 1
_CHILD_DEADLINE_S = 60.0


@dataclass(frozen=True)
class Ending:
    """How the outside ends a child: `delay_s` after its report `on` (or after it stopped itself, on="stopped").

    The power of the file system at `mount` is cut in `mode`, or it is only killed. After the cut the child runs on for
    `linger_s`, so that it can tell a lie if it wants to; then it is killed.
    """

    on: str
    delay_s: float = 0.0
    mount: str | None = None
    mode: int = 0
    linger_s: float = 0.0


@dataclass(frozen=True)
class Fate:
    """What became of a child. `exit_code` is negative for the signal that ended it, `ended_by_us` if it was ours."""

    exit_code: int
    reports: list[dict[str, Any]]
    was_stopped: bool
    ended_by_us: bool

    def all(self, kind: str) -> list[dict[str, Any]]:
        return [report for report in self.reports if report["kind"] == kind]

    def has(self, kind: str) -> bool:
        return bool(self.all(kind))

    def one(self, kind: str) -> dict[str, Any]:
        found = self.all(kind)
        assert len(found) == 1, f"expected one report {kind!r}: {self.describe()}"
        return found[0]

    def describe(self) -> str:
        return f"exit code {self.exit_code}, reports: " + "\n".join(map(str, self.reports))[-4000:]


class Child:
    """The child's end: who it is and how it reports."""

    def __init__(self, rank: int, world_size: int, rendezvous: str, pipe: int) -> None:
        self.rank, self.world_size, self.rendezvous = rank, world_size, rendezvous
        self._pipe = pipe
        self._sent: list[dict[str, Any]] = []

    def report(self, kind: str, **facts: Any) -> None:
        record = {"kind": kind, "at": time.monotonic(), **facts}
        self._sent.append(record)
        os.write(self._pipe, json.dumps(record).encode() + b"\n")

    def sent(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self._sent if record["kind"] == kind]


class ForkServer:
    """Runs module-level functions `program(child, *args)` in forked children, one or several ranks at a time."""

    def __init__(self) -> None:
        with pytest.MonkeyPatch.context() as environment:
            # A thread of NumPy's would be missing in the children; and peers that die make torch talkative.
            environment.setenv("OPENBLAS_NUM_THREADS", "1")
            environment.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
            self._pool = RankPool()
            self._pool.run(warm_up, 1, has_group=False)

    def run_ranks(
        self,
        program: Callable[..., None],
        world_size: int,
        *args: Any,
        ending: Ending | None = None,
        deadline_s: float = _CHILD_DEADLINE_S,
    ) -> list[Fate]:
        """The fates of all ranks, once all have ended."""
        where = (program.__module__, program.__name__)
        fates: list[Fate] = self._pool.run(
            run_children, 1, where, world_size, args, ending, deadline_s, has_group=False, deadline_s=deadline_s + 30
        )[0]
        return fates

    def run(self, program: Callable[..., None], *args: Any, ending: Ending | None = None) -> Fate:
        """The fate of one child."""
        return self.run_ranks(program, 1, *args, ending=ending)[0]

    def finish(self, program: Callable[..., None], *args: Any) -> Fate:
        """Like `run`, for a child that must end well."""
        fate = self.run(program, *args)
        assert fate.exit_code == 0, fate.describe()
        return fate

    def close(self) -> None:
        self._pool.close()


# --- in the server


def warm_up(rank: int, world_size: int) -> None:
    """Everything that is imported or built at first use is there before the first fork; no thread stays behind."""
    from tests.support.crash_runs import rehearse

    rehearse()
    _ensure_one_thread()


def _ensure_one_thread() -> None:
    deadline = time.monotonic() + 5
    while len(os.listdir("/proc/self/task")) > 1:
        assert time.monotonic() < deadline, "the fork server has more than one thread"
        time.sleep(0.01)


@dataclass
class _Live:
    pid: int
    pipe: int
    data: bytearray = field(default_factory=bytearray)
    is_open: bool = True
    was_stopped: bool = False
    ended_by_us: bool = False
    exit_code: int | None = None

    def reports(self) -> list[dict[str, Any]]:
        whole = bytes(self.data).rpartition(b"\n")[0]
        return [json.loads(line) for line in whole.split(b"\n") if line]


def run_children(
    rank: int,
    _: int,
    where: tuple[str, str],
    world_size: int,
    args: tuple[Any, ...],
    ending: Ending | None,
    deadline_s: float,
) -> list[Fate]:
    """Forks `world_size` children, ends them as told, and returns their fates; none outlives this call."""
    module, name = where
    program = getattr(importlib.import_module(module), name)
    _ensure_one_thread()
    with tempfile.TemporaryDirectory() as directory:
        rendezvous = os.path.join(directory, "rendezvous")
        children = [_fork(program, number, world_size, rendezvous, args) for number in range(world_size)]
        try:
            _follow(children, ending, time.monotonic() + deadline_s)
        finally:
            for child in children:
                _reap(child)
    return [Fate(child.exit_code or 0, child.reports(), child.was_stopped, child.ended_by_us) for child in children]


def _fork(program: Callable[..., None], rank: int, world_size: int, rendezvous: str, args: tuple[Any, ...]) -> _Live:
    reading, writing = os.pipe()
    server = os.getpid()
    pid = os.fork()
    if pid:
        os.close(writing)
        return _Live(pid, reading)
    status = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == server:
            os.close(reading)
            child = Child(rank, world_size, rendezvous, writing)
            try:
                program(child, *args)
                status = 0
            except BaseException:
                child.report("error", text=traceback.format_exc())
    finally:
        os._exit(status)


def _follow(children: list[_Live], ending: Ending | None, limit: float) -> None:
    """Reads reports until every child has ended; ends the first one as told when its moment comes."""
    due: float | None = None
    while any(child.exit_code is None for child in children):
        now = time.monotonic()
        assert now < limit, f"children did not end in time; their reports: {[child.reports() for child in children]}"
        if due is not None and now >= due:
            assert ending is not None
            _end(children[0], ending)
            due, ending = None, None
        pause = 0.05 if due is None else max(0.0, due - now)
        pipes = [child.pipe for child in children if child.is_open]
        for pipe in select.select(pipes, [], [], min(pause, 0.005))[0]:
            child = next(child for child in children if child.pipe == pipe)
            data = os.read(pipe, 65536)
            child.data += data
            child.is_open = bool(data)
        for child in children:
            _look(child)
        if ending is not None and due is None and _is_moment(children[0], ending):
            due = time.monotonic() + ending.delay_s


def _is_moment(child: _Live, ending: Ending) -> bool:
    if child.exit_code is not None:
        return False
    if ending.on == "stopped":
        return child.was_stopped
    return any(report["kind"] == ending.on for report in child.reports())


def _end(child: _Live, ending: Ending) -> None:
    if ending.mount is not None:
        shut_down(ending.mount, ending.mode)
        time.sleep(ending.linger_s)
    child.ended_by_us = child.exit_code is None
    if child.ended_by_us:
        os.kill(child.pid, signal.SIGKILL)


def _look(child: _Live) -> None:
    if child.exit_code is not None:
        return
    pid, status = os.waitpid(child.pid, os.WNOHANG | os.WUNTRACED)
    if pid == 0:
        return
    if os.WIFSTOPPED(status):
        child.was_stopped = True
    else:
        child.exit_code = os.waitstatus_to_exitcode(status)
        _drain(child)


def _drain(child: _Live) -> None:
    while child.is_open:
        data = os.read(child.pipe, 65536)
        child.data += data
        child.is_open = bool(data)


def _reap(child: _Live) -> None:
    if child.exit_code is None:
        os.kill(child.pid, signal.SIGKILL)
        child.exit_code = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
    os.close(child.pipe)
