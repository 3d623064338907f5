"""What a rank finds out about the values of its own shards: finite, not lost, coherent. Reads; changes nothing.

Coherence of Adam's averages (check `moments_coherent`): m and v are exponential averages of the same gradients and of their
squares, so by the Cauchy-Schwarz inequality |m| <= c sqrt(v) with c^2 = (1 - b1)^2 / ((1 - b2) (1 - b1^2 / b2)), if b1^2 < b2
and both are constant. A v that belongs to another parameter breaks it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dckpt.state.fingerprints import LiveFingerprint
from dckpt.state.records import NamedTensor
from dckpt.state.train_state import TrainState

FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
SAMPLE_ELEMENTS = 2**18
"""Elements of a tensor that the three-pass check looks at; a larger one is sampled in runs spread over it."""
RUN_ELEMENTS = 2**15
LOOKED_AT = ("model", "optim", "ema")
"""Parts whose values are looked at; what extras hold only their owner can judge."""
FLOOR = 1e-15
NAMES_MAX = 200


@dataclass
class _Found:
    nonfinite: list[str] = field(default_factory=list)
    negative: list[str] = field(default_factory=list)
    zero: list[str] = field(default_factory=list)
    moments: dict[str, list[int]] = field(default_factory=dict)
    incoherent: list[list[Any]] = field(default_factory=list)
    checked: int = 0


def value_facts(state: TrainState, tensors: Sequence[NamedTensor]) -> dict[str, Any]:
    """What is wrong with this rank's shards of `tensors` (`state.capture().tensors`), by name.

    moments: kind of moment -> how many tensors of it are zero everywhere, and how many there are.
    """
    found = _Found()
    with torch.no_grad():
        for item in tensors:
            _look_at(item, found)
        for key, optimizer in enumerate(state.optimizers):
            _compare_moments(state, optimizer, key, found)
    return {
        "nonfinite": _named(found.nonfinite),
        "negative": _named(found.negative),
        "zero_moments": _named(found.zero),
        "moments": found.moments,
        "incoherent": sorted(found.incoherent, key=lambda row: -float(row[1]))[:NAMES_MAX],
        "coherence_checked": found.checked,
    }


def average_is_weights(state: TrainState, live: Mapping[str, LiveFingerprint]) -> bool | None:
    """Whether what this rank holds of the average is what it holds of the trained weights; None if it cannot be compared.

    live: what this rank holds of each tensor.
    """
    trained = {
        f"model.{name}" for found in state.optimizer_states().values() for group in found.groups for name, _ in group
    }
    pairs = [(live[name], live[model]) for name in live if (model := _averaged(name, trained)) in live]
    comparable = [(mean, weight) for mean, weight in pairs if mean.dtype == weight.dtype]
    return all(mean.value == weight.value for mean, weight in comparable) if comparable else None


def _averaged(name: str, trained: Collection[str]) -> str:
    """The weight of which a tensor of the average is the mean, "" if none; wrappers put names in front of it."""
    part, _, rest = name.partition(".")
    while part == "ema" and rest:
        if f"model.{rest}" in trained:
            return f"model.{rest}"
        rest = rest.partition(".")[2]
    return ""


def _named(names: list[str]) -> dict[str, Any]:
    return {"count": len(names), "names": names[:NAMES_MAX]}


def _look_at(item: NamedTensor, found: _Found) -> None:
    local = _local(item.tensor)
    if item.name.partition(".")[0] not in LOOKED_AT:
        return
    if not local.numel() or not (local.is_floating_point() or local.is_complex()):
        return
    if local.element_size() < 2:
        local = local.float()  # torch has no norm of 8-bit floats
    last = item.name.rpartition(".")[2]
    is_squares = item.name.startswith("optim.") and last in SECOND_MOMENTS
    is_variance = item.name.startswith("model.") and last == "running_var"
    if (is_squares or is_variance) and not local.is_complex():
        # One pass tells all of it; a NaN anywhere comes out as both.
        lowest, highest = torch.stack(torch.aminmax(local)).tolist()
        if lowest < 0:
            found.negative.append(item.name)
        is_finite, is_zero = math.isfinite(lowest) and math.isfinite(highest), lowest == highest == 0
    else:
        size = float(torch.linalg.vector_norm(local))
        # A norm may overflow although every element is finite.
        is_finite, is_zero = math.isfinite(size) or bool(torch.isfinite(local).all()), size == 0
    if not is_finite:
        found.nonfinite.append(item.name)
    if item.name.startswith("optim.") and last in FIRST_MOMENTS + SECOND_MOMENTS:
        counts = found.moments.setdefault(last, [0, 0])
        counts[0] += is_zero
        counts[1] += 1
        if is_zero:
            found.zero.append(item.name)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _compare_moments(state: TrainState, optimizer: Optimizer, number: int, found: _Found) -> None:
    names = list(state.optimizer_states().values())[number]
    for group, members in zip(optimizer.param_groups, names.groups, strict=True):
        bound = moment_bound(group.get("betas"))
        if bound is None:
            continue
        for name, parameter in members:
            held = optimizer.state.get(parameter, {})
            m, v = held.get("exp_avg"), held.get("exp_avg_sq")
            if not isinstance(m, torch.Tensor) or not isinstance(v, torch.Tensor) or m.shape != v.shape:
                continue
            m, v = _local(m), _local(v)
            if m.numel() == 0 or m.shape != v.shape or m.is_complex() or v.element_size() < 2:
                continue
            found.checked += 1
            worst, beyond, looked_at = worst_ratio(m, v, bound)
            tolerance = 1.02 if m.dtype is not torch.float32 and m.dtype is not torch.float64 else 1.001
            if not worst <= tolerance and math.isfinite(worst):  # what is not finite is told as such
                found.incoherent.append([f"{names.prefix}.{name}", worst, beyond / looked_at])


def moment_bound(betas: Any) -> float | None:
    """c in |m| <= c sqrt(v), or None where the inequality does not hold."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        return None
    first, second = float(betas[0]), float(betas[1])
    if not 0 <= first < 1 or not 0 < second < 1 or first * first >= second:
        return None
    return math.sqrt((1 - first) ** 2 / ((1 - second) * (1 - first * first / second)))


