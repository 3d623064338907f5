"""The facts of a run: a checkpoint carries them, and a resume compares them with those of the run that goes on."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from dckpt.errors import ConfigError
from dckpt.format.checksum import digest_bytes
from dckpt.format.values import encode_value
from dckpt.resume.facts.code import code_facts
from dckpt.resume.facts.environment import library_facts, precision_facts, world_facts
from dckpt.resume.facts.model import ModelFacts
from dckpt.resume.facts.plain import finite
from dckpt.resume.facts.training import (
    by_key,
    optimizer_facts,
    plain_number,
    scaler_facts,
    step_counters,
    untouched_scheduler_facts,
)
from dckpt.state.naming import DTYPE_NAMES
from dckpt.state.records import Captured
from dckpt.state.train_state import TrainState

log = logging.getLogger(__name__)


class FactCollector:
    """Collects facts of one run again and again. Changes nothing, waits for no device, talks to nobody."""

    def __init__(self, world_size: int = 1) -> None:
        self._world_size = world_size
        self._models = ModelFacts()
        self._told: set[str] = set()

    def collect(self, state: TrainState, captured: Captured | None = None) -> dict[str, Any]:
        """All facts that are there; JSON. `captured`: what is being saved, None to leave names and shapes out.

        A section that cannot be collected is left out and said once: a checkpoint without a fact is better than none.
        """
        models, optimizers = state.models(), state.optimizer_states()
        sections: dict[str, Callable[[], Any]] = {
            "user": lambda: encode_value(dict(state.facts), path="facts") if state.facts else None,
            "batch": lambda: _batch(state),
            "max_steps": lambda: getattr(state.progress, "max_steps", None),
            "max_epochs": lambda: getattr(state.progress, "max_epochs", None),
            "progress": lambda: progress_facts(state),
            "world": lambda: world_facts(state.mesh, self._world_size),
            "model": lambda: self._models.collect(models),
            "optim": lambda: optimizer_facts(optimizers),
            "scheduler": lambda: untouched_scheduler_facts(state),
            "scaler": lambda: scaler_facts(state),
            "steps": lambda: {key: step_counters(found.optimizer, may_wait=False) for key, found in optimizers.items()},
            "data": lambda: data_facts(state),
            "precision": lambda: precision_facts(models),
            "versions": lambda: dict(library_facts()),
            "code": lambda: dict(code_facts()),
            "parts": lambda: list(state.parts),
            "ema": lambda: ema_facts(state),
            "tensors": lambda: None if captured is None else tensor_facts(captured),
        }
        found = {name: self._section(name, collect) for name, collect in sections.items()}
        return {name: value for name, value in found.items() if value is not None}

    def _section(self, name: str, collect: Callable[[], Any]) -> Any:
        try:
            return finite(collect())
        except ConfigError:
            if name == "user":  # the caller's own values, which the caller wants to be saved
                raise
            self._tell(name, "no plain values")
            return None
        except Exception as error:  # noqa: BLE001 - the user's objects may answer anything; the save matters more
            self._tell(name, f"{type(error).__name__}: {error}")
            return None

    def _tell(self, name: str, why: str) -> None:
        if name not in self._told:
            self._told.add(name)
            log.warning("facts about %s are not recorded: %s", name, why)


def _batch(state: TrainState) -> dict[str, int] | None:
    batch = getattr(state.progress, "batch", None)
    if batch is None:
        return None
    return {"micro": batch.micro, "accumulation": batch.accumulation, "data_parallel": batch.data_parallel}


def progress_facts(state: TrainState) -> dict[str, Any] | None:
    """The counters, without the loss history."""
    progress = state.progress
    if progress is None:
        return None
    names = ("step", "epoch", "samples", "micro_step", "leg", "leg_step", "leg_epoch", "leg_samples")
    found = {name: getattr(progress, name) for name in names if isinstance(getattr(progress, name, None), int)}
    history = getattr(progress, "batch_history", None)
    if history:
        found["batch_history"] = [list(entry) for entry in history[-1000:]]
        found["batch_changes"] = len(history)
    return found


def data_facts(state: TrainState) -> dict[str, Any]:
    """What the samplers and loaders say of themselves through `facts()`, by key."""
    found = {}
    for key, item in by_key(state.data).items():
        tell = getattr(item, "facts", None)
        told = tell() if callable(tell) else None
        if isinstance(told, Mapping):  # anything else is a method of that name with another meaning
            found[key] = encode_value(dict(told), path=f"data[{key!r}].facts()")
    return found


def ema_facts(state: TrainState) -> dict[str, Any] | None:
    """The update counter of an average, under the names that libraries give it."""
    ema = state.ema
    if ema is None:
        return None
    counter = None
    for name in ("n_averaged", "num_updates", "optimization_step", "updates", "step"):
        value = getattr(ema, name, None)
        if value is None and isinstance(ema, Mapping):
            value = ema.get(name)
        value = plain_number(value)
        if isinstance(value, (int, float)):
            counter = int(value)
            break
    return {"class": type(ema).__name__, "updates": counter}


def tensor_facts(captured: Captured) -> dict[str, Any]:
    """Per part: how many tensors, how many of each dtype, a digest over names, dtypes and shapes."""
    rows: dict[str, list[str]] = defaultdict(list)
    dtypes: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for item in captured.tensors:
        part, dtype = item.name.partition(".")[0], DTYPE_NAMES[item.tensor.dtype]
        rows[part].append(f"{item.name} {dtype} {tuple(item.tensor.shape)}")
        dtypes[part][dtype] += 1
    return {
        part: {
            "count": len(found),
            "dtypes": dict(sorted(dtypes[part].items())),
            "digest": digest_bytes("\n".join(sorted(found)).encode()),
        }
        for part, found in rows.items()
    }
