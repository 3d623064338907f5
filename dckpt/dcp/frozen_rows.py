"""Rows of a parameter that must not train, such as a base vocabulary under an extended one: are they still what they were?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from dckpt.dcp.chunks import LocalChunk, local_chunks
from dckpt.errors import ConfigError
from dckpt.format.fingerprint import box_runs, fold_box
from dckpt.ranks.topology import Topology
from dckpt.state.gradients import parameters_by_name
from dckpt.state.train_state import TrainState

ROWS_AT_ONCE = 4096
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


@dataclass(frozen=True, slots=True)
class FrozenRows:
    """What one rank holds of the declared rows of one parameter.

    partial: its share of the rows' fingerprint (XOR over all ranks is that of the rows), 0 where another rank counts them.
    moments: elements of the optimizer's moments of these rows, on this rank, that are not zero. weight_decay: of the group
    that holds the parameter, 0 without one.
    """

    partial: int
    moments: int
    weight_decay: float


def look_at_frozen_rows(state: TrainState, topology: Topology) -> dict[str, FrozenRows]:
    """Of each declared parameter what this rank holds. Reads only; `ConfigError` for a name or rows that do not exist."""
    if not state.frozen_rows:
        return {}
    params = parameters_by_name(state.models())
    found: dict[str, FrozenRows] = {}
    for name, (start, stop) in state.frozen_rows.items():
        param = params.get(name)
        if param is None or param.dim() == 0 or not 0 <= start < stop <= param.shape[0]:
            shape = "no such parameter" if param is None else f"shape {tuple(param.shape)}"
            raise ConfigError(
                f"frozen_rows[{name!r}]: expected a parameter with rows {start} to {stop}, found {shape}."
            )
        partial = _fingerprint(name, param, start, stop) if _counts(param, topology) else 0
        found[name] = FrozenRows(partial, _moments(state, name, param, start, stop), _decay(state, param))
    return found


def _counts(param: torch.Tensor, topology: Topology) -> bool:
    """Whether this rank's part is counted: one rank of those that hold the same."""
    if not isinstance(param, DTensor):
        return topology.is_coordinator
    at = param.device_mesh.get_coordinate()
    return at is not None and all(
        where == 0 for where, placement in zip(at, param.placements, strict=True) if placement.is_replicate()
    )


def _overlaps(name: str, tensor: torch.Tensor, start: int, stop: int) -> Iterator[tuple[LocalChunk, int, int]]:
    """(chunk, first and last row of the global tensor) of what this rank holds of the rows, some thousand at a time."""
    for chunk in local_chunks(name, tensor.detach()):
        first = max(start, chunk.offsets[0])
        last = min(stop, chunk.offsets[0] + chunk.sizes[0])
        for begin in range(first, last, ROWS_AT_ONCE):
            yield chunk, begin, min(last, begin + ROWS_AT_ONCE)


def _fingerprint(name: str, param: torch.Tensor, start: int, stop: int) -> int:
    total = 0
    shape = (stop - start, *param.shape[1:])
    for chunk, first, last in _overlaps(name, param, start, stop):
        at = chunk.offsets[0]
        rows = chunk.tensor[first - at : last - at].cpu().contiguous()
        data = rows.reshape(-1).view(torch.uint8).numpy()
        offsets, sizes = (first - start, *chunk.offsets[1:]), (last - first, *chunk.sizes[1:])
        total ^= fold_box(data, 0, box_runs(shape, offsets, sizes, rows.element_size()))
    return total


def _moments(state: TrainState, name: str, param: torch.Tensor, start: int, stop: int) -> int:
    count = 0
    for optimizer in state.optimizers:
        held = optimizer.state.get(param, {})
        for key in MOMENTS:
            moment = held.get(key)
            if isinstance(moment, torch.Tensor) and moment.shape == param.shape:
                for chunk, first, last in _overlaps(f"{name}.{key}", moment, start, stop):
                    at = chunk.offsets[0]
                    count += int(torch.count_nonzero(chunk.tensor[first - at : last - at]))
    return count


def _decay(state: TrainState, param: torch.Tensor) -> float:
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            if any(param is member for member in group["params"]):
                return float(group.get("weight_decay", 0.0) or 0.0)
    return 0.0


def to_json(rows: dict[str, FrozenRows]) -> dict[str, Any]:
    """As it travels between ranks."""
    return {name: [f"{item.partial:032x}", item.moments, item.weight_decay] for name, item in rows.items()}


def combine(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What all ranks together hold: the fingerprint of the rows, how many elements have moments, the weight decay."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        for name, (partial, moments, decay) in record.items():
            item = found.setdefault(name, {"fingerprint": 0, "moments": 0, "weight_decay": 0.0})
            item["fingerprint"] ^= int(partial, 16)
            item["moments"] += moments
            item["weight_decay"] = max(item["weight_decay"], decay)
    return {name: {**item, "fingerprint": f"{item['fingerprint']:032x}"} for name, item in found.items()}
