"""`dckpt repair CKPT`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from dckpt.cli.import_run import run_import
from dckpt.cli.outcome import CORRUPT, INCOMPLETE, OK, is_confirmed, json_option, print_json, returns_exit_code
from dckpt.tools.foreign import is_foreign
from dckpt.tools.foreign_import import ImportRequest
from dckpt.tools.repair import Prepared, prepare_repair
from dckpt.tools.repair_run import apply_repair
from dckpt.tools.target import open_target
from dckpt.tools.verify import Watch
from dckpt.viz.progress import reading_progress


@click.command(
    epilog="\b\nExit codes: 0 repaired: the new checkpoint is COMPLETE (or would be, with --dry-run), 1 nothing to repair,\n"
    "you said no, or the new checkpoint is still PARTIAL, 2 wrong command line, 3 not found, 4 something is lost that\n"
    "no place has: nothing was written, 5 storage trouble, 6 another job committed meanwhile."
)
@click.argument("target", metavar="CKPT")
@click.option(
    "--from", "copies", multiple=True, metavar="COPY", help="Another run or checkpoint that may hold the same bytes."
)
@click.option(
    "--to",
    "into",
    metavar="DIR",
    help="Where a stand-alone checkpoint goes [CKPT-repaired], or a run made of other files [CKPT-dckpt].",
)
@click.option("--accept-loss", is_flag=True, help="Write it without the parts whose bytes are lost.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Show the plan and write nothing.")
@json_option
@returns_exit_code
def repair(
    target: str, copies: tuple[str, ...], into: str | None, accept_loss: bool, yes: bool, dry_run: bool, as_json: bool
) -> int:
    """Give back what can be proved, fill in what can be derived, and say what is lost.

    CKPT is RUN[@STEP] or a checkpoint's directory. Every byte is read. A damaged block comes back from another checkpoint of
    the run, a place given with --from, or an equal tensor, and only if its recorded checksum says that these are the bytes.
    Missing random streams are derived by the documented rule, counters taken from the checkpoint's facts. Optimizer moments are
    never invented.

    The plan is shown first. The repaired checkpoint is a new one, in a new generation that continues from CKPT; CKPT itself
    stays as it is. A job that still trains in the run is fenced: stop it first.

    CKPT may also be of the kind that `dckpt import` takes: it becomes a run of its own, with random streams filled in.
    """
    if yes and dry_run:
        raise click.UsageError("--yes and --dry-run contradict each other.")
    return run_repair(target, copies, into=into, accept_loss=accept_loss, yes=yes, dry_run=dry_run, as_json=as_json)


def run_repair(
    target: str,
    copies: Sequence[str],
    *,
    into: str | None = None,
    accept_loss: bool = False,
    yes: bool = False,
    dry_run: bool = False,
    as_json: bool = False,
    report: object = None,
) -> int:
    """The command's work; also that of `dckpt verify --fix`, whose `report` goes into the JSON object."""
    if is_foreign(target):
        request = ImportRequest(target, into or f"{target.rstrip('/')}-dckpt", fill=True)
        return run_import(request, yes=yes, dry_run=dry_run, as_json=as_json, report=report)
    is_shown = sys.stderr.isatty() and not as_json
    with reading_progress(is_shown=is_shown) as (on_checkpoint, on_bytes):
        watch = Watch(on_checkpoint, on_bytes)
        prepared = prepare_repair(open_target(target), copies=copies, into=into, watch=watch)
    plan = prepared.plan
    if not as_json:
        from dckpt.viz.repair import render_repair

        click.echo(render_repair(plan), nl=False)
    is_refused = bool(plan.refusals) or (bool(plan.needs_consent) and not accept_loss)
    is_applied = False
    if plan.is_needed and not is_refused and not dry_run:
        is_applied = is_confirmed("Write the repaired checkpoint?", yes=yes, as_json=as_json)
    if is_applied:
        _apply(prepared, is_shown=is_shown)
    if as_json:
        told = {"plan": plan, "is_applied": is_applied}
        print_json(told if report is None else {"report": report, **told})
    elif is_applied:
        click.echo(f"{plan.destination} is committed; {plan.source} stays as it was.")
    if is_refused:
        return CORRUPT
    is_done = is_applied or (dry_run and plan.is_needed)
    return OK if is_done and plan.outcome == "COMPLETE" else INCOMPLETE


def _apply(prepared: Prepared, *, is_shown: bool) -> None:
    with reading_progress(is_shown=is_shown) as (on_start, on_bytes):
        if on_start is not None:
            on_start(prepared.plan.destination, prepared.plan.bytes_written)
        apply_repair(prepared, on_bytes=on_bytes or (lambda _: None))
