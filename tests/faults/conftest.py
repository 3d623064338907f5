"""What the crash campaigns share: a fork server, the uninterrupted run, disks whose power can be cut, the seed."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.crash_runs import compute_reference
from tests.support.fork_server import ForkServer
from tests.support.loop_disk import LoopDisk, fast_directory, why_not_loop, why_not_tmpfs

REFERENCE_STEPS = 150


@pytest.fixture(scope="session", name="server")
def _server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="session", name="reference")
def _reference(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The directory with the states of the single process that nothing interrupts."""
    directory = str(tmp_path_factory.mktemp("reference"))
    server.finish(compute_reference, directory, REFERENCE_STEPS)
    return directory


@pytest.fixture(scope="session", name="reference_of_two")
def _reference_of_two(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same for two ranks."""
    directory = str(tmp_path_factory.mktemp("reference"))
    fates = server.run_ranks(compute_reference, 2, directory, 10)
    assert [fate.exit_code for fate in fates] == [0, 0], [fate.describe() for fate in fates]
    return directory


@contextlib.contextmanager
def _fast_directory() -> Iterator[Path]:
    directory = tempfile.mkdtemp(prefix="dckpt-run-", dir=fast_directory())
    try:
        yield Path(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(name="fast_path")
def _fast_path() -> Iterator[Path]:
    """A directory in memory where there is one: a process that dies leaves the page cache alone."""
    with _fast_directory() as directory:
        yield directory


@pytest.fixture(scope="module", name="module_path")
def _module_path() -> Iterator[Path]:
    """The same for a whole module."""
    with _fast_directory() as directory:
        yield directory


@pytest.fixture(name="rng")
def _rng(request: pytest.FixtureRequest) -> random.Random:
    """Seeded from DCKPT_FAULT_SEED, else at random; the seed is printed, and shown when the test fails."""
    seed = int(os.environ.get("DCKPT_FAULT_SEED") or random.SystemRandom().randrange(2**32))
    print(f"{request.node.name}: DCKPT_FAULT_SEED={seed}")
    return random.Random(seed)


@pytest.fixture(scope="session", name="scale")
def _scale() -> int:
    """DCKPT_FAULT_SCALE multiplies the trials of the long campaigns."""
    return int(os.environ.get("DCKPT_FAULT_SCALE") or 1)


DiskMaker = Callable[..., LoopDisk]


@pytest.fixture(scope="module", name="make_disk")
def _make_disk() -> Iterator[DiskMaker]:
    """Mounts file systems on loop devices, and takes every one of them away at the end."""
    disks: list[LoopDisk] = []

    def make(kind: str, **options: object) -> LoopDisk:
        if (reason := why_not_loop(kind)) is not None:
            skip_or_fail("loop" if kind == "ext4" else kind, reason)
        disks.append(LoopDisk(kind, **options))  # type: ignore[arg-type]
        return disks[-1]

    try:
        yield make
    finally:
        for disk in disks:
            disk.close()


@pytest.fixture(scope="session", name="needs_tmpfs")
def _needs_tmpfs() -> None:
    if (reason := why_not_tmpfs()) is not None:
        skip_or_fail("loop", reason)


def skip_or_fail(method: str, reason: str) -> None:
    """Skips with the reason, or fails where DCKPT_REQUIRE_FAULTS names the method: a skip is never a pass."""
    text = f"{method}: {reason}; tests/faults/test_commit_enumeration.py runs all the same"
    if method in (os.environ.get("DCKPT_REQUIRE_FAULTS") or "").split(","):
        pytest.fail(f"DCKPT_REQUIRE_FAULTS asks for it: {text}")
    pytest.skip(text)
