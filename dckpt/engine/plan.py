"""Who writes what: pure functions from what each rank holds to the layout of the checkpoint. No I/O, no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dckpt.errors import ConfigError
from dckpt.format.index import Chunk, LayoutIndex, build_index
from dckpt.format.shard_file import DTYPES, ShardFilePlan, ShardTensor, plan_shard_files
from dckpt.format.values import dump_json, load_json

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes

# Replicated pieces below this stay on the lowest rank that has them: scattering them costs every reader a file.
SCATTER_BYTES_MIN = 64 * 1024

PLAN_BYTES_MAX = 2**31
RNG = "rng"
RECORD_BYTES_MAX = 64 * 2**20  # a rank's values of one component, as FORMAT.md limits them


@dataclass(frozen=True, slots=True)
class LocalTensor:
    """A tensor as one rank sees it: global `shape`, the boxes it holds, and a digest if its equality must be checked."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    digest: str | None
    is_frozen: bool = False

    def box_bytes(self, box: int) -> int:
        """Bytes of the box number `box`."""
        return math.prod(self.boxes[box][1]) * DTYPES[self.dtype]


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What one rank brings to a save. `values`: component -> (digest, bytes of its record); `rng`: stream -> digest."""

    step: int
    micro_step: int
    tensors: tuple[LocalTensor, ...]
    values: dict[str, tuple[str, int]]
    rng: dict[str, str]
    coordinates: dict[str, int]

    def encode(self) -> bytes:
        """The JSON that travels to the coordinator."""
        tensors = [[t.name, t.dtype, t.shape, t.boxes, t.digest, t.is_frozen] for t in self.tensors]
        return dump_json(
            {
                "step": self.step,
                "micro_step": self.micro_step,
                "tensors": tensors,
                "values": self.values,
                "rng": self.rng,
                "coordinates": self.coordinates,
            }
        )

    @classmethod
    def decode(cls, data: bytes) -> RankPlan:
        """The plan that `encode` wrote; it comes from a rank of this job, not from a file."""
        record = load_json(data, key="plan of a rank", limit=PLAN_BYTES_MAX)
        return cls(
            step=record["step"],
            micro_step=record["micro_step"],
            tensors=tuple(_decode_tensor(row) for row in record["tensors"]),
            values={name: (digest, size) for name, (digest, size) in record["values"].items()},
            rng=record["rng"],
            coordinates=record["coordinates"],
        )


def _decode_tensor(row: list[Any]) -> LocalTensor:
    name, dtype, shape, boxes, digest, is_frozen = row
    return LocalTensor(name, dtype, tuple(shape), tuple((tuple(o), tuple(s)) for o, s in boxes), digest, is_frozen)


@dataclass(frozen=True, slots=True)
class WriteItem:
    """One named tensor of a shard file and where its bytes come from on the rank that writes it."""

    shard_tensor: ShardTensor
    source: tuple[int, int] | str  # (tensor, box) of the rank's plan, or the component of a record


@dataclass(frozen=True, slots=True)
class SaveLayout:
    """The coordinator's decision. `skips[r]`: (tensor, box) pairs of rank r that another rank writes."""

    rank_tensors: tuple[str, ...]
    rank_values: tuple[str, ...]
    skips: tuple[tuple[tuple[int, int], ...], ...]
    index: LayoutIndex
    files: tuple[tuple[ShardFilePlan, ...], ...]  # of each rank


def record_name(rank: int, name: str) -> str:
    """The stored name of what is kept per rank."""
    return f"rank.{rank}.{name}"


def values_record_name(rank: int, component: str) -> str:
    """The stored name of a rank's own values of `component`: a U8 tensor of tagged JSON."""
    return record_name(rank, f"values.{component}")


def decide_layout(plans: Sequence[RankPlan]) -> SaveLayout:
    """Deterministic in `plans`: replicated boxes get one writer, balanced by bytes; what differs by rank is kept by rank.

    Raises `ConfigError` if the ranks disagree on a tensor's shape or dtype.
    """
    _ensure_same_tensors(plans)
    rank_tensors = _differing_tensors(plans)
    rank_values = _differing_values(plans)
    skips = _assign_owners(plans, rank_tensors)
    files: list[tuple[ShardFilePlan, ...]] = []
    tensors: dict[str, list[Chunk]] = {}
    names: list[str] = []
    for rank, plan in enumerate(plans):
        planned = plan_files(rank, plan, skips[rank], rank_tensors, rank_values)
        files.append(tuple(file for file, _ in planned))
        for file, _ in planned:
            names.append(file.file)
            for shard_tensor, begin in zip(file.tensors, file.begins, strict=True):
                chunk = Chunk(shard_tensor.offsets, shard_tensor.shape, len(names) - 1, begin)
                tensors.setdefault(shard_tensor.name, []).append(chunk)
    shapes = _global_shapes(plans, rank_tensors, rank_values)
    index = build_index(
        tuple(names), {name: (dtype, shape, tensors.get(name, [])) for name, (dtype, shape) in shapes.items()}
    )
    return SaveLayout(tuple(sorted(rank_tensors)), tuple(sorted(rank_values)), skips, index, tuple(files))


