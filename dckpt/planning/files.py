"""The shard files of one rank: which tensors lie in which, and where their bytes come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dckpt.format.shard_file import ShardFilePlan, ShardTensor, plan_shard_files
from dckpt.planning.layout import Layout
from dckpt.planning.records import record_name, values_record_name
from dckpt.planning.structure import Box, Structure


@dataclass(frozen=True, slots=True)
class WriteItem:
    """One named tensor of a shard file and where its bytes come from on the rank that writes it."""

    shard_tensor: ShardTensor
    source: tuple[int, int] | str  # (tensor, box) of the rank's structure, or the component of a record


FilePlans = list[tuple[ShardFilePlan, list[WriteItem]]]


def plan_files(
    rank: int,
    structure: Structure,
    boxes: Sequence[Sequence[Box]],
    layout: Layout,
    capacities: Mapping[str, int],
) -> FilePlans:
    """The shard files of `rank`. `boxes[i]`: what it holds of tensor i; `capacities`: bytes of its records, by component."""
    items = _write_items(rank, structure, boxes, layout, capacities)
    # A name may come several times (several boxes): each time it goes into a further file, in this order.
    pending: dict[str, list[WriteItem]] = {}
    for item in items:
        pending.setdefault(item.shard_tensor.name, []).append(item)
    frozen = {
        record_name(rank, row.name) if row.name in layout.rank_tensors else row.name
        for row in structure.rows
        if row.is_frozen
    }
    return [
        (file, [pending[tensor.name].pop(0) for tensor in file.tensors])
        for file in plan_shard_files(rank, [item.shard_tensor for item in items], separate=frozen)
    ]


def _write_items(
    rank: int,
    structure: Structure,
    boxes: Sequence[Sequence[Box]],
    layout: Layout,
    capacities: Mapping[str, int],
) -> list[WriteItem]:
    items = []
    skips = layout.skips.get(rank, frozenset())
    others = layout.others_columns(rank)
    for number, row in enumerate(structure.rows):
        is_record = row.name in layout.rank_tensors
        if not is_record and layout.column_of.get(row.name) in others:
            continue
        name = record_name(rank, row.name) if is_record else row.name
        for place, (offsets, sizes) in enumerate(boxes[number]):
            if (number, place) not in skips:
                items.append(WriteItem(ShardTensor(name, row.dtype, sizes, offsets, row.shape), (number, place)))
    for component in sorted(layout.rank_values & capacities.keys()):
        shape = (capacities[component],)
        record = ShardTensor(values_record_name(rank, component), "U8", shape, (0,), shape)
        items.append(WriteItem(record, component))
    return items
