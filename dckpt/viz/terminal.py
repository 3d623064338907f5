"""Records as text for a terminal: colours on a terminal, plain text in a pipe. No storage access."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from dckpt.viz.units import (
    format_age,
    format_bytes,
    format_count,
    format_names,
    format_number,
    format_ranks,
)

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from dckpt.findings import Finding
    from dckpt.viz.records import (
        CheckpointReport,
        ComponentRow,
        DamageRow,
        Details,
        FileRow,
        GenerationRow,
        LeftoverRow,
        Listing,
        Origin,
        Plan,
        ReshardPlan,
        RollbackPlan,
        Verification,
    )

PIPE_WIDTH = 200
"""Columns when nobody says how wide the terminal is: a pipe has room for whole names."""

_VERDICT_STYLES = {
    "COMPLETE": "bold green",
    "PARTIAL": "bold yellow",
    "CORRUPT": "bold red",
    "UNREADABLE": "bold red",
}
_STATE_STYLES = {"latest": "green", "superseded": "dim", "pinned": "cyan", "damaged manifest": "red"}


def render_listing(listing: Listing, *, now_unix_s: float) -> str:
    """`dckpt ls`: the table, then one line each on the line's start, damage and leftovers."""
    return render(lambda: _listing_parts(listing, now_unix_s))


def render_details(details: Details, *, now_unix_s: float) -> str:
    """`dckpt show`."""
    return render(lambda: _details_parts(details, now_unix_s))


def render_verification(report: Verification) -> str:
    """`dckpt verify`: each checkpoint's components, damages, findings and verdict."""
    return render(lambda: _verification_parts(report))


def render_plan(plan: Plan) -> str:
    """`dckpt prune`: what stays and why, what goes, and how many bytes that frees."""
    return render(lambda: _plan_parts(plan))


def render_rollback(plan: RollbackPlan | None) -> str:
    """`dckpt rollback`: what changes, and for whom. No plan: that step is the latest already."""
    return render(lambda: _rollback_parts(plan))


def render_reshard(plan: ReshardPlan | None, *, duration_s: float | None) -> str:
    """`dckpt reshard`: what is or was written. No plan: there was nothing to do; no duration: it was only shown."""
    return render(lambda: _reshard_parts(plan, duration_s))


def render(parts: Callable[[], Iterable[RenderableType]]) -> str:
    """The parts as text, with colours if standard output is a terminal."""
    from rich.text import Text

    console = _console()
    with console.capture() as capture:
        for part in parts():
            # A sentence, a path or a command stays in one piece and is for the terminal to wrap; tables fold.
            console.print(part, soft_wrap=isinstance(part, Text))
    # Tables are padded to their full width; in a pipe or a pasted report those blanks only hurt.
    return "".join(f"{line.rstrip()}\n" for line in capture.get().splitlines())


def _console() -> Console:
    # rich is imported here and not above: it costs 60 ms, and `--json` needs none of it.
    from rich.console import Console

    is_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size((PIPE_WIDTH, 24)).columns if is_terminal else PIPE_WIDTH
    return Console(width=width, force_terminal=is_terminal, highlight=False, markup=False, emoji=False, soft_wrap=False)


