"""torchdata's `StatefulDataLoader` under dckpt's rules: elastic where its sampler allows it, refused by name where not.

Its own state counts what each rank yielded, so on another number of ranks it repeats samples or leaves some out, and says
nothing. torchdata is not imported: what a loader is, it shows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DistributedSampler, IterableDataset

from dckpt.data.position import Position
from dckpt.data.sampler import (
    BatchShape,
    ElasticDistributedSampler,
    MicroBatches,
    ProgressLike,
    ensure_same_batch,
    micro_steps_of,
    nothing_skipped,
    position_of,
    shape_of,
)
from dckpt.errors import ConfigError, IncompatibleStateError

log = logging.getLogger(__name__)

_ORDER = "torch.randperm"
"""The order of torch's DistributedSampler. torch does not promise it, so the fingerprint of an order is not ours to give."""
_NEW_DATA = "For other data begin a leg: checkpointer.start_leg(state) in place of resume"


def adapt_loader(loader: Any, *, batch: BatchShape) -> InterleavedLoader | FixedLoader:
    """What to iterate over, and to give to `TrainState(data=)`, in place of a `StatefulDataLoader`.

    With a `StatefulDistributedSampler` over a map-style data set: an `InterleavedLoader`, good for any number of ranks. With
    anything else (iterable data, a sampler or shuffle buffer of each rank): a `FixedLoader`, good for the same number of ranks
    and workers. A loader with an `ElasticDistributedSampler` needs no adapter, and is refused.
    """
    for name in ("state_dict", "load_state_dict", "sampler", "num_workers", "dataset"):
        if not hasattr(loader, name):
            raise ConfigError(
                f"adapt_loader: expected a torchdata StatefulDataLoader, found {type(loader).__name__} without {name}. Give a "
                "stock DataLoader an ElasticDistributedSampler"
            )
    if isinstance(loader.sampler, ElasticDistributedSampler) or isinstance(loader.batch_sampler, MicroBatches):
        raise ConfigError(
            "adapt_loader: this loader has an ElasticDistributedSampler, which holds the position. Iterate over the loader and "
            "pass TrainState(data=sampler)"
        )
    if isinstance(loader.sampler, DistributedSampler) and not isinstance(loader.dataset, IterableDataset):
        return InterleavedLoader(loader, batch)
    return FixedLoader(loader, batch)


