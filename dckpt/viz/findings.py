"""Findings as a table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from dckpt.findings import page_of
from dckpt.viz.terminal import render
from dckpt.viz.units import format_count

if TYPE_CHECKING:
    from rich.console import RenderableType

    from dckpt.findings import Finding

_STYLES = {"critical": "bold red", "warning": "yellow", "info": "cyan"}


class DiagnosisRow(Protocol):
    """What `render_diagnosis` needs."""

    @property
    def url(self) -> str: ...
    @property
    def checkpoint(self) -> str: ...
    @property
    def saved_world_size(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def passed(self) -> int: ...
    @property
    def findings(self) -> Sequence[Finding]: ...
    @property
    def exit_code(self) -> int: ...


_VERDICTS = {
    0: ("bold green", "It would resume cleanly."),
    1: ("bold yellow", "It would resume, with warnings."),
    2: ("bold red", "It would be refused."),
}


def render_diagnosis(diagnosis: DiagnosisRow) -> str:
    """`dckpt doctor`: the verdict first, then each finding, then what could not be checked."""

    def parts() -> list[RenderableType]:
        from rich.text import Text

        style, verdict = _VERDICTS[diagnosis.exit_code]
        head = Text()
        head.append(verdict, style=style)
        head.append(
            f" {diagnosis.checkpoint} of {diagnosis.url}, saved by {format_count(diagnosis.saved_world_size, 'rank')}, for "
            f"{diagnosis.world_size}; {format_count(diagnosis.passed, 'check')} passed."
        )
        told = [item for item in diagnosis.findings if item.severity != "not checked"]
        unknown = dict.fromkeys(item.check for item in diagnosis.findings if item.severity == "not checked")
        found: list[RenderableType] = [head, *(_finding_text(item) for item in told)]
        if unknown:
            found.append(Text(f"Not checked, for lack of a fact: {', '.join(unknown)}", style="dim"))
        if diagnosis.findings:
            page = page_of(diagnosis.findings[0].check)
            found.append(
                Text(f"`{page}`, and so for each check: what it means, what it needs, what to do.", style="dim")
            )
        return found

    return render(parts)


def _finding_text(item: Finding) -> RenderableType:
    from rich.text import Text

    text = Text("  ")
    text.append(f"{item.severity} [{item.check}] ", style=_STYLES.get(item.severity, ""))
    text.append(item.message)
    return text
