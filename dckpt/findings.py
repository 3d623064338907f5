"""The record of one check's result, shared by whatever looks at a checkpoint and says what it saw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["critical", "warning", "info", "not checked"]
"""`not checked` means that the fact which the check needs is absent; it is counted apart from a pass."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check expected, what it found, and what to do about the difference."""

    check: str
    severity: Severity
    expected: str
    found: str
    remedy: str
    message: str

    def to_json(self) -> dict[str, str]:
        """The record as plain JSON, keys in the order of the fields."""
        return {
            "check": self.check,
            "severity": self.severity,
            "expected": self.expected,
            "found": self.found,
            "remedy": self.remedy,
            "message": self.message,
        }


def page_of(check: str) -> str:
    """The command that prints the page of a check of the resume report."""
    return f"dckpt explain {check}"
