"""How far a run has come: steps, epochs, samples and losses, moved by one call after each optimizer step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch.distributed.tensor import DTensor

from dckpt.errors import ConfigError, CorruptCheckpointError
from dckpt.state.rng import preserved_rng

T = TypeVar("T")

# Device losses that wait to be converted; beyond this many they are converted at once, with one synchronisation.
_PENDING_MAX = 1000


@dataclass(frozen=True, slots=True)
class Batch:
    """One optimizer step's samples: `micro` per forward, times accumulation, times data-parallel ranks."""

    micro: int
    accumulation: int = 1
    data_parallel: int = 1

    def __post_init__(self) -> None:
        for name in ("micro", "accumulation", "data_parallel"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"Batch({name}={value!r}): expected an int of at least 1")

    @property
    def samples(self) -> int:
        """Samples per optimizer step over all ranks."""
        return self.micro * self.accumulation * self.data_parallel


class SampleSource(Protocol):
    """A sampler that `advance` moves; `ElasticDistributedSampler` is one."""

    def advance(self, samples: int | None = None) -> int:
        """One step further; returns its samples over all ranks, and refuses a count that is not that."""

    def take_finished_epochs(self) -> int:
        """How many epochs ended since this was asked last."""


@dataclass(frozen=True, slots=True)
class Leg:
    """A part of a run's life, on its own data: the counters' values when it began. `name` as given to `start_leg`."""

    name: str | None = None
    step: int = 0
    epoch: int = 0
    samples: int = 0