def table_of(*columns: str, right: Sequence[str] = (), title: str | None = None) -> Table:
    """A table without lines; columns named in `right` are aligned there and never folded."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="bold", header_style="bold")
    for column in columns:
        is_right = column in right
        table.add_column(column, justify="right" if is_right else "left", no_wrap=is_right, overflow="fold")
    return table


def text_of(text: str, style: str = "") -> RenderableType:
    """One line that the terminal may wrap."""
    from rich.text import Text

    return Text(text, style=style)


def _listing_parts(listing: Listing, now_unix_s: float) -> Iterable[RenderableType]:
    yield text_of(f"{listing.url}: {format_count(len(listing.checkpoints), 'checkpoint')}", "bold")
    shared = sum(row.shared_bytes for row in listing.checkpoints)
    if shared:
        total = format_bytes(listing.total_bytes)
        yield text_of(f"{total} in all; {format_bytes(shared)} of unchanged files are shared and stored once.")
    if listing.checkpoints:
        yield _listing_table(listing, now_unix_s)
    for row in listing.checkpoints:
        if row.damage is not None:
            yield text_of(f"Damaged: {row.damage}", "red")
    for note in listing.notes:
        yield text_of(note, "red")
    if listing.line_generations:
        yield text_of(f"Line: {_describe_line(listing.line_generations)}.")
    if listing.leftovers:
        yield text_of(_describe_leftovers(listing.leftovers))


def _listing_table(listing: Listing, now_unix_s: float) -> Table:
    from rich.text import Text

    metrics = sorted({name for row in listing.checkpoints for name in row.metrics})
    has_shared = any(row.shared_bytes for row in listing.checkpoints)
    numbers = ("step", "gen", "saved", "size", *(["shared"] if has_shared else []), "ranks")
    table = table_of(*numbers, "state", *metrics, right=(*numbers, *metrics))
    for row in listing.checkpoints:
        age = "?" if row.created_unix_s is None else format_age(now_unix_s - row.created_unix_s)
        state = Text(", ").join(Text(name, style=_STATE_STYLES.get(name, "")) for name in row.states)
        table.add_row(
            f"{row.step}" if not row.micro_step else f"{row.step}+m{row.micro_step}",
            str(row.generation),
            age,
            format_bytes(row.size_bytes),
            *([format_bytes(row.shared_bytes) if row.shared_bytes else ""] if has_shared else []),
            "?" if row.world_size is None else str(row.world_size),
            state,
            *(format_number(row.metrics[name]) if name in row.metrics else "" for name in metrics),
        )
    return table


def _describe_line(generations: Sequence[GenerationRow]) -> str:
    """Newest first: `generation 3 (resume from step-..., 4 ranks) <- generation 1 (start, 2 ranks)`."""
    return " <- ".join(_describe_generation(row) for row in generations)


def _describe_generation(row: GenerationRow) -> str:
    if row.damage is not None:
        return f"generation {row.number} (its record cannot be read: {row.damage})"
    origin = f" from {row.parent}" if row.parent else ""
    return f"generation {row.number} ({row.reason}{origin}, {format_count(row.world_size or 0, 'rank')})"


def _describe_leftovers(leftovers: Sequence[LeftoverRow]) -> str:
    total = format_bytes(sum(row.size_bytes for row in leftovers))
    oldest = format_age(max(row.age_s for row in leftovers))
    count = format_count(len(leftovers), "attempt")
    return (
        f"Leftovers: {count} that never committed or are half deleted, {total}, "
        f"the oldest touched {oldest}. `dckpt prune RUN --leftovers` removes those older than 24 h."
    )


def _details_parts(details: Details, now_unix_s: float) -> Iterable[RenderableType]:
    yield text_of(details.name, "bold")
    yield _facts_grid(_identity(details, now_unix_s))
    yield text_of("")
    yield _component_table(details.components)
    for title, rows in (
        ("values", [(row.name, row.summary) for row in details.values]),
        (
            "random streams",
            [(row.stream, ", ".join(row.axes) or "equal on all ranks") for row in details.rng],
        ),
        ("metrics", [(name, format_number(value)) for name, value in details.metrics.items()]),
        ("facts", [(name, json.dumps(value, ensure_ascii=False)) for name, value in details.facts.items()]),
        (
            "kept per rank",
            [("values", format_names(tuple(details.rank_values)))] if details.rank_values else [],
        ),
        ("", [("tensors", format_names(tuple(details.rank_tensors)))] if details.rank_tensors else []),
        ("tied tensors", list(details.aliases.items())),
    ):
        if rows:
            yield from ([text_of(""), text_of(title, "bold")] if title else [])
            yield _facts_grid(rows)
    yield text_of("")
    yield _file_table(details.files)
    if details.tensors is not None:
        yield text_of("")
        tensors = table_of("tensor", "dtype", "shape", "chunks", "files", right=("chunks",))
        for tensor in details.tensors:
            shape = str(list(tensor.shape))
            tensors.add_row(tensor.name, tensor.dtype, shape, str(tensor.num_chunks), format_names(tuple(tensor.files)))
        yield tensors


def _file_table(rows: Sequence[FileRow]) -> Table:
    has_reused = any(row.reused for row in rows)
    table = table_of(
        *("file", "kind", "rank", "size", "digest", *(["unchanged for"] if has_reused else [])), right=("rank", "size")
    )
    for row in rows:
        rank = "" if row.rank is None else str(row.rank)
        reused = format_count(row.reused, "save") if row.reused else ""
        where = f"{row.checkpoint}/{row.path}" if row.checkpoint else row.path
        table.add_row(
            where, row.kind, rank, format_bytes(row.size_bytes), row.digest, *([reused] if has_reused else [])
        )
    return table


def _identity(details: Details, now_unix_s: float) -> list[tuple[str, str]]:
    step = "none: a stand-alone checkpoint" if details.step is None else str(details.step)
    rows = [
        ("in", details.url),
        ("step", f"{step} + {details.micro_step} micro" if details.micro_step else step),
    ]
    if details.states:
        rows.append(("state", ", ".join(details.states)))
    rows.append(("saved", format_age(now_unix_s - details.created_unix_s)))
    if details.run_id is not None:
        rows.append(("run", details.run_id))
    if details.lineage:
        rows.append(("lineage", _describe_line(details.lineage)))
    if details.made_from is not None:
        rows.append(("made from", _describe_origin(details.made_from)))
    mesh = ", ".join(f"{axis}={size}" for axis, size in details.mesh.items())
    rows += [
        ("world size", f"{details.world_size} ({mesh})" if mesh else str(details.world_size)),
        ("attempt", details.attempt),
        (
            "written by",
            ", ".join(f"{name} {version}" for name, version in details.writer.items()) or "not said",
        ),
        (
            "holds",
            f"{format_count(details.num_tensors, 'tensor')}, {format_count(details.num_chunks, 'chunk')}, "
            f"{format_count(len(details.files), 'file')}, {format_bytes(details.total_bytes)}",
        ),
    ]
    return rows


def _describe_origin(origin: Origin) -> str:
    run = f" of run {origin.run_id}" if origin.run_id is not None else ""
    text = f"{origin.checkpoint}{run}, saved by {format_count(origin.world_size, 'rank')} ({origin.how})"
    carried = f"; rank 0's value of {format_names(tuple(origin.carried))}" if origin.carried else ""
    return "\n".join((text + carried, *origin.changes))


def _facts_grid(rows: Iterable[tuple[str, str]]) -> Table:
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(name, value)
    return grid


def _component_table(components: Sequence[ComponentRow]) -> Table:
    from rich.text import Text

    table = table_of("component", "", "tensors", "bytes", "kept by", right=("tensors", "bytes"))
    for row in components:
        mark = Text("present", style="green") if row.is_present else Text("missing", style="yellow")
        holder = row.consequence
        if row.is_present:
            holder = f"each of {format_count(row.num_ranks, 'rank')}" if row.num_ranks else "all ranks together"
        tensors = f"{row.num_tensors:,}" if row.num_tensors else "-"
        table.add_row(row.name, mark, tensors, format_bytes(row.num_bytes) if row.num_tensors else "-", holder)
    return table


def _verification_parts(report: Verification) -> Iterable[RenderableType]:
    yield text_of(report.url, "bold")
    for checkpoint in report.checkpoints:
        yield text_of("")
        yield from _checkpoint_parts(checkpoint)
    if report.run_damages or report.run_findings:
        yield text_of("")
        yield text_of("The run's own records", "bold")
        for damage in report.run_damages:
            yield text_of(f"  {_describe_damage(damage)}", "red")
        for finding in report.run_findings:
            yield _finding_line(finding)
    if len(report.checkpoints) > 1 or report.run_damages:
        yield text_of("")
        yield text_of(f"Overall: {report.verdict}", _VERDICT_STYLES[report.verdict])


def _checkpoint_parts(report: CheckpointReport) -> Iterable[RenderableType]:
    yield text_of(report.checkpoint, "bold")
    if report.components:
        yield _component_table(report.components)
    for damage in report.damages:
        yield text_of(f"  {_describe_damage(damage)}", "red")
    for finding in report.findings:
        yield _finding_line(finding)
    files = format_count(report.num_files, "file")
    rate = f"{format_bytes(report.bytes_read)} of {files} in {report.duration_s:.1f} s"
    scope = " --quick: tensor data was not read." if report.is_quick else ""
    yield text_of(f"{report.verdict}: {_describe_verdict(report)} Read {rate}.{scope}", _VERDICT_STYLES[report.verdict])


def _describe_verdict(report: CheckpointReport) -> str:
    if report.verdict == "CORRUPT":
        tensors = len({name for damage in report.damages for name in damage.tensors})
        lost = f", {format_count(tensors, 'tensor')} hit" if tensors else ""
        unit = " (each that has bytes in a damaged block of 64 KiB, the unit of checksums)" if tensors else ""
        remedy = "`dckpt repair` shows what can be restored; or resume from another step."
        return f"{format_count(len(report.damages), 'damage')}{lost}{unit}. {remedy}"
    if report.verdict == "UNREADABLE":
        return "the storage failed; nothing is known to be damaged. Try again."
    if report.verdict == "PARTIAL":
        missing = [row.name for row in report.components if not row.is_present]
        return f"every byte that is there is good; no {', no '.join(missing)}."
    good = "headers, sizes and records are good" if report.is_quick else "every byte is good"
    # "Not checked" is no pass: without a list of parts nobody can say that nothing is missing.
    is_unsure = any(finding.severity == "not checked" for finding in report.findings)
    return f"{good}." if is_unsure else f"{good} and nothing is missing."


def _finding_line(finding: Finding) -> RenderableType:
    style = {"critical": "red", "warning": "yellow"}.get(finding.severity, "dim")
    return text_of(f"  {finding.severity}: {finding.message} {finding.remedy}", style)


def _describe_damage(damage: DamageRow) -> str:
    place = damage.file
    if damage.begin is not None and damage.end is not None:
        place += f", bytes {damage.begin:,}-{damage.end:,}"
    text = f"{place}: {damage.what}"
    if damage.ranks:
        text += f"; written by {format_ranks(tuple(damage.ranks))}"
    if damage.tensors:
        text += f"; tensors: {format_names(tuple(damage.tensors))}"
    return text


def _plan_parts(plan: Plan) -> Iterable[RenderableType]:
    from rich.text import Text

    yield text_of(plan.url, "bold")
    table = table_of("", "name", "size", "why", right=("size",))
    for kept in plan.keep:
        table.add_row(Text("keep", style="green"), kept.name, "", ", ".join(kept.reasons))
    for removed in plan.remove:
        table.add_row(Text("remove", style="red"), removed.name, format_bytes(removed.size_bytes), removed.reason)
    for leftover in plan.leftovers:
        age = format_age(leftover.age_s)
        table.add_row(
            Text("remove", style="red"),
            leftover.name,
            format_bytes(leftover.size_bytes),
            f"{leftover.kind}, touched {age}",
        )
    yield table
    if plan.remove or plan.leftovers:
        yield text_of(f"This frees {format_bytes(plan.freed_bytes)}.")
    else:
        yield text_of("Nothing to remove.")


def _rollback_parts(plan: RollbackPlan | None) -> Iterable[RenderableType]:
    if plan is None:
        yield text_of("Nothing to do: that step is the latest already.")
        return
    yield text_of(plan.url, "bold")
    rows = [("latest now", plan.latest or "none"), ("latest then", f"{plan.checkpoint} (generation {plan.generation})")]
    if plan.superseded:
        rows.append(("superseded", f"{', '.join(plan.superseded)}: kept, and the way back"))
    if plan.restored:
        rows.append(("back on the line", ", ".join(plan.restored)))
    yield _facts_grid(rows)
    yield text_of(
        "A job that still trains in this run is fenced: its next save fails with CommitConflictError, so stop it first.",
        "yellow",
    )
    if plan.youngest_attempt_s is not None:
        age = format_age(plan.youngest_attempt_s)
        yield text_of(f"A save that has not committed was last touched {age}: a job may be saving right now.", "yellow")


def _reshard_parts(plan: ReshardPlan | None, duration_s: float | None) -> Iterable[RenderableType]:
    if plan is None:
        yield text_of("Nothing to do: the checkpoint is laid out for these ranks already.")
        return
    yield text_of(f"{plan.source} -> {plan.destination}", "bold")
    saved, new = _describe_ranks(plan.saved_world_size, plan.saved_mesh), _describe_ranks(plan.world_size, plan.mesh)
    place = "the first of a new run" if plan.is_new_run else "beside what is there"
    rows = [
        ("from", saved),
        ("for", new),
        ("as", f"{plan.checkpoint}, {place}"),
        (
            "holds",
            f"{format_count(plan.num_tensors, 'tensor')}, {plan.num_cut:,} of them cut; "
            f"{format_count(plan.num_files, 'file')}, {format_bytes(plan.num_bytes)}",
        ),
        ("a rank", f"{format_bytes(plan.rank_bytes_min)} to {format_bytes(plan.rank_bytes_max)}"),
        ("free there", format_bytes(plan.free_bytes)),
        ("memory", f"at most {format_bytes(plan.memory_bytes_max)} a process, beside the program and its plan"),
    ]
    if plan.streams:
        told = ", ".join(f"{stream} {how}" for stream, how in plan.streams.items())
        rows.append(("random streams", told))
    yield _facts_grid(rows)
    if plan.carried:
        names = format_names(tuple(plan.carried))
        yield text_of(f"Differed between the ranks that saved it, rank 0's go to all: {names}.", "yellow")
    if plan.superseded:
        yield text_of(f"Superseded by this: {format_names(tuple(plan.superseded))}.", "yellow")
    if duration_s is None:
        yield text_of("Nothing was written: --dry-run.")
    else:
        rate = format_bytes(int(plan.num_bytes / duration_s)) if duration_s > 0 else "?"
        yield text_of(f"Committed in {duration_s:.1f} s, {rate}/s.", "bold green")


def _describe_ranks(world_size: int, mesh: Mapping[str, int]) -> str:
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.items())
    return f"{format_count(world_size, 'rank')} ({axes})" if axes else format_count(world_size, "rank")
