"""Random walks over numbers of ranks, batches and kills: each sample of an epoch exactly once, whatever happens between."""

from __future__ import annotations

import itertools
import json
import random

import numpy as np
import pytest

from dckpt.data.order import EpochOrder
from dckpt.data.sampler import ElasticDistributedSampler
from dckpt.state.progress import Batch

WALKS = 3000
GROUPS = 10
EPOCHS = 2


class Walk:
    """One run over at least EPOCHS epochs, killed and continued elsewhere at random."""

    def __init__(self, seed: int) -> None:
        self.choose = random.Random(seed)
        self.size = self.choose.choice((1, 2, 7, 40, 64, 130, 331))
        # Computing a permutation is the slow part of a walk, and its own tests judge it.
        self.options = {
            "seed": seed,
            "tail": self.choose.choice(("drop", "short")),
            "shuffle": seed % 8 == 0,
            "allow_empty": True,
        }
        self.state: str | None = None
        self.taken: dict[int, list[int]] = {}
        self.jobs = 0

    def run(self) -> None:
        while len(self.taken) <= EPOCHS:
            self.job(self.choose_batch())
            self.jobs += 1

    def choose_batch(self) -> Batch:
        while True:
            batch = Batch(self.choose.randint(1, 5), self.choose.randint(1, 3), self.choose.choice((1, 2, 3, 4, 8)))
            if self.options["tail"] == "short" or batch.samples <= self.size:
                return batch

    def job(self, batch: Batch) -> None:
        ranks = [
            ElasticDistributedSampler(self.size, batch=batch, rank=rank, **self.options)
            for rank in range(batch.data_parallel)
        ]
        for sampler in ranks:
            if self.state is not None:
                sampler.load_state_dict(json.loads(self.state))
        passes = [iter(sampler.batches()) for sampler in ranks]
        for _ in range(self.choose.randint(0, 6)):
            epoch, expected = ranks[0].epoch, ranks[0].samples_in_step
            micros = [list(itertools.islice(each, batch.accumulation)) for each in passes]
            assert all(len(found) == batch.accumulation for found in micros)
            assert all(len(micro) <= batch.micro for found in micros for micro in found)
            step = [index for found in micros for micro in found for index in micro]
            assert len(step) == expected
            self.taken.setdefault(epoch, []).extend(step)
            assert {sampler.advance() for sampler in ranks} == {expected}
            if ranks[0].epoch != epoch:
                assert [next(each, None) for each in passes] == [None] * len(ranks)
                passes = [iter(sampler.batches()) for sampler in ranks]
        for each in passes:
            # Prefetched and never trained on: lost with the job, and no part of the position.
            list(itertools.islice(each, self.choose.randint(0, 3)))
        states = {json.dumps(sampler.state_dict(), sort_keys=True) for sampler in ranks}
        assert len(states) == 1
        self.state = states.pop()

    def check(self) -> None:
        for epoch in range(EPOCHS):
            taken = self.taken[epoch]
            order = EpochOrder(self.options["seed"], epoch, self.size, shuffle=self.options["shuffle"])
            trained = order.indices(np.arange(len(taken))).tolist()
            assert len(set(taken)) == len(taken), "a sample came twice"
            assert set(taken) == set(trained), "a sample is missing"
            if self.options["tail"] == "short":
                assert len(taken) == self.size


@pytest.mark.parametrize("group", range(GROUPS))
def test_no_sample_comes_twice_and_none_is_missing(group):
    """The multiset of each epoch is the set order[:n], on 3,000 walks of some ten jobs each."""
    jobs = 0
    for seed in range(group, WALKS, GROUPS):
        walk = Walk(seed)
        walk.run()
        walk.check()
        jobs += walk.jobs

    assert jobs > 2 * WALKS / GROUPS, "hardly any walk was interrupted"


@pytest.mark.parametrize(("ranks", "micro", "accumulation"), [(8, 2, 1), (4, 2, 2), (2, 4, 2), (1, 16, 1), (1, 1, 16)])
def test_with_an_equal_global_batch_each_step_has_the_same_samples(ranks, micro, accumulation):
    batch = Batch(micro, accumulation, ranks)
    passes = [iter(ElasticDistributedSampler(1003, batch=batch, seed=4, rank=rank)) for rank in range(ranks)]
    order = EpochOrder(4, 0, 1003).indices(np.arange(1003)).tolist()
    for begin in range(0, 1003 - 16, 16):
        step = [index for each in passes for index in itertools.islice(each, micro * accumulation)]
        assert sorted(step) == sorted(order[begin : begin + 16])

    assert [next(each, None) for each in passes] == [None] * ranks
