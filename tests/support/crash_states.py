"""Every state of the disk that a power loss may leave, from recorded operations. The model is weaker than ext4 and XFS.

* Names: a change of directories is on the disk once one of them was synced. Of the others any subset is
(`weak`), or, as with a journal, any prefix in the order in which they were made (`ordered`). In `nodes` a
sync covers only the changes that the same client made, as on a shared file system whose clients cache.
* Data: after a file's last sync, the bytes written since then are there, not there, there by half, or zeros.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from tests.support.recording import BASE, Inode, NameChange, Operation, Promise, Sync, Write

Model = Literal["weak", "ordered", "nodes"]
MODELS: tuple[Model, ...] = ("weak", "ordered", "nodes")

_OPTIONAL_MAX = 14

Files = dict[str, bytes]
"""Path to content below the base; directories end in '/' and have no content."""

Check = Callable[[Files], tuple[frozenset[Hashable], tuple[str, ...]]]
"""The facts that a state shows, and what is wrong with it by itself."""


@dataclass(frozen=True, slots=True)
class Violation:
    """What the power loss after the first `num_operations` operations breaks."""

    num_operations: int
    problem: str


def drop_syncs(operations: Sequence[Operation], site: str) -> list[Operation]:
    """The same history by a program that forgot the fsync at `site`."""
    return [op for op in operations if not (isinstance(op, Sync) and op.site == site)]


class Explorer:
    """Enumerates the states of one recorded history. `num_states` and `num_distinct` count them."""

    def __init__(self, operations: Sequence[Operation], check: Check) -> None:
        self._operations = operations
        self._check = check
        self._seen: dict[frozenset[tuple[str, bytes]], tuple[frozenset[Hashable], tuple[str, ...]]] = {}
        self._directories = frozenset(
            op.makes_dir for op in operations if isinstance(op, NameChange) and op.makes_dir is not None
        )
        self.num_states = 0

    @property
    def num_distinct(self) -> int:
        return len(self._seen)

    def violations(self, model: Model) -> Iterator[Violation]:
        """Each broken promise, at each prefix of the history."""
        promised: dict[Hashable, None] = {}
        for end in range(1, len(self._operations) + 1):
            last = self._operations[end - 1]
            if isinstance(last, Promise):
                if last.holds:
                    promised[last.fact] = None
                else:
                    promised.pop(last.fact, None)
            done = self._operations[:end]
            for files in self._states(done, model):
                facts, problems = self._judge(files)
                for problem in problems:
                    yield Violation(end, f"visible but not whole: {problem}")
                for fact in promised:
                    if fact not in facts:
                        yield Violation(end, f"acknowledged but lost: {fact}")

    def _judge(self, files: Files) -> tuple[frozenset[Hashable], tuple[str, ...]]:
        key = frozenset(files.items())
        if key not in self._seen:
            self._seen[key] = self._check(files)
        return self._seen[key]

    def _states(self, done: Sequence[Operation], model: Model) -> Iterator[Files]:
        changes = [(place, op) for place, op in enumerate(done) if isinstance(op, NameChange)]
        variants = _file_variants(done)
        for chosen in _choices(done, changes, model):
            paths = _walk(chosen, self._directories)
            inodes = sorted({inode for inode in paths.values() if inode in variants})
            for contents in itertools.product(*(variants[inode] for inode in inodes)):
                self.num_states += 1
                data = dict(zip(inodes, contents, strict=True))
                yield {path: data.get(inode, b"") for path, inode in paths.items()}


def _choices(
    done: Sequence[Operation], changes: list[tuple[int, NameChange]], model: Model
) -> Iterator[list[NameChange]]:
    is_settled = [_is_settled(done, place, change, model) for place, change in changes]
    if model == "ordered":
        settled = max((number + 1 for number, found in enumerate(is_settled) if found), default=0)
        for count in range(settled, len(changes) + 1):
            yield [change for _, change in changes[:count]]
        return
    optional = [number for number, found in enumerate(is_settled) if not found]
    assert len(optional) <= _OPTIONAL_MAX, f"{len(optional)} unsynced changes are too many to enumerate"
    for picks in itertools.product((True, False), repeat=len(optional)):
        dropped = {number for number, picked in zip(optional, picks, strict=True) if not picked}
        yield [change for number, (_, change) in enumerate(changes) if number not in dropped]


def _is_settled(done: Sequence[Operation], place: int, change: NameChange, model: Model) -> bool:
    directories = {directory for directory, _, _ in change.changes}
    return any(
        isinstance(op, Sync)
        and op.is_dir
        and op.inode in directories
        and (model != "nodes" or op.client == change.client)
        for op in done[place + 1 :]
    )


def _file_variants(done: Sequence[Operation]) -> dict[Inode, list[bytes]]:
    current: dict[Inode, bytearray] = {}
    synced: dict[Inode, bytes] = {}
    for op in done:
        if isinstance(op, Write):
            content = current.setdefault(op.inode, bytearray())
            if op.size is not None:
                del content[op.size :]
                continue
            if len(content) < op.offset:
                content.extend(bytes(op.offset - len(content)))
            content[op.offset : op.offset + len(op.data)] = op.data
        elif isinstance(op, Sync) and not op.is_dir:
            synced[op.inode] = bytes(current.get(op.inode, b""))
    variants = {}
    for inode, content in current.items():
        old, new = synced.get(inode, b""), bytes(content)
        zeros = old + bytes(max(0, len(new) - len(old)))
        half = new[: (len(old) + len(new)) // 2]
        variants[inode] = [new] if old == new else list(dict.fromkeys((new, old, half, zeros)))
    return variants


def _walk(changes: Sequence[NameChange], directories: frozenset[Inode]) -> dict[str, Inode]:
    tables: dict[Inode, dict[str, Inode]] = {}
    for change in changes:
        for directory, name, inode in change.changes:
            if inode is None:
                tables.get(directory, {}).pop(name, None)
            else:
                tables.setdefault(directory, {})[name] = inode
    paths: dict[str, Inode] = {}
    rest = [("", BASE)]
    while rest:
        prefix, directory = rest.pop()
        for name, inode in tables.get(directory, {}).items():
            if inode in directories:
                # A directory can have two names here: of two renames only the second may have reached the
                # disk.
                paths[f"{prefix}{name}/"] = inode
                rest.append((f"{prefix}{name}/", inode))
            else:
                paths[f"{prefix}{name}"] = inode
    return paths
