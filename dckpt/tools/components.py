"""Which parts of a training state a checkpoint holds, and what training without the others will look like."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from dckpt.format.accumulation import GRADIENTS
from dckpt.format.manifest import Manifest
from dckpt.format.shard_file import DTYPES

_PER_RANK = re.compile(r"rank\.(\d+)\.(.+)")

CONSEQUENCES: Mapping[str, str] = {
    "model": "there are no weights: training starts from its initialisation",
    "optim": "moments restart at zero; expect a loss spike",
    "scheduler": "the learning rate restarts at the beginning of its schedule, if the run has one",
    "progress": "step and sample counts restart at zero",
    "data": "the data order starts over: samples are repeated",
    "rng": "random streams restart: dropout and shuffling differ from the uninterrupted run",
    "grad": "the gradients of a started accumulation were dropped: that optimizer step begins again",
    "scaler": "the loss scale restarts at its initial value: the first steps may overflow and be skipped",
}
"""The components of a complete training state, in the order in which they are listed."""

_OTHER_NAMES = {"optimizer": "optim", "optimizers": "optim", "models": "model"}


@dataclass(frozen=True, slots=True)
class Component:
    """One part of the training state: what the checkpoint holds of it, and what its absence means."""

    name: str
    is_present: bool
    num_tensors: int
    num_bytes: int
    num_ranks: int
    """Ranks that stored a record of their own for it; 0 when every rank shares one."""
    consequence: str
    """Empty unless the component is missing and training will feel it."""


@dataclass(slots=True)
class _Count:
    tensors: int = 0
    num_bytes: int = 0


def component_of(tensor: str) -> tuple[str, int | None]:
    """The component that a stored tensor belongs to, and the rank when it is a per-rank record."""
    rank: int | None = None
    found = _PER_RANK.fullmatch(tensor)
    if found:
        rank, tensor = int(found[1]), found[2].removeprefix("values.")
    name = tensor.split(".", 1)[0]
    return _OTHER_NAMES.get(name, name), rank


def list_components(manifest: Manifest, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[Component, ...]:
    """Every component of the checkpoint, the expected ones first; `tensors`: (name, dtype, global shape)."""
    counts: dict[str, _Count] = {}
    ranks: dict[str, set[int]] = {}
    for tensor, dtype, shape in tensors:
        name, rank = component_of(tensor)
        count = counts.setdefault(name, _Count())
        count.tensors += 1
        count.num_bytes += prod(shape) * DTYPES[dtype]
        if rank is not None:
            ranks.setdefault(name, set()).add(rank)
    present = _present_names(manifest) | set(counts)
    names = [*CONSEQUENCES, *sorted(present - set(CONSEQUENCES))]
    return tuple(
        Component(
            name=name,
            is_present=name in present,
            num_tensors=counts[name].tensors if name in counts else 0,
            num_bytes=counts[name].num_bytes if name in counts else 0,
            num_ranks=len(ranks.get(name, ())),
            consequence="" if name in present else CONSEQUENCES[name],
        )
        for name in names
        if name in present or _is_expected(name, manifest)
    )


def is_training_state(manifest: Manifest) -> bool:
    """Whether the writer was given a `TrainState`. What `dcp.save` was handed, nobody can call incomplete."""
    return bool(manifest.parts) and manifest.planner_data is None


def missing_components(components: Iterable[Component]) -> tuple[Component, ...]:
    """The expected components that the checkpoint lacks."""
    return tuple(component for component in components if not component.is_present)


def _present_names(manifest: Manifest) -> set[str]:
    keys = [*manifest.parts, *manifest.values, *manifest.rank_values]
    if manifest.rng:
        keys.append("rng")
    roots = {key.split(".", 1)[0] for key in keys}
    return {_OTHER_NAMES.get(root, root) for root in roots}


def _is_expected(name: str, manifest: Manifest) -> bool:
    if not is_training_state(manifest):
        return False
    if name == GRADIENTS:
        return manifest.micro_step > 0
    # Only float16 training scales its loss; a bf16 or fp32 run without a scaler lacks nothing.
    return name != "scaler" or _trains_in_float16(manifest)


def _trains_in_float16(manifest: Manifest) -> bool:
    return any(value in ("float16", "fp16") for value in _leaves(manifest.facts))


def _leaves(value: object) -> Iterable[object]:
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value