class InterleavedLoader:
    """A loader whose sampler deals one order out to the ranks in turn; its position is that of all ranks together.

    As with `ElasticDistributedSampler` the position moves by `progress.advance()`, epochs follow by themselves (`set_epoch` is
    called here), and what makes no whole step at the end of an epoch is left out: so torch's padding is never reached. After
    a change of ranks the loader can begin at whole rows alone; if the position is none, up to a row less one sample is
    repeated, which is told. Resuming costs the sampler's own permutation of the whole data set.
    """

    def __init__(self, loader: Any, batch: BatchShape) -> None:
        self._loader = loader
        self._sampler = loader.sampler
        self._micro, self._accumulation, self._ranks = shape_of(batch)
        self._step = self._micro * self._accumulation * self._ranks
        self._place = Position(len(self._sampler.dataset))
        self._skipped: Callable[[], int] = nothing_skipped
        self._finished = 0
        self.repeated = 0
        """Samples that come twice because the position of the last load was no whole row of this run's ranks."""
        for what, expected, found in (
            ("loader.batch_size", self._micro, loader.batch_size),
            ("sampler.num_replicas", self._ranks, self._sampler.num_replicas),
        ):
            if expected != found:
                raise ConfigError(f"adapt_loader: expected {what}={expected} as in the batch, found {found}")
        if not callable(getattr(self._sampler, "load_state_dict", None)):
            raise ConfigError(
                f"adapt_loader: expected a sampler that can begin in the middle, found {type(self._sampler).__name__}. Use "
                "torchdata's StatefulDistributedSampler, or dckpt.ElasticDistributedSampler"
            )
        if not self._place.next_step(self._step, "drop"):
            raise ConfigError(
                f"adapt_loader: expected at least one global batch of {self._step} samples, found {self._place.size}"
            )

    @property
    def epoch(self) -> int:
        """The epoch under way, from 0."""
        return self._place.epoch

    @property
    def cursor(self) -> int:
        """Samples of this epoch, over all ranks, that are inside optimizer steps."""
        return self._place.cursor

    def __iter__(self) -> Iterator[Any]:
        """This rank's micro-batches from the position to the end of the epoch."""
        place, skipped = self._place, self._skipped()
        count = place.effective(self._step, "drop") - place.cursor
        self._sampler.set_epoch(place.epoch)
        self._sampler.load_state_dict({"yielded": place.cursor // self._ranks + skipped * self._micro})
        micro_batches = iter(self._loader)
        yield from islice(micro_batches, count // (self._ranks * self._micro) - skipped)
        for _ in micro_batches:  # what makes no whole step, less than one: the loader's workers end in order
            pass

    def __len__(self) -> int:
        """How many micro-batches a pass from the position on yields."""
        return (self._place.size - self._place.cursor) // self._step * self._accumulation - self._skipped()

    def follow_progress(self, progress: ProgressLike) -> None:
        """`TrainState` calls it; see `ElasticDistributedSampler`. `ConfigError` if the progress is of another kind or batch."""
        ensure_same_batch(progress, (self._micro, self._accumulation, self._ranks), what="an adapted loader")
        self._skipped = micro_steps_of(progress)

    def __getstate__(self) -> dict[str, Any]:
        """A copy follows no progress until a `TrainState` links it."""
        return {**self.__dict__, "_skipped": nothing_skipped}

    def advance(self, samples: int | None = None) -> int:
        """One more step is trained on; called by `progress.advance()`."""
        if samples is not None and samples != self._step:
            raise ConfigError(f"progress.advance(samples={samples!r}): expected {self._step}, the global batch")
        self._move_to(self._place.moved(self._step))
        return self._step

    def take_finished_epochs(self) -> int:
        """How many epochs ended since this was asked last."""
        finished, self._finished = self._finished, 0
        return finished

    def restart(self) -> None:
        """Back to epoch 0, sample 0."""
        self._place, self._finished, self.repeated = Position(self._place.size), 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Plain values; equal on every rank."""
        return {
            "layout": "interleaved",
            "order_version": _ORDER,
            "seed": self._sampler.seed,
            "shuffle": self._sampler.shuffle,
            "size": self._place.size,
            "epoch": self._place.epoch,
            "cursor": self._place.cursor,
            "global_batch": self._step,
        }

    def facts(self) -> dict[str, Any]:
        """What a resume compares."""
        return {**self.state_dict(), "n_eff": self._place.effective(self._step, "drop"), "repeated": self.repeated}

    def differences(self, state_dict: dict[str, Any]) -> list[str]:
        """Why the saved position means nothing in this loader's order; empty if it fits."""
        own = self.state_dict()
        found = [
            f"{name} {state_dict.get(name)!r} in the checkpoint, {own[name]!r} live. Build the loader as it was saved. "
            f"{_NEW_DATA}"
            for name in ("layout", "order_version", "seed", "shuffle", "size")
            if state_dict.get(name) != own[name]
        ]
        if not found:
            position_of(state_dict, self._place.size)
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved position on any number of ranks. `IncompatibleStateError` if it belongs to another order."""
        _ensure_fits(self.differences(state_dict))
        place = position_of(state_dict, self._place.size)
        self.repeated = place.cursor % self._ranks
        if self.repeated:
            log.warning(
                "data: position %d is no whole row of %d ranks: %d samples come twice in epoch %d. Keep the global batch a "
                "multiple of the number of ranks, or use an ElasticDistributedSampler",
                place.cursor,
                self._ranks,
                self.repeated,
                place.epoch,
            )
        self._finished = 0
        self._move_to(Position(place.size, place.epoch, place.cursor - self.repeated))

    def _move_to(self, place: Position) -> None:
        self._place = place.settled(self._step, "drop")
        self._finished += self._place.epoch - place.epoch


class FixedLoader:
    """A loader whose position has a meaning on the same number of ranks and workers only; elsewhere it is refused by name.

    The position is what the loop has drawn: save between steps, as `Checkpointer.step` does.
    """

    def __init__(self, loader: Any, batch: BatchShape) -> None:
        self._loader = loader
        self._ranks = shape_of(batch)[2]

    def __iter__(self) -> Iterator[Any]:
        """The loader's own iterator."""
        return iter(self._loader)

    def __len__(self) -> int:
        return len(self._loader)

    def state_dict(self) -> dict[str, Any]:
        """The loader's state, and where it has a meaning."""
        return {**self._layout(), "loader": _packed(self._loader.state_dict())}

    def facts(self) -> dict[str, Any]:
        """What a resume compares."""
        return self._layout()

    def differences(self, state_dict: dict[str, Any]) -> list[str]:
        """Why the saved position means nothing here; empty if it fits."""
        return [
            f"{name} {state_dict.get(name)!r} in the checkpoint, {value!r} live: the position of this kind of loader is one of "
            f"each rank and worker. Use the same numbers; or a map-style data set with dckpt.ElasticDistributedSampler, whose "
            f"position goes anywhere. {_NEW_DATA}"
            for name, value in self._layout().items()
            if state_dict.get(name) != value
        ]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the loader was. `IncompatibleStateError` on another number of ranks or workers."""
        _ensure_fits(self.differences(state_dict))
        self._loader.load_state_dict(_unpacked(state_dict["loader"]))

    def _layout(self) -> dict[str, Any]:
        return {"layout": "fixed", "ranks": self._ranks, "workers": self._loader.num_workers}


_STREAM = "generator state"


def _packed(state: Any) -> Any:
    """The same with states of generators as bytes.

    To load a tensor, the live loader would be asked for its own state, which starts its workers.
    """
    if isinstance(state, dict):
        return {key: _packed(value) for key, value in state.items()}
    if isinstance(state, torch.Tensor) and state.dtype == torch.uint8 and state.dim() == 1:
        return {_STREAM: bytes(state.tolist())}
    return state


def _unpacked(state: Any) -> Any:
    if not isinstance(state, dict):
        return state
    if state.keys() == {_STREAM}:
        return torch.tensor(list(state[_STREAM]), dtype=torch.uint8)
    return {key: _unpacked(value) for key, value in state.items()}


def _ensure_fits(differences: list[str]) -> None:
    if differences:
        raise IncompatibleStateError(f"Loader: {'; '.join(differences)}.", differences=differences)