def plan_files(
    rank: int,
    plan: RankPlan,
    skips: Iterable[tuple[int, int]],
    rank_tensors: frozenset[str],
    rank_values: frozenset[str],
) -> list[tuple[ShardFilePlan, list[WriteItem]]]:
    """The shard files of one rank and the source of each tensor in them; coordinator and rank compute the same."""
    items = _write_items(rank, plan, frozenset(skips), rank_tensors, rank_values)
    # A name may come several times (several boxes): each time it goes into a further file, in this order.
    pending: dict[str, list[WriteItem]] = {}
    for item in items:
        pending.setdefault(item.shard_tensor.name, []).append(item)
    frozen = {tensor.name for tensor in plan.tensors if tensor.is_frozen}
    return [
        (file, [pending[tensor.name].pop(0) for tensor in file.tensors])
        for file in plan_shard_files(rank, [item.shard_tensor for item in items], separate=frozen)
    ]


def _write_items(
    rank: int,
    plan: RankPlan,
    skips: frozenset[tuple[int, int]],
    rank_tensors: frozenset[str],
    rank_values: frozenset[str],
) -> list[WriteItem]:
    items = []
    for number, tensor in enumerate(plan.tensors):
        name = record_name(rank, tensor.name) if tensor.name in rank_tensors else tensor.name
        for place, (offsets, sizes) in enumerate(tensor.boxes):
            if (number, place) not in skips:
                items.append(WriteItem(ShardTensor(name, tensor.dtype, sizes, offsets), (number, place)))
    for component, (_, size) in sorted(plan.values.items()):
        if component in rank_values:
            record = ShardTensor(values_record_name(rank, component), "U8", (size,), (0,))
            items.append(WriteItem(record, component))
    return items


def _ensure_same_tensors(plans: Sequence[RankPlan]) -> None:
    seen: dict[str, tuple[int, str, tuple[int, ...]]] = {}
    for rank, plan in enumerate(plans):
        for tensor in plan.tensors:
            first = seen.setdefault(tensor.name, (rank, tensor.dtype, tensor.shape))
            if first[1:] != (tensor.dtype, tensor.shape) and tensor.digest is None:
                raise ConfigError(
                    f"Tensor {tensor.name}: rank {first[0]} has {first[1]} {list(first[2])}, rank {rank} has "
                    f"{tensor.dtype} {list(tensor.shape)}; expected the same global shape and dtype on every rank."
                )


def _differing_tensors(plans: Sequence[RankPlan]) -> frozenset[str]:
    """Plain tensors that are not the same on every rank that has them."""
    seen: dict[str, set[str | None]] = {}
    for plan in plans:
        for tensor in plan.tensors:
            seen.setdefault(tensor.name, set()).add(tensor.digest)
    return frozenset(name for name, digests in seen.items() if len(digests) > 1)


def _differing_values(plans: Sequence[RankPlan]) -> frozenset[str]:
    """Components whose values differ between ranks or are missing on some; RNG is always kept by rank."""
    names = {name for plan in plans for name in plan.values}
    differing = {name for name in names if len({plan.values.get(name, ("absent", 0))[0] for plan in plans}) > 1}
    return frozenset(differing | ({RNG} & names))


def _assign_owners(plans: Sequence[RankPlan], rank_tensors: frozenset[str]) -> tuple[tuple[tuple[int, int], ...], ...]:
    holders: dict[tuple[str, Box], list[tuple[int, int, int]]] = {}
    load = [0] * len(plans)
    for rank, plan in enumerate(plans):
        for number, tensor in enumerate(plan.tensors):
            if tensor.name in rank_tensors:
                continue
            for place, box in enumerate(tensor.boxes):
                holders.setdefault((tensor.name, box), []).append((rank, number, place))
    shared = []
    for (name, box), owners in holders.items():
        rank, number, place = owners[0]
        size = plans[rank].tensors[number].box_bytes(place)
        if len(owners) == 1:
            load[rank] += size
        else:
            shared.append((-size, name, box, owners))
    skips: list[list[tuple[int, int]]] = [[] for _ in plans]
    for minus_size, _, _, owners in sorted(shared, key=lambda row: row[:3]):
        candidates = owners if -minus_size >= SCATTER_BYTES_MIN else owners[:1]
        writer = min(candidates, key=lambda owner: (load[owner[0]], owner[0]))[0]
        load[writer] -= minus_size
        for rank, number, place in owners:
            if rank != writer:
                skips[rank].append((number, place))
    return tuple(tuple(sorted(pairs)) for pairs in skips)


def _global_shapes(
    plans: Sequence[RankPlan], rank_tensors: frozenset[str], rank_values: frozenset[str]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for rank, plan in enumerate(plans):
        for tensor in plan.tensors:
            name = record_name(rank, tensor.name) if tensor.name in rank_tensors else tensor.name
            shapes[name] = (tensor.dtype, tensor.shape)
        for component, (_, size) in plan.values.items():
            if component in rank_values:
                shapes[values_record_name(rank, component)] = ("U8", (size,))
    return shapes
