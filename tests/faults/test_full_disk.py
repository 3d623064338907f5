"""A disk that is really full, really read-only or really gone: small file systems of our own, no injected errors."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dckpt
from dckpt import failpoint
from dckpt.catalog.prune import find_leftovers
from dckpt.storage.local import LocalStorage
from dckpt.tools.target import open_target
from dckpt.tools.verify_run import verify_target
from tests.faults.conftest import DiskMaker
from tests.support.crash_runs import SmallRun, open_checkpointer
from tests.support.loop_disk import MIB, LoopDisk, small_tmpfs

pytestmark = [pytest.mark.crash, pytest.mark.root]

DISK_BYTES = 8 * MIB

NEEDS_SPACE = (
    *("before_generation", "after_generation", "before_shard_write", "mid_shard_write", "after_shard_sync"),
    *("before_index", "before_manifest"),
)
"""Points after which a save still has to write something."""


@pytest.fixture(name="small", params=["tmpfs", "ext4"])
def _small(request: pytest.FixtureRequest) -> Iterator[Path]:
    """An empty file system of 8 MiB."""
    if request.param == "ext4":
        disk = request.getfixturevalue("small_ext4")
        yield disk.mount
        for entry in disk.mount.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        return
    request.getfixturevalue("needs_tmpfs")
    with small_tmpfs(DISK_BYTES) as mount:
        yield mount


@pytest.fixture(scope="module", name="small_ext4")
def _small_ext4(make_disk: DiskMaker) -> LoopDisk:
    # No blocks reserved for root: these tests are root.
    return make_disk("ext4", size=DISK_BYTES, mkfs=("-m", "0"))


@pytest.fixture(autouse=True)
def _disarm() -> Iterator[None]:
    yield
    failpoint.disarm()


class Ballast:
    """Fills a file system to the last byte, and empties it again."""

    def __init__(self, mount: Path) -> None:
        self._path = mount / "ballast"
        self.was_full = False

    def fill(self, *, leave: int = 0) -> None:
        """All space but `leave` bytes."""
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            for piece in (2**16, 2**12, 1):
                self._write_until_full(fd, bytes(piece))
            # What a file system still takes once it is full, it takes for the last time.
            os.fsync(fd)
            self.was_full = True
            os.truncate(fd, max(0, os.fstat(fd).st_size - leave))
            os.fsync(fd)
        finally:
            os.close(fd)

    def _write_until_full(self, fd: int, piece: bytes) -> None:
        with pytest.raises(OSError, match="No space left"):
            while True:
                os.write(fd, piece)

    def empty(self) -> None:
        self._path.unlink()


def assert_complete(root: Path, name: str | None) -> None:
    report = verify_target(open_target(f"{root}/{name}"))
    assert [found.verdict for found in report.checkpoints] == ["COMPLETE"]


def assert_failed(pending: dckpt.PendingSave, kind: type[Exception]) -> None:
    assert pending.outcome == "failed", (pending.outcome, pending.error)
    assert isinstance(pending.error, kind), pending.error


def assert_goes_on(run: SmallRun, checkpointer: dckpt.Checkpointer, root: Path) -> None:
    """Training was not disturbed; the next save commits, and nothing of the failed one is left."""
    run.train()
    pending = checkpointer.save(run.state, blocking=True)
    assert pending.outcome == "committed", pending.error
    assert_complete(root, pending.checkpoint)
    assert find_leftovers(LocalStorage(root), older_than_s=0, now_unix_s=1e12) == []
    assert checkpointer.steps()[-1] == run.step


def test_a_save_that_does_not_fit_fails_and_the_next_one_after_freeing_space_commits(small: Path):
    root = small / "run"
    run, ballast = SmallRun(bulk_bytes=MIB), Ballast(small)
    with open_checkpointer(str(root)) as checkpointer:
        checkpointer.resume(run.state)
        run.train()
        first = checkpointer.save(run.state, blocking=True)
        assert first.outcome == "committed", first.error
        ballast.fill(leave=MIB // 2)

        run.train()
        assert_failed(checkpointer.save(run.state, blocking=True), dckpt.StorageFullError)
        assert_complete(root, first.checkpoint)
        assert checkpointer.steps() == [1]

        ballast.empty()
        assert_goes_on(run, checkpointer, root)
        assert checkpointer.steps() == [1, 3]


@pytest.mark.parametrize("point", NEEDS_SPACE)
def test_a_disk_that_fills_up_during_a_save_fails_it_and_nothing_else(small: Path, point: str):
    """Full from this point on: when the generation, the shards, their sums, the index or the manifest is written."""
    root = small / "run"
    earlier = SmallRun()
    with open_checkpointer(str(root)) as checkpointer:
        checkpointer.resume(earlier.state)
        earlier.train()
        first = checkpointer.save(earlier.state, blocking=True)
    run, ballast = SmallRun(seed=2), Ballast(small)
    with open_checkpointer(str(root)) as checkpointer:
        assert checkpointer.resume(run.state) is not None
        run.train()
        failpoint.arm({point: ballast.fill})

        assert_failed(checkpointer.save(run.state, blocking=True), dckpt.StorageFullError)

        assert ballast.was_full
        failpoint.disarm()
        assert_complete(root, first.checkpoint)
        assert [item.name for item in find_leftovers(LocalStorage(root), older_than_s=0, now_unix_s=1e12)] == []
        ballast.empty()
        assert_goes_on(run, checkpointer, root)


@pytest.mark.parametrize("point", ["after_manifest", "before_rename"])
def test_a_disk_that_fills_up_after_the_last_write_does_not_hinder_the_commit(small: Path, point: str):
    root = small / "run"
    run, ballast = SmallRun(), Ballast(small)
    with open_checkpointer(str(root)) as checkpointer:
        checkpointer.resume(run.state)
        run.train()
        failpoint.arm({point: ballast.fill})

        pending = checkpointer.save(run.state, blocking=True)

        assert pending.outcome == "committed", pending.error
        assert ballast.was_full
    assert_complete(root, pending.checkpoint)


def test_a_run_that_cannot_begin_on_a_full_disk_begins_once_there_is_space(small: Path):
    root = small / "deep" / "run"
    run, ballast = SmallRun(), Ballast(small)
    ballast.fill()
    with open_checkpointer(str(root)) as checkpointer:
        assert checkpointer.resume(run.state) is None
        run.train()
        assert_failed(checkpointer.save(run.state, blocking=True), dckpt.StorageFullError)
        ballast.empty()
        assert_goes_on(run, checkpointer, root)


def test_deleting_old_checkpoints_works_on_a_full_disk(small: Path):
    """Retention is what frees the space, so it must not need any."""
    root = small / "run"
    run, ballast = SmallRun(), Ballast(small)
    with open_checkpointer(str(root), last=1) as checkpointer:
        checkpointer.resume(run.state)
        run.train()
        first = checkpointer.save(run.state, blocking=True)
        run.train()
        failpoint.arm({"before_prune": ballast.fill})
        second = checkpointer.save(run.state, blocking=True)
    assert second.outcome == "committed", second.error
    assert ballast.was_full
    assert not (root / str(first.checkpoint)).exists()
    assert_complete(root, second.checkpoint)


def test_a_disk_without_inodes_fails_a_save_like_a_full_one(needs_tmpfs: None):
    with small_tmpfs(DISK_BYTES, inodes=64) as mount:
        root = mount / "run"
        run = SmallRun()
        with open_checkpointer(str(root)) as checkpointer:
            checkpointer.resume(run.state)
            run.train()
            first = checkpointer.save(run.state, blocking=True)
            ballast = mount / "ballast"
            ballast.mkdir()
            with pytest.raises(OSError, match="No space left"):
                for number in range(64):
                    (ballast / str(number)).touch()
            run.train()
            assert_failed(checkpointer.save(run.state, blocking=True), dckpt.StorageFullError)
            assert_complete(root, first.checkpoint)
            shutil.rmtree(ballast)
            assert_goes_on(run, checkpointer, root)


def test_a_file_system_that_turns_read_only_fails_saves_until_it_is_writable_again(small_ext4: LoopDisk):
    root = small_ext4.mount / "read-only" / "run"
    run = SmallRun()
    with open_checkpointer(str(root)) as checkpointer:
        checkpointer.resume(run.state)
        run.train()
        first = checkpointer.save(run.state, blocking=True)
        small_ext4.remount("ro")
        try:
            run.train()
            assert_failed(checkpointer.save(run.state, blocking=True), dckpt.StorageReadOnlyError)
            assert_complete(root, first.checkpoint)
            loaded = SmallRun(seed=2)
            with open_checkpointer(str(root)) as reader:
                assert reader.resume(loaded.state) is not None
            assert loaded.step == 1
        finally:
            small_ext4.remount("rw")
        assert_goes_on(run, checkpointer, root)
    shutil.rmtree(root.parent)


@pytest.mark.parametrize(
    "point", ["before_shard_write", "mid_shard_write", "after_shard_sync", "before_index", "before_manifest"]
)
def test_a_run_directory_removed_during_a_save_fails_it(fast_path: Path, point: str):
    root = fast_path / "run"
    run = SmallRun()
    with open_checkpointer(str(root)) as checkpointer:
        checkpointer.resume(run.state)
        run.train()
        failpoint.arm({point: once(lambda: shutil.rmtree(root))})

        assert_failed(checkpointer.save(run.state, blocking=True), dckpt.StorageMissingError)

        assert failpoint.hits(point) == 1
        assert not root.exists()


@pytest.mark.parametrize("point", ["before_plan", "before_commit"])
def test_a_job_whose_run_was_removed_never_begins_a_second_history(fast_path: Path, point: str):
    """It is told so by an error, at this save and at the next: its record of the run is gone."""
    root = fast_path / "run"
    run = SmallRun()
    with open_checkpointer(str(root)) as checkpointer:
        checkpointer.resume(run.state)
        run.train()
        assert checkpointer.save(run.state, blocking=True).outcome == "committed"
        run.train()
        failpoint.arm({point: once(lambda: shutil.rmtree(root))})
        for _ in range(2):
            with pytest.raises(dckpt.CommitConflictError, match=r"expected the record that this job created"):
                checkpointer.save(run.state, blocking=True)
            run.train()
        assert failpoint.hits(point) >= 1
    assert not root.exists() or not any(root.iterdir())


def once(action: Callable[[], None]) -> Callable[[], None]:
    """Acts at the first pass only."""
    calls = iter([action])
    return lambda: next(calls, lambda: None)()