def worst_ratio(m: torch.Tensor, v: torch.Tensor, bound: float) -> tuple[float, int, int]:
    """Of a sample: the largest |m| / (bound sqrt(v)) if it is above 1, how many elements are beyond 1.02, how many there are."""
    worst, beyond, looked_at = 0.0, 0, 0
    for first, last in sample_runs(m.numel()):
        looked_at += last - first
        sample_m = m.reshape(-1)[first:last].float()
        sample_v = v.reshape(-1)[first:last].float()
        # Nearly all runs are coherent throughout, which one fused product shows: squared, without roots.
        if bool(torch.addcmul(sample_v * (-bound * bound), sample_m, sample_m).amax() <= 0):
            continue
        sample_m = sample_m.abs()
        limit = sample_v.clamp(min=0).sqrt().mul_(bound)
        # Below the floor both are rounding; and where m underflowed there is nothing to compare.
        ratio = torch.where(sample_m > FLOOR, sample_m / limit.clamp(min=FLOOR * 1e-3), torch.zeros_like(sample_m))
        worst = max(worst, float(ratio.max()))
        beyond += int((ratio > 1.02).sum())
    return worst, beyond, looked_at


def sample_runs(elements: int) -> Iterator[tuple[int, int]]:
    """Ranges to look at: all of a small tensor; of a large one runs spread evenly, the first and the last among them."""
    if elements <= SAMPLE_ELEMENTS:
        yield 0, elements
        return
    runs = SAMPLE_ELEMENTS // RUN_ELEMENTS
    stride = (elements - RUN_ELEMENTS) / (runs - 1)
    for number in range(runs):
        first = round(number * stride)
        yield first, first + RUN_ELEMENTS
