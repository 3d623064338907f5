"""The pages of checks as text: set for a terminal, as they are written in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from dckpt.viz.terminal import render, table_of, text_of

if TYPE_CHECKING:
    from rich.console import RenderableType

TEXT_WIDTH = 100
"""Longer lines of prose are hard to read; a narrower terminal decides itself."""


class Page(Protocol):
    """What one check means."""

    @property
    def check(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def phase(self) -> str: ...
    @property
    def severities(self) -> Sequence[str]: ...
    @property
    def text(self) -> str: ...


def render_page(page: Page) -> str:
    """`dckpt explain CHECK`."""
    if not sys.stdout.isatty():
        return page.text

    def parts() -> Iterable[RenderableType]:
        from rich.constrain import Constrain
        from rich.markdown import Markdown

        yield Constrain(Markdown(page.text), TEXT_WIDTH)

    return render(parts)


def render_pages(pages: Sequence[Page], phases: Mapping[str, str]) -> str:
    """`dckpt explain`: all checks, those of one phase together. phases: key -> words, in order."""

    def parts() -> Iterable[RenderableType]:
        for phase, words in phases.items():
            table = table_of("check", "severity", "what it compares", title=f"{words[:1].upper()}{words[1:]}")
            for page in pages:
                if page.phase == phase:
                    table.add_row(page.check, ", ".join(page.severities), page.title)
            yield table
            yield text_of("")
        yield text_of("`dckpt explain CHECK` says what a check means, why it matters, and what to do.")

    return render(parts)
