"""A checkpoint that was repaired or imported says at each resume what was done to it."""

from __future__ import annotations

from typing import Any

import pytest

from dckpt.resume.checks.base import Evidence
from dckpt.resume.checks.origin import check_origin


def findings(origin: Any) -> list[tuple[str, str]]:
    evidence = Evidence(saved={}, current={}, checkpoint={"origin": origin})
    return [(item.severity, item.message) for item in check_origin(evidence)]


@pytest.mark.parametrize(
    "origin", [None, {"how": "reshard", "changes": []}, {"how": "repair", "changes": [], "checkpoint": "x"}]
)
def test_nothing_was_done(origin: Any) -> None:
    assert findings(origin) == []


def test_what_was_restored_is_information_and_what_was_lost_a_warning() -> None:
    changes = ["rank00000.safetensors: restored: from a copy", "optim: lost: moments of x"]

    found = findings({"how": "repair", "checkpoint": "step-0000000020.g0001", "changes": changes})

    assert [severity for severity, _ in found] == ["warning", "info"]
    assert "repaired from step-0000000020.g0001" in found[0][1] and "moments of x" in found[0][1]
    assert "from a copy" in found[1][1]