class TrainProgress:
    """Counts what is inside committed optimizer steps. Call `advance` after each of them.

    `step`, `epoch` and `samples` count over the run's whole life and never go back: they name checkpoints. A run has one or
    more legs (`Checkpointer.start_leg`: further training, usually on other data); `leg_step`, `leg_epoch` and `leg_samples`
    count from the beginning of the last one, and the limits `max_steps` and `max_epochs` are those of a leg.

    `history` is how many losses are kept. The limits and `batch` belong to the running job: they are saved for comparison and
    never overwritten by a load. Losses are kept over the legs, with their steps; the lowest one is kept for the life
    (`best_loss`) and for the leg (`leg_best_loss`), for losses on different data do not compare.
    """

    def __init__(
        self,
        *,
        max_steps: int | None = None,
        max_epochs: int | None = None,
        batch: Batch | None = None,
        history: int = 1000,
    ) -> None:
        for name, value in (("max_steps", max_steps), ("max_epochs", max_epochs), ("history", history)):
            if value is not None and (type(value) is not int or value < 0):
                raise ConfigError(f"TrainProgress({name}={value!r}): expected an int of at least 0, or nothing")
        if batch is not None and not isinstance(batch, Batch):
            raise ConfigError(f"TrainProgress(batch={batch!r}): expected a dckpt.Batch")
        self.max_steps = max_steps
        self.max_epochs = max_epochs
        self.batch = batch
        self.step = 0
        """Optimizer steps taken."""
        self.samples = 0
        """Samples over all ranks whose gradients are in a step taken."""
        self.micro_step = 0
        """Micro-batches since the last optimizer step, as `accumulate` counts them."""
        self.batch_history: list[tuple[int, int]] = []
        """(step, samples per step): from this step on, until the next entry. Appended when it changes."""
        self._history = history
        self._settled: list[tuple[int, float]] = []
        self._pending: list[tuple[int, torch.Tensor]] = []
        self._best: float | None = None
        self._leg_best: float | None = None
        self._epoch = 0
        self._legs = [Leg()]
        self._sources: list[SampleSource] = []

    # What moves it.

    def draw_from(self, *sources: SampleSource) -> None:
        """From now on `advance` moves these samplers and no others; they say how many samples a step has.

        `TrainState(data=sampler, progress=progress)` calls it. Every one is moved by each step, and the first one counts the
        epochs.
        """
        self.epoch = self.epoch  # what the samplers until now finished is counted; these begin to count now
        self._sources = list(sources)

    def advance(self, loss: Any = None, samples: int | None = None) -> None:
        """One more optimizer step. A tensor loss is kept as it is, without waiting for the device.

        `samples`: over all ranks; left out, the sampler's step if it draws from one, else the batch's.
        """
        if samples is not None and (type(samples) is not int or samples < 0):
            raise ConfigError(f"TrainProgress.advance(samples={samples!r}): expected an int of at least 0")
        kept = _kept_loss(loss)
        count = self._count(samples)
        if count is not None:
            if not self.batch_history or self.batch_history[-1][1] != count:
                self.batch_history.append((self.step, count))
            self.samples += count
        self.step += 1
        self.micro_step = 0
        if isinstance(kept, torch.Tensor):
            self._pending.append((self.step, kept))
            if len(self._pending) >= _PENDING_MAX:
                self._settle()
        elif kept is not None:
            self._settle()
            self._note(self.step, kept)

    def _count(self, samples: int | None) -> int | None:
        if self._sources:
            given = samples if len(self._sources) == 1 else None
            return sum(source.advance(given) for source in self._sources)
        return samples if samples is not None or self.batch is None else self.batch.samples

    def accumulate(self) -> bool:
        """One more micro-batch is in the gradients: call it after its backward(). True when the optimizer step is due.

        Between two such calls `Checkpointer.save` stores the gradients. After a resume `micro_step` says how many
        micro-batches of the step are in the restored gradients: those are not computed again (`unconsumed`), and
        `optimizer.zero_grad()` belongs after an optimizer step, not before the first micro-batch.
        """
        if self.batch is None:
            raise ConfigError(
                "TrainProgress.accumulate: expected to know how many micro-batches make a step, found no batch. Give "
                "TrainProgress(batch=Batch(micro=..., accumulation=...)), or count in progress.micro_step yourself."
            )
        if self.micro_step >= self.batch.accumulation:
            raise ConfigError(
                f"TrainProgress.accumulate: expected at most {self.batch.accumulation} micro-batches a step, found one more. "
                "Call progress.advance() after each optimizer.step()."
            )
        self.micro_step += 1
        return self.micro_step == self.batch.accumulation

    def unconsumed(self, micro_batches: Iterable[T]) -> Iterator[T]:
        """The micro-batches from here on: those of the running step that are in the gradients already are left out.

        `micro_batches` begins with the running step, as a loader does whose position counts optimizer steps. What is
        left out is fetched, and leaves the global random streams where they are. A sampler that this progress draws from has
        left them out itself, so nothing is left out here.
        """
        if not self.micro_step or self._sources:
            return iter(micro_batches)
        with preserved_rng():
            found = iter(micro_batches)
            for number in range(self.micro_step):
                if next(found, self) is self:
                    raise ConfigError(
                        f"TrainProgress.unconsumed: expected the {self.micro_step} micro-batches of the running step that are "
                        f"in the gradients, found {number}. Give it the loader of this step's data."
                    )
            return found

    def finish_epoch(self) -> None:
        """One more epoch is complete. Does nothing if a sampler counts the epochs: it knows when one ends."""
        if not self._sources:
            self._epoch += 1

    def begin_leg(self, name: str | None = None) -> None:
        """The leg's counters begin at zero, those of the life go on. `Checkpointer.start_leg` calls it."""
        self._settle()
        self._legs.append(Leg(name, self.step, self.epoch, self.samples))
        self._leg_best = None

    # What it says.

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        for number, source in enumerate(self._sources):
            finished = source.take_finished_epochs()
            self._epoch += finished if number == 0 else 0
        return self._epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        for source in self._sources:
            source.take_finished_epochs()
        self._epoch = value

    @property
    def legs(self) -> tuple[Leg, ...]:
        """All legs, the present one last."""
        return tuple(self._legs)

    @property
    def leg(self) -> int:
        """The number of the present leg, from 1."""
        return len(self._legs)

    @property
    def leg_step(self) -> int:
        """Optimizer steps of this leg."""
        return self.step - self._legs[-1].step

    @property
    def leg_epoch(self) -> int:
        """Epochs finished in this leg."""
        return self.epoch - self._legs[-1].epoch

    @property
    def leg_samples(self) -> int:
        """Samples of this leg, over all ranks."""
        return self.samples - self._legs[-1].samples

    @property
    def done(self) -> bool:
        """A limit of the leg is reached."""
        steps_done = self.max_steps is not None and self.leg_step >= self.max_steps
        return steps_done or (self.max_epochs is not None and self.leg_epoch >= self.max_epochs)

    @property
    def loss_history(self) -> list[tuple[int, float]]:
        """(step, loss) of the last steps, at most `history`. Waits for the device."""
        self._settle()
        return list(self._settled)

    @property
    def losses(self) -> list[float]:
        """The losses of `loss_history`. Waits for the device."""
        return [loss for _, loss in self.loss_history]

    @property
    def best_loss(self) -> float | None:
        """The lowest loss so far that was a number. Waits for the device."""
        self._settle()
        return self._best

    @property
    def leg_best_loss(self) -> float | None:
        """The lowest loss of this leg that was a number. Waits for the device."""
        self._settle()
        return self._leg_best

    # The state.

    def state_dict(self) -> dict[str, Any]:
        """The counters and histories; waits for the device if losses lie there."""
        self._settle()
        batch = self.batch
        return {
            "step": self.step,
            "epoch": self.epoch,
            "samples": self.samples,
            "micro_step": self.micro_step,
            "legs": [[leg.name, leg.step, leg.epoch, leg.samples] for leg in self._legs],
            "best_loss": self._best,
            "leg_best_loss": self._leg_best,
            "loss_history": [[step, loss] for step, loss in self._settled],
            "batch_history": [[step, samples] for step, samples in self.batch_history],
            "max_steps": self.max_steps,
            "max_epochs": self.max_epochs,
            "batch": None if batch is None else [batch.micro, batch.accumulation, batch.data_parallel],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the counters and histories back; the limits and the batch stay the running job's."""
        counters = {name: _counter(state_dict, name) for name in ("step", "epoch", "samples", "micro_step")}
        losses = [(step, float(loss)) for step, loss in _pairs(state_dict, "loss_history", (int, float))]
        batches = [(step, int(samples)) for step, samples in _pairs(state_dict, "batch_history", (int,))]
        best = _loss_or_none(state_dict, "best_loss")
        legs = _legs(state_dict, counters)
        # Before there were legs, the life was one.
        leg_best = _loss_or_none(state_dict, "leg_best_loss") if "legs" in state_dict else best
        for name in ("step", "samples", "micro_step"):
            setattr(self, name, counters[name])
        # Not through `epoch`: a sampler that was loaded before may have found that one more epoch is over.
        self._epoch = counters["epoch"]
        self._legs = legs
        self._leg_best = leg_best
        self._pending = []
        self._settled = losses[len(losses) - min(self._history, len(losses)) :]
        self.batch_history = batches
        self._best = best

    def _settle(self) -> None:
        if not self._pending:
            return
        steps, tensors = zip(*self._pending, strict=True)
        self._pending = []
        # One transfer for all losses of a device, not one synchronisation each.
        places = {tensor.device for tensor in tensors}
        values: dict[int, float] = {}
        for place in places:
            chosen = [i for i, tensor in enumerate(tensors) if tensor.device == place]
            stacked = torch.stack([tensors[i].reshape(()).double() for i in chosen])
            values.update(zip(chosen, stacked.tolist(), strict=True))
        for i, step in enumerate(steps):
            self._note(step, values[i])

    def _note(self, step: int, loss: float) -> None:
        self._settled.append((step, loss))
        excess = len(self._settled) - self._history
        if excess > 0:
            del self._settled[:excess]
        if math.isnan(loss):
            return
        self._best = loss if self._best is None else min(self._best, loss)
        if step > self._legs[-1].step:
            self._leg_best = loss if self._leg_best is None else min(self._leg_best, loss)


def batch_of(progress: TrainProgress) -> tuple[int, int, int] | None:
    """(micro, accumulation, data_parallel) of the running job, if it says so."""
    batch = progress.batch
    return None if batch is None else (batch.micro, batch.accumulation, batch.data_parallel)


def micro_batches(progress: TrainProgress) -> int:
    """Micro-batches of one optimizer step; 1 where nobody said."""
    return 1 if progress.batch is None else progress.batch.accumulation


def accumulation_of(record: Any) -> tuple[int, tuple[int, ...] | None] | None:
    """(micro_step, batch) of a saved record of a `TrainProgress`; None if it is a record of something else."""
    state = record.get("state") if isinstance(record, dict) else None
    if not isinstance(state, dict) or "micro_step" not in state:
        return None
    batch = state.get("batch")
    is_batch = isinstance(batch, list) and len(batch) == 3 and all(type(n) is int and n > 0 for n in batch)
    if batch is not None and not is_batch:
        raise _damaged("batch", "three ints of at least 1, or nothing", batch)
    return _counter(state, "micro_step"), None if batch is None else tuple(batch)


def saved_legs(record: Any) -> tuple[list[str | None], int] | None:
    """(names of the legs, micro_step) of a saved record of a `TrainProgress`; None if it is a record of something else."""
    found = accumulation_of(record)
    if found is None:
        return None
    state = record["state"]
    counters = {name: _counter(state, name) for name in ("step", "epoch", "samples")}
    return [leg.name for leg in _legs(state, counters)], found[0]


def _kept_loss(loss: Any) -> torch.Tensor | float | None:
    if loss is None:
        return None
    if isinstance(loss, torch.Tensor):
        if isinstance(loss, DTensor):
            if not all(placement.is_replicate() for placement in loss.placements):
                raise ConfigError(
                    f"TrainProgress.advance: the loss is a DTensor with placements {loss.placements}. "
                    "Pass loss.full_tensor()"
                )
            loss = loss.to_local()
        if loss.numel() != 1:
            raise ConfigError(f"TrainProgress.advance: the loss has shape {tuple(loss.shape)}. Pass its mean")
        # Cloned: a captured graph writes every step's loss into the same memory.
        kept: torch.Tensor = loss.detach().clone()
        return kept
    try:
        return float(loss)
    except (TypeError, ValueError):
        raise ConfigError(
            f"TrainProgress.advance(loss={type(loss).__name__}): expected a number or a tensor of one element"
        ) from None


def _damaged(name: str, expected: str, found: object) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"progress: field {name!r}: expected {expected}, found {found!r:.80}. Use an older checkpoint",
        field=f"progress.{name}",
        expected=expected,
        found=f"{found!r:.80}",
    )


