"""The simulation of a large job runs from the first save to the loads, and says what it found."""

from __future__ import annotations

import json

import pytest

from benchmarks.scale import run, table

RANKS = 64


@pytest.mark.distributed
@pytest.mark.slow
def test_a_small_simulation_saves_and_opens(tmp_path) -> None:
    record = run(ranks=RANKS, rounds=1, layouts=("hsdp",), layers=1, directory=str(tmp_path))
    (found,) = record["layouts"]

    assert json.loads(json.dumps(record)) == record
    assert found["tensors"] == 12 * 4
    assert found["steady_save"]["cpu_s"] > 0
    assert set(found["steady_save"]["payload_bytes"]) == {"plan", "write"}, "no layout is decided again"
    assert set(found["first_save"]["payload_bytes"]) == {"plan", "layout", "write"}
    assert found["steady_save"]["exchange_bytes"] <= 1024
    assert found["open_same_ranks"]["files"] >= 1 and found["open_half_the_ranks"]["bytes_to_read"] > 0
    assert [line["what"] in table(record) for line in found["asked_for"]] == [True] * 5
    assert list(tmp_path.iterdir()) == []
