"""Randomness of single samples, keyed by (seed, epoch, index): the same on any number of ranks and workers."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset

from dckpt.errors import ConfigError

Item = TypeVar("Item")


class SampleIndex(int):
    """An index into a data set that also says which seed and epoch it is drawn for. Everywhere else it is that int."""

    seed: int
    epoch: int

    def __new__(cls, index: int, *, seed: int, epoch: int) -> SampleIndex:
        made = super().__new__(cls, index)
        made.seed, made.epoch = seed, epoch
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return _make_index, (int(self), self.seed, self.epoch)


def _make_index(index: int, seed: int, epoch: int) -> SampleIndex:
    return SampleIndex(index, seed=seed, epoch=epoch)


class SampleRandom:
    """Generators for one sample: a function of (seed, epoch, index), whatever process asks and how often.

    Each attribute is its own stream and is made when it is first used.
    """

    def __init__(self, index: SampleIndex) -> None:
        if not isinstance(index, SampleIndex):
            raise ConfigError(
                f"SampleRandom({index!r:.80}): expected a SampleIndex, found {type(index).__name__}. Build the sampler with "
                "ElasticDistributedSampler(..., sample_keys=True), and take the index before a Subset translates it"
            )
        self._text = f"dckpt-sample-v1|{index.seed}|{index.epoch}|{int(index)}"
        self._made: dict[str, Any] = {}

    @property
    def torch(self) -> torch.Generator:
        """A CPU generator; the same object each time."""
        if "torch" not in self._made:
            # torch keeps the low 32 bits of a CPU seed; that two of 10**9 samples share a stream harms nothing.
            self._made["torch"] = torch.Generator().manual_seed(self._number("torch") >> 1)
        found: torch.Generator = self._made["torch"]
        return found

    @property
    def numpy(self) -> np.random.Generator:
        """A PCG64 generator; the same object each time."""
        if "numpy" not in self._made:
            self._made["numpy"] = np.random.Generator(np.random.PCG64(self._number("numpy")))
        found: np.random.Generator = self._made["numpy"]
        return found

    @property
    def python(self) -> random.Random:
        """A `random.Random`; the same object each time."""
        if "python" not in self._made:
            self._made["python"] = random.Random(self._number("python"))
        found: random.Random = self._made["python"]
        return found

    def _number(self, stream: str) -> int:
        digest = hashlib.blake2b(f"{self._text}|{stream}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")


@contextmanager
def seeded_sample(index: SampleIndex) -> Iterator[None]:
    """Within it, Python's, numpy's and torch's global CPU streams are this sample's own; afterwards they go on as before."""
    own = SampleRandom(index)
    python, legacy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.seed(own._number("global python"))
        np.random.seed(own._number("global numpy") % 2**32)
        torch.set_rng_state(torch.Generator().manual_seed(own._number("global torch") >> 1).get_state())
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
        torch.set_rng_state(cpu)


class SeededDataset(Dataset[Item], Generic[Item]):
    """A data set whose samples come out the same on any number of ranks and workers, augmentation included.

    Each item is made under `seeded_sample`, so transforms that draw from the global streams need no change. The sampler
    must be built with `sample_keys=True`. Wrap it around a `Subset`, not the other way round.
    """

    def __init__(self, dataset: Dataset[Item]) -> None:
        self._dataset = dataset

    def __getitem__(self, index: SampleIndex) -> Item:
        with seeded_sample(index):
            return self._dataset[int(index)]

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]
