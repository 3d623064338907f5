"""`dckpt verify` of a foreign checkpoint: what it holds, what is missing, and what that does to training. Reads only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dckpt.findings import Finding
from dckpt.tools.components import CONSEQUENCES
from dckpt.tools.foreign import ForeignState, read_foreign
from dckpt.tools.foreign_torch import ForeignTensor
from dckpt.tools.refill import MOMENTS_LOST

RANKS_SHOWN = 16

Verdict = Literal["COMPLETE", "PARTIAL", "CORRUPT"]


@dataclass(frozen=True, slots=True)
class ForeignReport:
    """What a foreign checkpoint is good for, in the words of `dckpt verify`."""

    url: str
    verdict: Verdict
    step: int | None
    ranks: int
    components: tuple[tuple[str, bool, int, int], ...]
    """(name, whether it is there, tensors, bytes)."""
    damages: tuple[str, ...]
    findings: tuple[Finding, ...]


def verify_foreign(text: str) -> ForeignReport:
    """Reads every file of it. COMPLETE: weights, moments, scheduler, step, and random streams of every rank."""
    state = read_foreign(text)
    sizes = {
        "model": [len(tensor.data) for tensor in state.weights.values()],
        "optim": [len(tensor.data) for tensor in _tensors_in(state.optim)],
    }
    missing = _missing(state)
    names = ["model", "optim", "scheduler", "progress", "rng", *(["scaler"] if state.scaler else [])]
    rows = [(name, name not in missing, len(sizes.get(name, ())), sum(sizes.get(name, ()))) for name in names]
    findings = [_finding(name, why) for name, why in missing.items()]
    verdict: Verdict = "CORRUPT" if state.troubles else "PARTIAL" if missing else "COMPLETE"
    return ForeignReport(
        state.url, verdict, state.step, state.ranks, tuple(rows), tuple(state.troubles), tuple(findings)
    )


def _missing(state: ForeignState) -> dict[str, str]:
    """Part -> what is missing of it."""
    found = {}
    if not state.weights:
        found["model"] = "no weights"
    if not states_of(state.optim):
        found["optim"] = "no optimizer state" if state.optim is None else "an optimizer without moments"
    if state.scheduler is None:
        found["scheduler"] = "no scheduler state"
    if state.step is None:
        found["progress"] = "no step"
    lost = [rank for rank in range(state.ranks) if rank not in state.streams]
    if lost:
        of = "" if len(lost) == state.ranks else f" of rank{'s' * (len(lost) > 1)} {_shown(lost)}"
        found["rng"] = f"no random streams{of}"
    return found


def _shown(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - RANKS_SHOWN} more" if len(ranks) > RANKS_SHOWN else ""
    return f"{', '.join(map(str, ranks[:RANKS_SHOWN]))}{more}"


def _finding(name: str, why: str) -> Finding:
    consequence = MOMENTS_LOST if name == "optim" else CONSEQUENCES[name]
    return Finding(
        check="component",
        severity="warning",
        expected=f"{name} in the checkpoint",
        found=why,
        remedy="`dckpt import DIR RUN --fill` derives random streams; the rest cannot be made up.",
        message=f"No {name} ({why}): {consequence}.",
    )


def states_of(optim: Mapping[str, Any] | None) -> Mapping[Any, Any]:
    """The state of each parameter of an optimizer's state_dict, by its number; empty without one."""
    found = optim.get("state") if optim is not None else None
    return found if isinstance(found, Mapping) else {}


def _tensors_in(value: Any) -> list[ForeignTensor]:
    if isinstance(value, ForeignTensor):
        return [value]
    items: Sequence[Any] = ()
    if isinstance(value, Mapping):
        items = list(value.values())
    elif isinstance(value, (list, tuple)):
        items = value
    return [found for item in items for found in _tensors_in(item)]
