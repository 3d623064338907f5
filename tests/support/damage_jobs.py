"""Jobs around damaged checkpoints: what a load says to each damage, and what a resume does about it."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

import dckpt
import dckpt.checkpointer
from dckpt.errors import DckptError
from dckpt.storage.local import LocalStorage
from dckpt.storage.posix import Posix
from tests.support.models import Kind, Run, digests

Flip = tuple[str, int, int]  # path, position, mask


class _Told(logging.Handler):
    """Collects what dckpt warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def warnings_of_dckpt() -> Iterator[list[str]]:
    """The lines that dckpt logs as warnings or errors meanwhile."""
    told = _Told()
    logging.getLogger("dckpt").addHandler(told)
    try:
        yield told.lines
    finally:
        logging.getLogger("dckpt").removeHandler(told)


@dataclass
class FaultyReads(Posix):
    """Reads of files whose name ends in `suffix` fail with EIO, or return one flipped byte for the first `times` reads.

    Reads around the page cache are never flipped: the medium is right.
    """

    suffix: str
    kind: str  # "eio" or "flip"
    times: int = 1
    hits: int = 0
    _names: dict[int, tuple[str, bool]] = field(default_factory=dict)

    def open(self, path: str, flags: int, *, dir_fd: int | None = None) -> int:
        fd = super().open(path, flags, dir_fd=dir_fd)
        self._names[fd] = (path, bool(flags & os.O_DIRECT))
        return fd

    def close(self, fd: int) -> None:
        self._names.pop(fd, None)
        super().close(fd)

    def pread_into(self, fd: int, target: memoryview, offset: int) -> int:
        return self._read(fd, [target], lambda: Posix.pread_into(self, fd, target, offset))

    def preadv(self, fd: int, targets: Sequence[memoryview], offset: int, *, flags: int = 0) -> int:
        return self._read(fd, targets, lambda: Posix.preadv(self, fd, targets, offset, flags=flags))

    def _read(self, fd: int, targets: Sequence[memoryview], read: Callable[[], int]) -> int:
        name, is_direct = self._names.get(fd, ("", False))
        is_hit = name.endswith(self.suffix) and not is_direct and self.hits < self.times
        if is_hit and self.kind == "eio":
            self.hits += 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        count = read()
        if is_hit and count:
            self.hits += 1
            middle = targets[len(targets) // 2]
            middle[len(middle) // 2] ^= 0x10
        return count


@contextmanager
def reads_through(posix: Posix | None) -> Iterator[None]:
    """Every `Checkpointer` made meanwhile makes its system calls through `posix`."""
    before = dckpt.checkpointer.open_storage
    if posix is not None:
        dckpt.checkpointer.open_storage = lambda url, **_: LocalStorage(url, posix)  # type: ignore[assignment]
    try:
        yield
    finally:
        dckpt.checkpointer.open_storage = before


def make_run(kind: Kind, rank: int, world_size: int, seed: int = 1) -> Run:
    """With a tensor of many checksum blocks, so that some damage is only met when live tensors are being filled."""
    run = Run(kind, rank, world_size, seed=seed)
    run.notes["big"] = seed * torch.arange(40_000, dtype=torch.float64)
    return run


def save_steps(rank: int, world_size: int, root: str, kind: Kind, steps: Sequence[int]) -> list[dict[str, str]]:
    """Trains and saves at each of `steps`; the digests of what was saved, by step in order."""
    run = make_run(kind, rank, world_size)
    found = []
    with dckpt.Checkpointer(root, deadline_s=30, signals=()) as checkpointer:
        checkpointer.resume(run.state)
        for step in steps:
            run.train(step - run.progress.step)
            pending = checkpointer.save(run.state, blocking=True)
            assert pending.outcome == "committed", pending.error
            found.append(digests(run.state))
    return found


def flip(path: str, position: int, mask: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ mask]))


def load_each_flip(rank: int, world_size: int, root: str, step: int, flips: Sequence[Flip]) -> list[str]:
    """Flips one byte at a time, loads and puts it back; what the load said: its error and its warnings."""
    run = make_run("single", rank, world_size)
    found = []
    with dckpt.Checkpointer(root, deadline_s=30, signals=()) as checkpointer:
        for path, position, mask in flips:
            flip(path, position, mask)
            with warnings_of_dckpt() as told:
                try:
                    checkpointer.load(run.state, step)
                    found.append("\n".join(told))
                except DckptError as error:
                    found.append("\n".join([f"{type(error).__name__}: {error}", *told]))
            flip(path, position, mask)
        checkpointer.load(run.state, step)  # Undamaged again, it loads, and nothing stays poisoned.
    return found


def load_and_tell(rank: int, world_size: int, root: str, step: int, kind: Kind = "single") -> str:
    """The error of one load, or an empty string."""
    run = make_run(kind, rank, world_size)
    with dckpt.Checkpointer(root, deadline_s=30, signals=()) as checkpointer:
        try:
            checkpointer.load(run.state, step)
        except DckptError as error:
            return f"{type(error).__name__}: {error}"
    return ""


@dataclass(frozen=True)
class Resumed:
    """What one rank saw of a resume and of the save after it."""

    error: str = ""
    report: dict[str, Any] | None = None
    digests: dict[str, str] | None = None
    checkpoint: str | None = None
    hits: int = 0
    warnings: tuple[str, ...] = ()
    is_poisoned: bool = False


def resume_with_faults(
    rank: int,
    world_size: int,
    root: str,
    kind: Kind,
    fault: tuple[str, str, int] | None = None,
    at_rank: int = 0,
    train: int = 0,
) -> Resumed:
    """Resumes, with faults in this rank's reads if it is `at_rank`; then trains `train` steps and saves, if any."""
    run = make_run(kind, rank, world_size, seed=7)
    posix = FaultyReads(*fault) if fault is not None and rank == at_rank else None
    with (
        reads_through(posix),
        warnings_of_dckpt() as told,
        dckpt.Checkpointer(root, deadline_s=30, signals=()) as checkpointer,
    ):
        hits = 0
        try:
            report = checkpointer.resume(run.state)
        except DckptError as error:
            hits = posix.hits if posix is not None else 0
            poisoned = False
            try:
                checkpointer.save(run.state, step=99)
            except dckpt.PoisonedStateError:
                poisoned = True
            except dckpt.ConfigError:
                pass  # Nothing was loaded, so nothing may be saved here.
            return Resumed(f"{type(error).__name__}: {error}", hits=hits, warnings=tuple(told), is_poisoned=poisoned)
        assert report is not None
        hits = posix.hits if posix is not None else 0
        state = digests(run.state)
        checkpoint = None
        if train:
            run.train(train)
            pending = checkpointer.save(run.state, blocking=True)
            assert pending.outcome == "committed", pending.error
            checkpoint = pending.checkpoint
        return Resumed("", report.to_json(), state, checkpoint, hits, tuple(told))
