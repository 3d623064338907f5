"""The measurement of the sampler runs and says what it found."""

from __future__ import annotations

import json

from benchmarks.sampling import run


def test_every_figure_is_there_and_is_a_time() -> None:
    record = run(10**6, rounds=1, indices=5000)

    assert json.loads(json.dumps(record)) == record
    assert all(value > 0 for value in record.values())
