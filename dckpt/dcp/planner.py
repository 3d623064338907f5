"""Planners for stock `dcp.save` and `dcp.load`: bytes balanced exactly, and nothing ignored silently."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, WriteItem

from dckpt.errors import IncompatibleStateError


class DckptSavePlanner(DefaultSavePlanner):
    """`DefaultSavePlanner` whose replicated items go to the rank with the fewest *local* bytes so far.

    The stock planner weighs an item by its global tensor size (planner.py:70-82), which counts a shard as the whole.
    Deterministic: ties go to the lowest rank.
    """

    def _dedup_save_plans(self, all_plans: list[SavePlan]) -> list[SavePlan]:
        holders: dict[Any, list[tuple[int, WriteItem]]] = {}
        for rank, plan in enumerate(all_plans):
            for item in plan.items:
                holders.setdefault(item.index, []).append((rank, item))
        load = [0] * len(all_plans)
        kept: list[set[Any]] = [set() for _ in all_plans]
        shared = []
        for index, found in holders.items():
            rank, item = found[0]
            if len(found) == 1:
                load[rank] += _item_bytes(item)
                kept[rank].add(index)
            else:
                shared.append((-_item_bytes(item), index.fqn, tuple(index.offset or ()), index, found))
        for minus_bytes, _, _, index, found in sorted(shared, key=lambda row: row[:3]):
            writer = min((rank for rank, _ in found), key=lambda rank: (load[rank], rank))
            load[writer] -= minus_bytes
            kept[writer].add(index)
        return [
            replace(plan, items=[item for item in plan.items if item.index in kept[rank]])
            for rank, plan in enumerate(all_plans)
        ]


def _item_bytes(item: WriteItem) -> int:
    if item.tensor_data is None:
        return 1
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


class DckptLoadPlanner(DefaultLoadPlanner):
    """`DefaultLoadPlanner` that compares names, shapes and dtypes both ways before anything is read.

    Raises `IncompatibleStateError` with every difference at once; the stock planner casts dtypes silently and ignores
    saved names that the state_dict lacks. allow_unexpected: keep ignoring those.
    """

    def __init__(self, *args: Any, allow_unexpected: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._allow_unexpected = allow_unexpected

    def create_local_plan(self) -> LoadPlan:
        """The stock plan, once everything fits."""
        assert self.metadata is not None
        differences = self._differences(self.metadata)
        if differences:
            raise IncompatibleStateError(
                f"dcp.load: the checkpoint does not fit the state_dict in {len(differences)} places: "
                f"{'; '.join(differences[:20])}. Nothing was changed.",
                differences=differences,
            )
        return super().create_local_plan()

    def _differences(self, metadata: Metadata) -> list[str]:
        saved = metadata.state_dict_metadata
        found = []
        for name, value in self.state_dict.items():
            entry = saved.get(name)
            if entry is None:
                if not self.allow_partial_load:
                    found.append(f"{name}: not in the checkpoint")
            elif isinstance(entry, TensorStorageMetadata) and isinstance(value, torch.Tensor):
                found += _compare(name, entry, value)
            elif isinstance(entry, TensorStorageMetadata) or isinstance(value, torch.Tensor):
                found.append(f"{name}: a tensor on one side, a value on the other")
        if not self._allow_unexpected:
            found += [
                f"{name}: in the checkpoint, not in the state_dict" for name in saved if name not in self.state_dict
            ]
        return found


def _compare(name: str, entry: TensorStorageMetadata, tensor: torch.Tensor) -> list[str]:
    found = []
    if tuple(entry.size) != tuple(tensor.shape):
        found.append(f"{name}: saved shape {list(entry.size)}, live {list(tensor.shape)}")
    if entry.properties.dtype != tensor.dtype:
        found.append(f"{name}: saved dtype {entry.properties.dtype}, live {tensor.dtype}")
    return found
