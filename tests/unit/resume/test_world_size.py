"""What the resume report says of another number of ranks."""

from __future__ import annotations

from typing import Any

import pytest

from dckpt.resume.checks.base import Evidence
from dckpt.resume.checks.settings import check_world_size


def told(streams: dict[str, str]) -> str:
    current: dict[str, Any] = {"world": {"size": 4, "mesh": None}}
    evidence = Evidence(saved={}, current=current, checkpoint={"world_size": 2}, load={"rng": streams})
    (found,) = check_world_size(evidence)
    assert found.severity == "info"
    return found.message


@pytest.mark.parametrize(
    ("streams", "text"),
    [
        ({}, "saved on 2 ranks, continued on 4 ranks"),
        ({"numpy": "re-derived", "python": "exact"}, "random streams re-derived on every rank: numpy"),
        ({"torch": "copied", "python": "re-derived"}, "copied, equal on all ranks: torch; dropout masks differ"),
        ({"torch": "re-derived"}, "re-derived on every rank: torch; dropout masks differ"),
        ({"cuda:0": "copied"}, "copied, equal on all ranks: cuda:0; dropout masks differ"),
    ],
)
def test_what_became_of_each_stream_is_told_and_what_that_does_to_dropout(streams, text):
    assert text in told(streams)
    assert ("dropout" in told(streams)) == ("dropout" in text)