def _counter(record: dict[str, Any], name: str) -> int:
    value = record.get(name)
    if type(value) is not int or value < 0:
        raise _damaged(name, "an int of at least 0", value)
    return value


def _loss_or_none(record: dict[str, Any], name: str) -> float | None:
    value = record.get(name)
    if value is not None and type(value) is not float:
        raise _damaged(name, "a float or nothing", value)
    return value


def _legs(record: dict[str, Any], counters: dict[str, int]) -> list[Leg]:
    """The saved legs; one from the beginning in a checkpoint of a version that knew none."""
    if "legs" not in record:
        return [Leg()]
    value = record["legs"]
    if not isinstance(value, list) or not value:
        raise _damaged("legs", "a list of legs", value)
    limits = (counters["step"], counters["epoch"], counters["samples"])
    for found in value:
        is_leg = isinstance(found, list) and len(found) == 4 and (found[0] is None or isinstance(found[0], str))
        if not is_leg or not all(
            type(count) is int and 0 <= count <= limit for count, limit in zip(found[1:], limits, strict=True)
        ):
            raise _damaged("legs", "a name and three counters that are not ahead of the life's", found)
    return [Leg(*found) for found in value]


def _pairs(record: dict[str, Any], name: str, kinds: tuple[type, ...]) -> list[tuple[int, Any]]:
    value = record.get(name)
    if not isinstance(value, list):
        raise _damaged(name, "a list of pairs", value)
    for pair in value:
        if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) is not int or type(pair[1]) not in kinds:
            raise _damaged(name, "pairs of a step and a number", pair)
    return [(pair[0], pair[1]) for pair in value]
