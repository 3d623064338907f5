"""The page of each check: what is compared, why it matters, what to do. Read from the package; no torch."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from importlib import resources

from dckpt.errors import ConfigError
from dckpt.resume.checks.registry import ALL_CHECKS, EXTRA_IDS

CHECK_IDS: tuple[str, ...] = (*(check.id for check in ALL_CHECKS), *EXTRA_IDS)
"""All checks in the order of a report."""

PHASES = {
    "before": "before anything is loaded",
    "after": "after the load",
    "probe": "with the probe batch",
    "watch": "in the first steps of training",
}
_HEAD = re.compile(
    r"# (?P<title>.+)\n\nPhase: (?P<phase>\w+)\. Severity: (?P<severities>[^.]+)\.\n\n(?P<body>.+)", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Page:
    """One page. phase: a key of `PHASES`. severities: those that the check can give, the worst first; "not checked" is left
    out. text: Markdown, title and all."""

    check: str
    title: str
    phase: str
    severities: tuple[str, ...]
    text: str


def read_page(check: str) -> Page:
    """The page of `check`. `ConfigError` with the closest names if there is no such check."""
    if check not in CHECK_IDS:
        raise ConfigError(f"check {check!r}: expected the name of a check{_closest(check)}; `dckpt explain` lists all.")
    text = resources.files("dckpt.resume").joinpath("pages", f"{check}.md").read_text(encoding="utf-8")
    head = _HEAD.fullmatch(text)
    assert head is not None, f"pages/{check}.md does not begin as a page"
    return Page(check, head["title"], head["phase"], tuple(head["severities"].split(", ")), text)


def read_pages() -> tuple[Page, ...]:
    """All pages in the order of a report."""
    return tuple(read_page(check) for check in CHECK_IDS)


def _closest(name: str) -> str:
    found = difflib.get_close_matches(name.lower().replace("-", "_"), CHECK_IDS, n=3, cutoff=0.5)
    found += [check for check in CHECK_IDS if name and name in check and check not in found]
    return f", such as {', '.join(found[:4])}" if found else ""
