"""Two kinds of `Posix`: one writes down what every call changed, one fails a chosen call."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from dckpt.storage.posix import Posix

Inode = int
BASE: Inode = 0
"""The directory under which everything is recorded; it exists durably before the first operation."""


class KilledError(BaseException):
    """The simulated process is dead: no handler may go on, and nothing more reaches the disk."""


@dataclass(frozen=True, slots=True)
class NameChange:
    """One atomic change of directories: (directory, name, what it names from now on or None)."""

    changes: tuple[tuple[Inode, str, Inode | None], ...]
    client: int
    makes_dir: Inode | None = None


@dataclass(frozen=True, slots=True)
class Write:
    """Bytes written into a file. `size` cuts the file there instead."""

    inode: Inode
    offset: int
    data: bytes
    size: int | None = None


@dataclass(frozen=True, slots=True)
class Sync:
    """fsync of a file or directory by one client; `site` names the place in the protocol."""

    inode: Inode
    is_dir: bool
    client: int
    site: str


@dataclass(frozen=True, slots=True)
class Promise:
    """From here on `fact` was acknowledged, or, with `holds` False, is no longer promised."""

    fact: Hashable
    holds: bool


Operation = NameChange | Write | Sync | Promise

_PACKAGE = f"{os.sep}dckpt{os.sep}"


# A call of these promises durability by itself; whoever calls it does not matter. `sync_dir` is what its
# caller makes of it.
_PROMISES = ("create", "ensure_root", "publish", "stage_manifest", "discard")


def _site(role: str, client: int) -> str:
    frame, names = sys._getframe(2), []
    while frame is not None:
        code = frame.f_code
        if _PACKAGE in code.co_filename:
            module = os.path.basename(code.co_filename).removesuffix(".py")
            names.append(f"{module}.{code.co_name}:{frame.f_lineno}")
            if module == "local" and code.co_name in _PROMISES:
                break
        frame = frame.f_back
    role = re.sub(r"[0-9a-f]{32}", "*", role)
    role = re.sub(r"step-\d+\.g\d+", "<checkpoint>", re.sub(r"\d{6}\.json", "<n>.json", role))
    return f"client {client}: {role} | {' < '.join(names)}"


@dataclass
class RecordingPosix(Posix):
    """Records below `base`. `client` says which node acts; a call for which `dies_before` holds is not made."""

    base: str
    operations: list[Operation] = field(default_factory=list)
    client: int = 0
    dies_before: Callable[[str, str], bool] | None = None

    def __post_init__(self) -> None:
        self._tables: dict[Inode, dict[str, Inode]] = {BASE: {}}
        self._next: Inode = 1
        self._fds: dict[int, tuple[Inode, str]] = {}
        self._is_dead = False
        self.calls: list[tuple[str, str]] = []
        """Every call that changes something or syncs: what it is, and the path below `base`."""

    def acknowledge(self, *fact: Hashable) -> None:
        self.operations.append(Promise(fact, holds=True))

    def withdraw(self, *fact: Hashable) -> None:
        self.operations.append(Promise(fact, holds=False))

    def revive(self) -> None:
        """A new process goes on where the killed one left the (still running) system."""
        self._is_dead, self.dies_before = False, None

    # --- the calls

    def open(self, path: str, flags: int, *, dir_fd: int | None = None) -> int:
        creates = bool(flags & os.O_CREAT)
        if creates:
            assert dir_fd is None, "files are created by absolute path"
            self._live("create", path)
        fd = super().open(path, flags, dir_fd=dir_fd)
        place = None if dir_fd is not None else self._relative(path)
        if place is not None:
            if creates:
                self._name(place, self._new(is_dir=False))
            self._fds[fd] = (self._find(place), place)
        return fd

    def close(self, fd: int) -> None:
        self._fds.pop(fd, None)
        super().close(fd)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        self._live("write", self._fds[fd][1])
        count = super().pwrite(fd, data, offset)
        self.operations.append(Write(self._fds[fd][0], offset, bytes(data[:count])))
        return count

    def ftruncate(self, fd: int, size: int) -> None:
        self._live("truncate", self._fds[fd][1])
        super().ftruncate(fd, size)
        self.operations.append(Write(self._fds[fd][0], 0, b"", size=size))

    def fsync(self, fd: int) -> None:
        found = self._fds.get(fd)
        if found is not None:
            self._live("fsync", found[1])
        super().fsync(fd)
        if found is not None:
            inode, place = found
            self.operations.append(Sync(inode, inode in self._tables, self.client, _site(place, self.client)))

    def mkdir(self, path: str) -> None:
        self._live("mkdir", path)
        super().mkdir(path)
        self._name(self._relative(path) or "", self._new(is_dir=True))

    def rename(self, source: str, target: str) -> None:
        self._live("rename", source)
        super().rename(source, target)
        old, new = self._relative(source) or "", self._relative(target) or ""
        self._change((old, None), (new, self._find(old)))

    def link(self, source: str, target: str) -> None:
        self._live("link", target)
        super().link(source, target)
        self._change((self._relative(target) or "", self._find(self._relative(source) or "")))

    def unlink(self, path: str) -> None:
        self._live("unlink", path)
        super().unlink(path)
        self._change((self._relative(path) or "", None))

    def rmdir(self, path: str) -> None:
        self._live("rmdir", path)
        super().rmdir(path)
        self._change((self._relative(path) or "", None))

    # --- the tree as it is in memory

    def _live(self, kind: str, path: str) -> None:
        if self._is_dead or (self.dies_before is not None and self.dies_before(kind, path)):
            self._is_dead = True
            raise KilledError(f"{kind} {path}")
        place = self._relative(path) if path.startswith("/") else path
        if place is not None:
            self.calls.append((kind, place))

    def _relative(self, path: str) -> str | None:
        """None for what lies outside of `base`: it is not part of the recorded world."""
        if path == self.base:
            return ""
        return path.removeprefix(f"{self.base}/") if path.startswith(f"{self.base}/") else None

    def _new(self, *, is_dir: bool) -> Inode:
        inode, self._next = self._next, self._next + 1
        if is_dir:
            self._tables[inode] = {}
        return inode

    def _find(self, place: str) -> Inode:
        inode = BASE
        for part in place.split("/") if place else []:
            inode = self._tables[inode][part]
        return inode

    def _name(self, place: str, inode: Inode) -> None:
        self._change((place, inode))

    def _change(self, *changes: tuple[str, Inode | None]) -> None:
        found = []
        for place, inode in changes:
            parent, _, name = place.rpartition("/")
            found.append((self._find(parent), name, inode))
        for directory, name, inode in found:
            if inode is None:
                self._tables[directory].pop(name)
            else:
                self._tables[directory][name] = inode
        makes_dir = next((inode for _, _, inode in found if inode in self._tables), None)
        self.operations.append(NameChange(tuple(found), self.client, makes_dir))


@dataclass
class FailingPosix(Posix):
    """Fails the `at`-th call of one kind with `errno`: before it takes effect or, with `lands`, after."""

    kind: str
    errno: int
    at: int
    lands: bool = False
    num_calls: int = 0
    num_failed: int = 0

    def _fail(self, kind: str, call: Callable[[], object]) -> object:
        if kind != self.kind:
            return call()
        self.num_calls += 1
        if self.num_calls != self.at:
            return call()
        self.num_failed += 1
        if self.lands:
            call()
        raise OSError(self.errno, os.strerror(self.errno))

    def open(self, path: str, flags: int, *, dir_fd: int | None = None) -> int:
        kind = "create" if flags & os.O_CREAT else "open"
        found = self._fail(kind, lambda: Posix.open(self, path, flags, dir_fd=dir_fd))
        assert isinstance(found, int)
        return found

    def close(self, fd: int) -> None:
        self._fail("close", lambda: Posix.close(self, fd))

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        found = self._fail("write", lambda: Posix.pwrite(self, fd, data, offset))
        assert isinstance(found, int)
        return found

    def fsync(self, fd: int) -> None:
        self._fail("fsync", lambda: Posix.fsync(self, fd))

    def mkdir(self, path: str) -> None:
        self._fail("mkdir", lambda: Posix.mkdir(self, path))

    def rename(self, source: str, target: str) -> None:
        self._fail("rename", lambda: Posix.rename(self, source, target))

    def link(self, source: str, target: str) -> None:
        self._fail("link", lambda: Posix.link(self, source, target))

    def unlink(self, path: str) -> None:
        self._fail("unlink", lambda: Posix.unlink(self, path))

    def rmdir(self, path: str) -> None:
        self._fail("rmdir", lambda: Posix.rmdir(self, path))
