"""What the kernel keeps and counts for this process: page cache, bytes read and written, memory."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.world import World

READ_BYTES = 4 * 2**20
"""One read into the page cache."""


def files_of(directory: Path) -> Iterator[Path]:
    """Every regular file below the directory."""
    for parent, _, names in os.walk(directory):
        yield from (Path(parent, name) for name in sorted(names))


def forget(world: World, directory: Path) -> None:
    """Drops what the page cache of each node holds of the directory's files, after fsync: the state after a restart.

    posix_fadvise drops clean pages only, which is why each file is synced before.
    """
    world.barrier()
    if world.local_rank == 0:
        for path in files_of(directory):
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
    world.barrier()


def remember(world: World, directory: Path) -> None:
    """Has the page cache of each node hold the directory's files: a load that reads around the cache leaves none there."""
    world.barrier()
    if world.local_rank == 0:
        piece = bytearray(READ_BYTES)
        for path in files_of(directory):
            with path.open("rb", buffering=0) as file:
                while file.readinto(piece):
                    pass
    world.barrier()


def remove(world: World, directory: Path) -> None:
    """Removes the directory once no rank needs it."""
    world.on_rank_0(lambda: remove_tree(directory))


def remove_tree(directory: Path) -> None:
    """Removes the directory, and waits until its file system has noted that; it may be gone already."""
    shutil.rmtree(directory, ignore_errors=True)
    if directory.parent.exists():
        sync_directory(directory.parent)


def sync_directory(directory: Path) -> None:
    """The directory's own entries are on the medium."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_file(path: Path) -> None:
    """The file's bytes are on the medium."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@dataclass(frozen=True, slots=True)
class Counted:
    """What this process moved. read_bytes: through read calls, from cache or medium. device_bytes: from the medium."""

    read_bytes: int
    device_bytes: int
    written_bytes: int


def counters() -> Counted:
    """The kernel's counters of this process, all its threads included; mapped files are not in `read_bytes`."""
    fields = {}
    with open("/proc/self/io", encoding="utf-8") as file:
        for line in file:
            name, _, value = line.partition(":")
            fields[name] = int(value)
    return Counted(fields["rchar"], fields["read_bytes"], fields["write_bytes"])


def counted(work: Callable[[], Any]) -> Counted:
    """What this process moved while `work` ran."""
    before = counters()
    work()
    after = counters()
    return Counted(
        after.read_bytes - before.read_bytes,
        after.device_bytes - before.device_bytes,
        after.written_bytes - before.written_bytes,
    )


def resident_bytes() -> int:
    """The memory of this process that is in RAM, shared memory included."""
    return _status("VmRSS")


def give_back_free_memory() -> None:
    """Returns to the kernel what the C library holds of freed memory, so that nobody's need hides in it."""
    ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> None:
    """Begins a new peak at the present size."""
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
        file.write("5")


def peak_bytes() -> int:
    """The largest `resident_bytes` since `reset_peak`, by the kernel: no sample can miss it."""
    return _status("VmHWM")


def _status(name: str) -> int:
    with open("/proc/self/status", encoding="utf-8") as file:
        for line in file:
            key, _, value = line.partition(":")
            if key == name:
                return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")
