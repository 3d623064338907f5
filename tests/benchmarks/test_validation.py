"""The measurement of the validation runs through on a small state, and says what it found."""

from __future__ import annotations

import json

import pytest

from benchmarks.validation import run, table


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_small_state_is_measured(tmp_path, dtype) -> None:
    record = run(40_000, dtype, side=64, rounds=2, directory=str(tmp_path))

    assert json.loads(json.dumps(record)) == record
    assert record["parameters"] == 10 * 64**2
    assert record["tensors"] == 30
    assert record["findings"] == []
    assert record["checks_passed"] > 30
    assert record["validation_s"] > 0
    assert "for a billion parameters" in table(record)
    assert list(tmp_path.iterdir()) == []
