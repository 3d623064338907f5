"""What the sampler costs: starting, resuming and indices of 10^9 samples, beside what torch's sampler would do.

    python -m benchmarks.sampling [--samples 1000000000]

torch's `DistributedSampler` permutes the whole data set when an epoch starts and again at each resume; it is measured on a
hundredth of the samples, for it takes 8 bytes and more a sample, as a list of Python ints several times that.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from torch.utils.data import DistributedSampler

import dckpt

RANKS, MICRO, ACCUMULATION = 64, 8, 4
INDICES = 200_000


def _sampler(samples: int, **options: Any) -> dckpt.ElasticDistributedSampler:
    batch = dckpt.Batch(MICRO, ACCUMULATION, RANKS)
    return dckpt.ElasticDistributedSampler(samples, batch=batch, seed=0, rank=3, **options)


def _seconds(work: Callable[[], Any], rounds: int) -> float:
    """The shortest of some rounds: the others were disturbed."""
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)


def _drain(indices: Iterator[int], count: int) -> int:
    return sum(1 for _ in islice(indices, count))


def run(samples: int, rounds: int = 5, indices: int = INDICES) -> dict[str, Any]:
    """Seconds of each, as plain JSON."""
    middle = samples // 2 // (MICRO * ACCUMULATION * RANKS) * (MICRO * ACCUMULATION * RANKS)
    saved = {**_sampler(samples).state_dict(), "cursor": middle}

    def resume() -> int:
        sampler = _sampler(samples)
        sampler.load_state_dict(saved)
        return next(iter(sampler))

    few = samples // 100
    stock = DistributedSampler(range(few), num_replicas=RANKS, rank=3)
    return {
        "samples": samples,
        "start_s": _seconds(lambda: next(iter(_sampler(samples))), rounds),
        "resume_in_the_middle_s": _seconds(resume, rounds),
        "index_s": _seconds(lambda: _drain(iter(_sampler(samples)), indices), rounds) / indices,
        "keyed_index_s": _seconds(lambda: _drain(iter(_sampler(samples, sample_keys=True)), indices), rounds) / indices,
        "stock_samples": few,
        "stock_start_s": _seconds(lambda: next(iter(stock)), 1),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints one JSON record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10**9)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(arguments)
    print(json.dumps(run(args.samples, args.rounds), indent=1))


if __name__ == "__main__":
    main()
