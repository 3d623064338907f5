"""The files of a repaired checkpoint: which stay as they are, which are written anew, and the index over both. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dckpt.format.index import Chunk, LayoutIndex, build_index
from dckpt.format.layout import parse_shard_file_name, shard_file_name
from dckpt.format.shard_file import ShardFilePlan, ShardHeader, ShardTensor, plan_shard_file
from dckpt.planning.records import RNG, values_record_name
from dckpt.tools.restore import FileState


@dataclass(frozen=True, slots=True)
class NewFile:
    """A shard file that is written anew: as it was (`plan` None), or with other tensors.

    tensors: in the order of the plan: where each begins in the old file, or its bytes.
    """

    name: str
    rank: int
    old: FileState | None
    plan: ShardFilePlan | None
    tensors: tuple[int | bytes, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of the file."""
        if self.plan is not None:
            return self.plan.size
        assert self.old is not None
        return self.old.entry.size


def shown_names(names: Sequence[str]) -> str:
    """The first few, and how many more."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 5} more" if len(ordered) > 5 else ""
    return ", ".join(ordered[:5]) + more


def index_from_headers(files: Sequence[str], headers: Sequence[ShardHeader]) -> LayoutIndex:
    """The layout that the headers of all shard files of a checkpoint describe; `ConfigError` if a tensor has a gap."""
    chunks: dict[str, list[Chunk]] = {}
    dtypes: dict[str, str] = {}
    for number, header in enumerate(headers):
        for tensor, begin in zip(header.tensors, header.begins, strict=True):
            chunks.setdefault(tensor.name, []).append(Chunk(tuple(tensor.offsets), tuple(tensor.shape), number, begin))
            dtypes[tensor.name] = tensor.dtype
    shapes = {
        name: tuple(
            max(chunk.offsets[axis] + chunk.sizes[axis] for chunk in found) for axis in range(len(found[0].sizes))
        )
        for name, found in chunks.items()
    }
    tensors = {name: (dtypes[name], shapes[name], found) for name, found in chunks.items()}
    return build_index(tuple(files), tensors, data_begins=[header.data_begin for header in headers])


def without_states(value: Any, lost: Iterable[str]) -> tuple[Any, set[str]] | None:
    """The optimizer's record without the state of every parameter of which something is lost, and the tensors that go.

    None if what is lost is not the state of single parameters.
    """
    records = value.get("optimizers") if isinstance(value, dict) else None
    if not isinstance(records, dict):
        return None
    gone: set[str] = set()
    lost_names = set(lost)
    optimizers: dict[str, Any] = {}
    for key, record in records.items():
        prefix = f"optim.{key}" if key else "optim"
        states = []
        for template in record["states"]:
            kept = []
            for param in template["params"]:
                own = {f"{prefix}.{param}.{name}" for name in template["layout"]}
                if own & lost_names:
                    gone |= own
                else:
                    kept.append(param)
            if kept:
                states.append({**template, "params": kept})
        optimizers[key] = {**record, "states": states}
    return None if lost_names - gone else ({**value, "optimizers": optimizers}, gone)


class RepairLayout:
    """Which files stay, which are written anew, and the index over both."""

    def __init__(
        self,
        index: LayoutIndex | None,
        states: Sequence[FileState],
        dropped: set[str],
        records: Mapping[int, bytes],
    ) -> None:
        self._states = states
        self._patterns = tuple(name[:-1] for name in dropped if name.endswith(".*"))
        self._dropped = dropped
        self._records = records
        self._by_name = {values_record_name(rank, RNG): record for rank, record in records.items()}
        self.index = index
        self.kept: list[FileState] = []
        self.written: list[NewFile] = []

    def plan(self) -> None:
        """Decides every file; the index is made anew only where tensors come or go."""
        assert self.index is not None
        moved: dict[str, ShardFilePlan] = {}
        for state in self._states:
            new = self._plan_file(state)
            if new is None:
                self.kept.append(state)
            else:
                self.written.append(new)
                if new.plan is not None:
                    moved[new.name] = new.plan
        for rank, record in self._records.items():
            if values_record_name(rank, RNG) not in self.index:
                new = self._record_file(rank, record)
                self.written.append(new)
                assert new.plan is not None
                moved[new.name] = new.plan
        if moved:
            self.index = self._new_index(moved)

    def _is_dropped(self, name: str) -> bool:
        if name in self._dropped:
            return True
        plain = name.split(".", 2)[2].removeprefix("values.") if name.startswith("rank.") else name
        return any(plain.startswith(pattern) or f"{plain}." == pattern for pattern in self._patterns)

    def _plan_file(self, state: FileState) -> NewFile | None:
        assert self.index is not None
        rank = state.entry.rank or 0
        located = self.index.located_chunks(self.index.files.index(state.entry.name))
        needs_plan = not state.is_whole or any(self._is_dropped(name) for name, _, _ in located)
        if not needs_plan:
            # Whole, here or elsewhere: kept where every byte in place is good.
            return None if state.is_intact else NewFile(state.entry.name, rank, state, None)
        tensors: list[ShardTensor] = []
        sources: dict[str, int | bytes] = {}
        for name, _, chunk in located:
            dtype = self.index.meta(name).dtype
            record = self._by_name.get(name)
            if record is not None:
                tensors.append(ShardTensor(name, dtype, (len(record),), (0,), (len(record),)))
                sources[name] = record
            elif not self._is_dropped(name):
                tensors.append(ShardTensor(name, dtype, chunk.sizes, chunk.offsets, tuple(self.index.meta(name).shape)))
                sources[name] = chunk.begin
        plan = plan_shard_file(state.entry.name, tensors)
        return NewFile(plan.file, rank, state, plan, tuple(sources[tensor.name] for tensor in plan.tensors))

    def _record_file(self, rank: int, record: bytes) -> NewFile:
        parts = [
            parsed[1]
            for state in self._states
            if (parsed := parse_shard_file_name(state.entry.name)) is not None and parsed[0] == rank
        ]
        name = shard_file_name(rank, max(parts, default=-1) + 1)
        shape = (len(record),)
        plan = plan_shard_file(name, [ShardTensor(values_record_name(rank, RNG), "U8", shape, (0,), shape)])
        return NewFile(name, rank, None, plan, (record,))

    def _new_index(self, moved: Mapping[str, ShardFilePlan]) -> LayoutIndex:
        assert self.index is not None
        old = self.index
        files = [*old.files, *(name for name in moved if name not in old.files)]
        numbers = {name: number for number, name in enumerate(files)}
        places = {
            (name, tensor.name): begin
            for name, plan in moved.items()
            for tensor, begin in zip(plan.tensors, plan.begins, strict=True)
        }
        tensors: dict[str, tuple[str, Sequence[int], Sequence[Chunk]]] = {}
        for name in old.names():
            if self._is_dropped(name):
                continue
            meta = old.meta(name)
            chunks = []
            for chunk in old.chunks(name):
                begin = places.get((old.files[chunk.file], name)) if chunk.file >= 0 else None
                chunks.append(chunk if begin is None else replace(chunk, begin=begin))
            tensors[name] = (meta.dtype, meta.shape, chunks)
        file_of = {tensor: file for file, tensor in places}
        for name, record in self._by_name.items():
            file = file_of[name]
            chunk = Chunk((0,), (len(record),), numbers[file], places[file, name])
            tensors[name] = ("U8", (len(record),), [chunk])
        return build_index(tuple(files), tensors)
