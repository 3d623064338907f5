"""The plan of a repair as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from dckpt.viz.terminal import render, table_of, text_of
from dckpt.viz.units import format_bytes, format_count

if TYPE_CHECKING:
    from rich.console import RenderableType

_STYLES = {
    "restored": "green",
    "derived": "cyan",
    "filled in": "cyan",
    "lost": "bold red",
    "not possible": "yellow",
}


class Change(Protocol):
    """One line of the plan."""

    @property
    def what(self) -> str: ...
    @property
    def action(self) -> str: ...
    @property
    def how(self) -> str: ...


class Plan(Protocol):
    """`dckpt repair`."""

    @property
    def source(self) -> str: ...
    @property
    def destination(self) -> str: ...
    @property
    def generation(self) -> int: ...
    @property
    def changes(self) -> Sequence[Change]: ...
    @property
    def needs_consent(self) -> Sequence[str]: ...
    @property
    def refusals(self) -> Sequence[str]: ...
    @property
    def outcome(self) -> str: ...
    @property
    def num_linked(self) -> int: ...
    @property
    def num_written(self) -> int: ...
    @property
    def bytes_written(self) -> int: ...
    @property
    def superseded(self) -> Sequence[str]: ...
    @property
    def is_needed(self) -> bool: ...


def render_repair(plan: Plan) -> str:
    """What is restored, derived, filled in and lost, and what is written."""
    return render(lambda: _parts(plan))


def _parts(plan: Plan) -> Iterable[RenderableType]:
    from rich.text import Text

    yield text_of(plan.source, "bold")
    if plan.changes:
        table = table_of("what", "", "how")
        for change in plan.changes:
            table.add_row(change.what, Text(change.action, style=_STYLES.get(change.action, "")), change.how)
        yield table
    if plan.refusals:
        for refusal in plan.refusals:
            yield text_of(refusal, "bold red")
        yield text_of("Nothing can be written. Give a copy with --from, or continue from an older checkpoint.")
        return
    if not plan.is_needed:
        yield text_of("Nothing to repair.")
        return
    if plan.needs_consent:
        yield text_of(
            f"Parts of {', '.join(plan.needs_consent)} would be given up: pass --accept-loss, or give a copy with --from.",
            "bold red",
        )
    generation = f", generation {plan.generation}, which continues from the old one" if plan.generation else ""
    yield text_of(f"New checkpoint: {plan.destination}{generation}. It will be {plan.outcome}.")
    files = format_count(plan.num_written, "file")
    yield text_of(
        f"Written: {files}, {format_bytes(plan.bytes_written)}; taken over as they are: {plan.num_linked}. "
        "The old checkpoint is not touched."
    )
    if plan.superseded:
        yield text_of(
            f"It is older than the latest: {', '.join(plan.superseded)} will be superseded (kept; `dckpt rollback` is the way "
            "back).",
            "yellow",
        )
    if plan.generation:
        yield text_of("A job that still trains in this run is fenced: stop it first.", "yellow")
