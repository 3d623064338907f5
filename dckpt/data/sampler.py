"""`ElasticDistributedSampler`: each sample once an epoch, on any number of ranks, workers and micro-batches."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sized
from typing import Any, Protocol

import torch.distributed as dist
from torch.utils.data import Sampler

from dckpt.data.order import ORDER_VERSION, SIZE_MAX, EpochOrder
from dckpt.data.position import Position, Tail, cut_share, has_empty_parts, share_positions
from dckpt.data.seeding import SampleIndex
from dckpt.errors import ConfigError, CorruptCheckpointError, IncompatibleStateError

log = logging.getLogger(__name__)

SEED_MAX = 2**63 - 1
# Indices are computed so many at a time: enough to hide the cost of a numpy call, little enough to start at once.
_BLOCK = 4096


class BatchShape(Protocol):
    """What the sampler wants to know of a `dckpt.Batch`."""

    @property
    def micro(self) -> int:
        """Samples of one forward."""

    @property
    def accumulation(self) -> int:
        """Forwards of one optimizer step."""

    @property
    def data_parallel(self) -> int:
        """Ranks that get different samples."""


class ProgressLike(Protocol):
    """What the sampler wants of a `dckpt.TrainProgress`."""

    batch: Any
    micro_step: int

    def draw_from(self, *sources: Any) -> None:
        """From now on each `advance` moves the sources by one step."""


class ElasticDistributedSampler(Sampler[int]):
    """Indices of this rank's samples, from where training stands to the end of the epoch.

    Order and position are functions of (seed, epoch, samples that all ranks trained on) and of nothing else: the number of
    ranks and workers, the micro-batch and the accumulation may change at any resume, and each sample still comes exactly once
    an epoch. Nothing is padded. A step's samples are a set that depends on the global batch alone. The ranks take turns at its
    micro-batches, which hold the same samples on any number of ranks while their size stays; `rng_slot` counts them so.
    Starting and resuming take constant time and memory.

    dataset: the data set, or its length.
    batch: `dckpt.Batch` of this run; `batch.data_parallel` ranks share the samples.
    seed: of the order; the same on every rank. Epochs differ by themselves: there is no `set_epoch`.
    rank: this rank's place among the `data_parallel` ones; taken from the process group if it has as many ranks.
    shuffle: False keeps the data set's own order.
    tail: the last samples of an epoch that make no whole step: "drop" leaves them out, "short" makes a shorter step of them
        (then use `batches()`; `samples_in_step` says by how much to divide). Every step has `accumulation` micro-batches.
    allow_empty: with "short", some rank's micro-batch may then have no samples: an empty list, which your `collate_fn` must
        take. Refused unless it is allowed.
    sample_keys: yield `SampleIndex`, an int that also carries seed and epoch, as `SeededDataset` wants it.
    dataset_fingerprint: what identifies the data, for the resume report; see `fingerprint_files`.

    The position moves by `progress.advance()` alone, so what workers prefetched is not lost: give both to one
    `TrainState(data=sampler, progress=progress)`, which links them. A new pass over the loader goes on from the position; after
    the last step of an epoch it is the next epoch. The state is equal on every rank.

    `ConfigError` if the data set is smaller than one step, or for a wrong argument.
    """

    def __init__(
        self,
        dataset: Sized | int,
        *,
        batch: BatchShape,
        seed: int,
        rank: int | None = None,
        shuffle: bool = True,
        tail: Tail = "drop",
        allow_empty: bool = False,
        sample_keys: bool = False,
        dataset_fingerprint: str | None = None,
    ) -> None:
        size = dataset if isinstance(dataset, int) else len(dataset)
        _ensure_int("dataset", size, 1, SIZE_MAX)
        _ensure_int("seed", seed, 0, SEED_MAX)
        if tail not in ("drop", "short"):
            raise ConfigError(f"ElasticDistributedSampler(tail={tail!r}): expected 'drop' or 'short'")
        self._micro, self._accumulation, self._ranks = shape_of(batch)
        self._step = self._micro * self._accumulation * self._ranks
        self._rank = _rank_among(self._ranks) if rank is None else rank
        _ensure_int("rank", self._rank, 0, self._ranks - 1)
        self._seed = seed
        self._shuffle = shuffle
        self._tail: Tail = tail
        self._allow_empty = allow_empty
        self._sample_keys = sample_keys
        self._fingerprint = dataset_fingerprint
        self._place = Position(size)
        self._skipped: Callable[[], int] = nothing_skipped
        self._finished = 0
        self._last_pass: Position | None = None
        if not self._place.next_step(self._step, tail):
            raise ConfigError(
                f"ElasticDistributedSampler: expected at least one global batch of {self._step} samples, found a data set of "
                f"{size}. Make the batch smaller, or pass tail='short'"
            )
        for text in self._tail_faults(self._place):
            raise ConfigError(f"ElasticDistributedSampler: {text}")

    # Where training stands.

    @property
    def epoch(self) -> int:
        """The epoch under way, from 0."""
        return self._place.epoch

    @property
    def cursor(self) -> int:
        """Samples of this epoch, over all ranks, that are inside optimizer steps."""
        return self._place.cursor

    @property
    def samples_in_step(self) -> int:
        """Samples of the step that the next `progress.advance()` ends, over all ranks."""
        return self._place.next_step(self._step, self._tail)

    def __getstate__(self) -> dict[str, Any]:
        """A copy follows no progress until a `TrainState` links it."""
        return {**self.__dict__, "_skipped": nothing_skipped}

    def advance(self, samples: int | None = None) -> int:
        """One more step is trained on; returns its samples over all ranks. Called by `progress.advance()`.

        `ConfigError` if `samples` is given and is not what the step had: the position would then be wrong for good.
        """
        expected = self.samples_in_step
        if samples is not None and samples != expected:
            raise ConfigError(
                f"progress.advance(samples={samples!r}): expected {expected}, the samples of this step by the sampler in "
                "TrainState(data=). Leave samples= out"
            )
        self._move_to(self._place.moved(expected))
        return expected

    def take_finished_epochs(self) -> int:
        """How many epochs ended since this was asked last. Called by the progress that this sampler follows."""
        finished, self._finished = self._finished, 0
        return finished

    def restart(self) -> None:
        """Back to epoch 0, sample 0: a new leg on this data set begins."""
        self._place = Position(self._place.size)
        self._finished = 0

    def follow_progress(self, progress: ProgressLike) -> None:
        """This sampler is drawn from by `progress`, whose micro-step counts. `TrainState` calls it, and links the other way.

        `ConfigError` if the progress is of another kind, or has another batch.
        """
        ensure_same_batch(progress, (self._micro, self._accumulation, self._ranks), what="an ElasticDistributedSampler")
        self._skipped = micro_steps_of(progress)

    # The indices.

    def __iter__(self) -> Iterator[int]:
        """This rank's indices from the position to the end of the epoch, in the order of its micro-batches."""
        if self._tail == "short":
            raise ConfigError(
                "ElasticDistributedSampler(tail='short'): its last micro-batches are smaller, which a DataLoader cannot know. "
                "Use DataLoader(dataset, batch_sampler=sampler.batches())"
            )
        return (index for micro in self._micro_batches() for index in micro)

    def __len__(self) -> int:
        """How many indices a pass from the position on yields on this rank, without a shorter last step."""
        return self._whole_steps() * (self._step // self._ranks) - self._skipped() * self._micro

    def batches(self) -> MicroBatches:
        """The same as lists, one a micro-batch: `DataLoader(dataset, batch_sampler=sampler.batches())`."""
        return MicroBatches(self)

    def _whole_steps(self) -> int:
        return (self._place.size - self._place.cursor) // self._step

    def _micro_batches(self) -> Iterator[list[int]]:
        start = self._place
        if self._last_pass == start:
            log.warning(
                "ElasticDistributedSampler: a whole pass was made over epoch %d and its position did not move from %d: the "
                "same samples come again. Call progress.advance() after each step and give both to one TrainState(data=, "
                "progress=); for a validation pass use a sampler of its own",
                start.epoch,
                start.cursor,
            )
        skipped = self._skipped()
        for number, micro in enumerate(self._from(start)):
            if number >= skipped:
                yield micro
        self._last_pass = start

    def _from(self, start: Position) -> Iterator[list[int]]:
        order = EpochOrder(self._seed, start.epoch, start.size, shuffle=self._shuffle)
        share = self._step // self._ranks
        block = max(1, _BLOCK // share)
        cursor, left = start.cursor, (start.size - start.cursor) // self._step
        while left:
            steps = min(block, left)
            found = order.indices(share_positions(cursor, steps, self._step, self._rank, self._ranks, self._micro))
            for micro in found.reshape(-1, self._micro).tolist():
                yield self._keyed(micro, start.epoch)
            cursor += steps * self._step
            left -= steps
        rest = start.size - cursor
        if self._tail == "short" and rest:
            indices = order.indices(share_positions(cursor, 1, rest, self._rank, self._ranks))[0].tolist()
            for begin, end in cut_share(len(indices), self._accumulation):
                yield self._keyed(indices[begin:end], start.epoch)

    def _keyed(self, indices: list[int], epoch: int) -> list[int]:
        if not self._sample_keys:
            return indices
        return [SampleIndex(index, seed=self._seed, epoch=epoch) for index in indices]

    # The state.

    def state_dict(self) -> dict[str, Any]:
        """Plain values; equal on every rank."""
        return {
            "order_version": ORDER_VERSION,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "size": self._place.size,
            "epoch": self._place.epoch,
            "cursor": self._place.cursor,
            "tail": self._tail,
            "global_batch": self._step,
            "dataset_fingerprint": self._fingerprint,
        }

    def facts(self) -> dict[str, Any]:
        """What a resume compares: `state_dict` and n_eff, how many samples of this epoch are trained on in all.

        The data set's fingerprint is called `dataset` here.
        """
        facts = {**self.state_dict(), "n_eff": self._place.effective(self._step, self._tail)}
        return {"dataset" if name == "dataset_fingerprint" else name: value for name, value in facts.items()}

    def differences(self, state_dict: dict[str, Any]) -> list[str]:
        """Why the saved position means nothing in this sampler's order, one sentence each; empty if it fits."""
        own = self.state_dict()
        found = [
            f"{name} {state_dict[name]!r} in the checkpoint, {own[name]!r} live: its position has no meaning in this order. "
            f"{remedy}"
            for name, remedy in _REMEDIES.items()
            if state_dict.get(name) != own[name]
        ]
        return found or self._tail_faults(position_of(state_dict, self._place.size))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved position, on any number of ranks.

        `IncompatibleStateError` if it belongs to another order, `CorruptCheckpointError` if it cannot be a position.
        """
        place = position_of(state_dict, state_dict.get("size"))
        differences = self.differences(state_dict)
        if differences:
            raise IncompatibleStateError(f"Sampler: {'; '.join(differences)}.", differences=differences)
        self._finished = 0
        # With another batch, what is left may make no whole step any more.
        self._move_to(place)

    def _move_to(self, place: Position) -> None:
        self._place = place.settled(self._step, self._tail)
        self._finished += self._place.epoch - place.epoch

    def _tail_faults(self, place: Position) -> list[str]:
        rest = (place.size - place.cursor) % self._step
        if self._tail == "drop" or self._allow_empty or not has_empty_parts(rest, self._ranks, self._accumulation):
            return []
        return [
            f"the last step of the epoch has {rest} samples for {self._accumulation} micro-batches on each of {self._ranks} "
            "ranks, so some have none. Pass tail='drop'; or another batch; or allow_empty=True and a collate_fn that takes "
            "an empty list"
        ]


class MicroBatches(Sampler[list[int]]):
    """This rank's micro-batches from the position to the end of the epoch: `accumulation` of them for each step."""

    def __init__(self, sampler: ElasticDistributedSampler) -> None:
        self._sampler = sampler

    def __iter__(self) -> Iterator[list[int]]:
        """Lists of indices, `micro` each except in a shorter last step."""
        return self._sampler._micro_batches()

    def __len__(self) -> int:
        """How many micro-batches a pass from the position on yields; the same on every rank."""
        sampler = self._sampler
        steps = sampler._whole_steps()
        if sampler._tail == "short" and (sampler._place.size - sampler._place.cursor) % sampler._step:
            steps += 1
        return steps * sampler._accumulation - sampler._skipped()


def ensure_same_batch(progress: ProgressLike, own: tuple[int, int, int], *, what: str) -> None:
    """`ConfigError` if `progress` moves no samplers, or by another batch than (micro, accumulation, ranks) `own`."""
    if not callable(getattr(progress, "draw_from", None)):
        raise ConfigError(
            f"TrainState(data=): {what} is moved by a TrainProgress, found progress of type {type(progress).__name__}. Pass "
            "progress=dckpt.TrainProgress(...)"
        )
    if progress.batch is not None and shape_of(progress.batch) != own:
        raise ConfigError(
            f"TrainState: expected one batch, found {progress.batch} in the progress and micro={own[0]}, accumulation={own[1]}, "
            f"data_parallel={own[2]} in {what}. Give both the same dckpt.Batch"
        )


def micro_steps_of(progress: ProgressLike) -> Callable[[], int]:
    """Micro-batches of the step under way whose gradients were saved and loaded: they are not drawn again.

    Does not keep the progress alive: it holds what it moves, and a cycle would leave the end of a loader's workers to the
    garbage collector.
    """
    held = weakref.ref(progress)

    def skipped() -> int:
        found = held()
        return 0 if found is None else int(found.micro_step)

    return skipped


def nothing_skipped() -> int:
    """The same without a progress."""
    return 0


_NEW_DATA = "For other data begin a leg: checkpointer.start_leg(state) in place of resume"
_REMEDIES = {
    "order_version": "Finish the epoch with the version of dckpt that began it",
    "seed": "Pass the saved seed",
    "shuffle": "Pass the saved value",
    "size": f"Use the same data set. {_NEW_DATA}",
}


def position_of(state_dict: dict[str, Any], size: Any) -> Position:
    """The saved position in a data set of `size`. `CorruptCheckpointError` if it cannot be one."""
    for name, value, least in (
        ("size", size, 1),
        ("epoch", state_dict.get("epoch"), 0),
        ("cursor", state_dict.get("cursor"), 0),
    ):
        if type(value) is not int or value < least or (name == "cursor" and value > size):
            raise CorruptCheckpointError(
                f"sampler: field {name!r}: expected a whole number of at least {least} within the data set, found "
                f"{value!r:.80}. Use an older checkpoint",
                field=f"data.{name}",
                expected=f"a whole number of at least {least}",
                found=f"{value!r:.80}",
            )
    return Position(size, state_dict["epoch"], state_dict["cursor"])


def shape_of(batch: Any) -> tuple[int, int, int]:
    """(micro, accumulation, data_parallel) of a batch. `ConfigError` if it is none."""
    shape = [getattr(batch, name, None) for name in ("micro", "accumulation", "data_parallel")]
    micro, accumulation, ranks = (value if type(value) is int and value > 0 else 0 for value in shape)
    if not (micro and accumulation and ranks):
        raise ConfigError(f"ElasticDistributedSampler(batch={batch!r:.80}): expected a dckpt.Batch")
    return micro, accumulation, ranks


def _rank_among(ranks: int) -> int:
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world != ranks:
        raise ConfigError(
            f"ElasticDistributedSampler: expected a process group of batch.data_parallel={ranks} ranks, found {world}. Pass "
            "rank=, this rank's place among those that get different samples; or correct the batch"
        )
    return dist.get_rank() if dist.is_initialized() else 0


def _ensure_int(name: str, value: object, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise ConfigError(
            f"ElasticDistributedSampler({name}={value!r:.80}): expected a whole number from {least} to {most}"
        )
