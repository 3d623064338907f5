"""The plan of a repair as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from dckpt.viz.terminal import render, table_of, text_of
from dckpt.viz.units import format_bytes, format_count

if TYPE_CHECKING:
    from rich.console import RenderableType

    from dckpt.findings import Finding

_STYLES = {
    "restored": "green",
    "derived": "cyan",
    "filled in": "cyan",
    "left behind": "cyan",
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


class Import(Protocol):
    """`dckpt import`."""

    @property
    def source(self) -> str: ...
    @property
    def destination(self) -> str: ...
    @property
    def changes(self) -> Sequence[Change]: ...
    @property
    def refusals(self) -> Sequence[str]: ...
    @property
    def missing(self) -> Sequence[str]: ...
    @property
    def num_written(self) -> int: ...
    @property
    def bytes_written(self) -> int: ...


def render_import(plan: Import) -> str:
    """What is imported, filled in and missing, and what is written."""
    return render(lambda: _import_parts(plan))


def _import_parts(plan: Import) -> Iterable[RenderableType]:
    yield text_of(plan.source, "bold")
    yield _changes(plan.changes)
    for refusal in plan.refusals:
        yield text_of(refusal, "bold red")
    if plan.refusals:
        yield text_of("Nothing is imported.")
        return
    files = format_count(plan.num_written, "file")
    yield text_of(f"New run: {plan.destination}. Missing in it: {', '.join(plan.missing) or 'nothing'}.")
    yield text_of(f"Written: {files}, {format_bytes(plan.bytes_written)}. The old files are not touched.")


class Foreign(Protocol):
    """`dckpt verify` of a checkpoint of another kind."""

    @property
    def url(self) -> str: ...
    @property
    def verdict(self) -> str: ...
    @property
    def step(self) -> int | None: ...
    @property
    def ranks(self) -> int: ...
    @property
    def components(self) -> Sequence[tuple[str, bool, int, int]]: ...
    @property
    def damages(self) -> Sequence[str]: ...
    @property
    def findings(self) -> Sequence[Finding]: ...


def render_foreign(report: Foreign) -> str:
    """What the files hold, what is missing and what that does to training."""
    return render(lambda: _foreign_parts(report))


def _foreign_parts(report: Foreign) -> Iterable[RenderableType]:
    step = "an unknown step" if report.step is None else f"step {report.step}"
    yield text_of(f"{report.url}: not written by dckpt; {step}, {format_count(report.ranks, 'rank')}", "bold")
    table = table_of("component", "", "tensors", "bytes", right=("tensors", "bytes"))
    for name, is_there, count, size in report.components:
        table.add_row(
            name, "present" if is_there else "missing", str(count or "-"), format_bytes(size) if size else "-"
        )
    yield table
    for damage in report.damages:
        yield text_of(damage, "red")
    for finding in report.findings:
        yield text_of(finding.message, "yellow")
    what = {
        "COMPLETE": "every part is there. Such files have no checksums: whether a byte of them has changed nobody knows",
        "PARTIAL": "something is missing",
        "CORRUPT": "a file cannot be read",
    }
    yield text_of(f"{report.verdict}: {what[report.verdict]}.")
    if report.verdict != "CORRUPT":
        yield text_of("`dckpt import` makes a run of it.")


def _changes(changes: Sequence[Change]) -> RenderableType:
    from rich.text import Text

    table = table_of("what", "", "how")
    for change in changes:
        table.add_row(change.what, Text(change.action, style=_STYLES.get(change.action, "")), change.how)
    return table


def _parts(plan: Plan) -> Iterable[RenderableType]:
    yield text_of(plan.source, "bold")
    if plan.changes:
        yield _changes(plan.changes)
    if plan.refusals:
        for refusal in plan.refusals:
            yield text_of(refusal, "bold red")
        yield text_of("Nothing can be written. Give a copy with --from, or continue from an older checkpoint.")
        return
    if not plan.is_needed:
        yield text_of(
            "Nothing to repair: no byte that the manifest names is damaged, and nothing is missing that could be filled in."
        )
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
