"""File systems of their own for fault tests: on loop devices whose power can be cut, and small ones that fill up."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import re
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32): EXT4_IOC_SHUTDOWN, XFS_IOC_GOINGDOWN

LOGFLUSH = 1  # the journal reaches the disk, file data does not
NOLOGFLUSH = 2  # nothing more reaches the disk

MIB = 2**20
_SIZES = {"ext4": 64 * MIB, "xfs": 320 * MIB}  # mkfs.xfs refuses less than 300 MiB


class UnavailableError(Exception):
    """This machine cannot do it; the message says which operation was refused."""


def shut_down(mount: str, mode: int) -> None:
    """Cuts the power of the file system at `mount`: what is not on its device by the rules of `mode` is lost."""
    fd = os.open(mount, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", mode))
    finally:
        os.close(fd)


class LoopDisk:
    """A file system in an image file, mounted at `mount`. `close` takes mount, loop device and image away again."""

    def __init__(self, kind: str, *, size: int | None = None, mkfs: tuple[str, ...] = (), options: str = "") -> None:
        self.kind = kind
        self._options = options
        self._base = Path(tempfile.mkdtemp(prefix=f"dckpt-{kind}-", dir=fast_directory()))
        self._device: str | None = None
        self._is_mounted = False
        self.mount = self._base / "mount"
        self.num_cuts = 0
        try:
            self.mount.mkdir()
            image = self._base / "image"
            with image.open("wb") as file:
                file.truncate(size or _SIZES[kind])
            if not has_mkfs(kind):
                raise UnavailableError(f"mkfs.{kind} is not installed")
            _call(f"mkfs.{kind}", "-q", "-F" if kind == "ext4" else "-f", *mkfs, str(image))
            self._device = _call("losetup", "-f", "--show", str(image)).strip()
            self.attach()
        except BaseException:
            self.close()
            raise

    def attach(self) -> None:
        """Mounts it, which replays the journal."""
        assert self._device is not None
        options = ["-o", self._options] if self._options else []
        _call("mount", "-t", self.kind, *options, self._device, str(self.mount))
        self._is_mounted = True

    def detach(self) -> None:
        _unmount(self.mount)
        self._is_mounted = False

    def replug(self) -> None:
        """After a power cut: what a machine finds when it comes up again. Nothing is left of what was cached."""
        assert self._is_cut(), f"the power of {self.mount} was not cut"
        self.detach()
        self.attach()
        self.num_cuts += 1

    def _is_cut(self) -> bool:
        try:
            (self.mount / "still-on").mkdir()
        except OSError as error:
            return error.errno in (errno.EIO, errno.EROFS, errno.ESHUTDOWN)
        return False

    def cut(self, mode: int) -> None:
        shut_down(str(self.mount), mode)

    def remount(self, option: str) -> None:
        _call("mount", "-o", f"remount,{option}", str(self.mount))

    def close(self) -> None:
        try:
            if self._is_mounted:
                self.detach()
        finally:
            if self._device is not None:
                _call("losetup", "-d", self._device)
                self._device = None
            shutil.rmtree(self._base, ignore_errors=True)


@contextlib.contextmanager
def small_tmpfs(size: int, *, inodes: int | None = None) -> Iterator[Path]:
    """A tmpfs of `size` bytes, mounted for the length of the block."""
    base = Path(tempfile.mkdtemp(prefix="dckpt-tmpfs-"))
    options = f"size={size}" + (f",nr_inodes={inodes}" if inodes else "")
    try:
        _call("mount", "-t", "tmpfs", "-o", options, "dckpt-test", str(base))
        try:
            yield base
        finally:
            _unmount(base)
    finally:
        base.rmdir()


def fast_directory() -> str | None:
    """Memory-backed where there is one: the campaigns make many small files. None means the usual place."""
    shm = Path("/dev/shm")
    return str(shm) if shm.is_dir() and os.access(shm, os.W_OK) and shutil.disk_usage(shm).free > 2**30 else None


def has_mkfs(kind: str) -> bool:
    return shutil.which(f"mkfs.{kind}") is not None


@functools.cache
def why_not_loop(kind: str) -> str | None:
    """None if file systems of this kind can be mounted and cut here, else the operation that was refused."""
    try:
        disk = LoopDisk(kind)
    except UnavailableError as error:
        return _without_paths(error)
    try:
        disk.cut(NOLOGFLUSH)
    except OSError as error:
        return f"shutdown ioctl on {kind}: {errno.errorcode.get(error.errno or 0, error)}"
    finally:
        disk.close()
    return None


@functools.cache
def why_not_tmpfs() -> str | None:
    """None if a tmpfs can be mounted here, else why not."""
    try:
        with small_tmpfs(MIB):
            return None
    except UnavailableError as error:
        return _without_paths(error)


def _without_paths(error: UnavailableError) -> str:
    """One line that is the same for every test that is skipped for it."""
    return re.sub(r"/\S*dckpt-[^\s:]*", "...", str(error).splitlines()[0])


def _unmount(mount: Path) -> None:
    for attempt in range(50):
        try:
            _call("umount", str(mount))
        except UnavailableError:
            # A process that was killed a moment ago may still hold a file.
            if attempt == 49:
                _call("umount", "-l", str(mount))
            time.sleep(0.02)
        else:
            return


def _call(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        raise UnavailableError(f"{command[0]} is not installed") from None
    if done.returncode != 0:
        raise UnavailableError(f"{' '.join(command)}: {done.stderr.strip()[-300:]}")
    return done.stdout
