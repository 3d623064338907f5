"""`dckpt rollback RUN --to STEP`."""

from __future__ import annotations

import time

import click

from dckpt.cli.outcome import INCOMPLETE, OK, is_confirmed, json_option, print_json, returns_exit_code
from dckpt.tools.rollback import apply_rollback, describe_rollback
from dckpt.tools.target import open_run


@click.command(
    epilog="\b\nExit codes: 0 done (or shown, with --dry-run), 1 that step is the latest already, or you said no,\n"
    "2 wrong command line, 3 no such run or step, 4 that checkpoint or a generation is damaged: nothing was\n"
    "changed, 5 storage trouble, 6 another job committed meanwhile."
)
@click.argument("run")
@click.option("--to", "step", required=True, metavar="STEP", help="A step of the line, or a checkpoint's full name.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Show what would change and change nothing.")
@json_option
@returns_exit_code
def rollback(run: str, step: str, yes: bool, dry_run: bool, as_json: bool) -> int:
    """Make an earlier STEP the latest of RUN again, so that the next start resumes from it.

    A new generation whose parent is STEP goes on top; nothing is copied, nothing is deleted. The steps after STEP are
    superseded: kept until `dckpt prune --superseded`, and one more rollback to one of them, by its full name, is the way
    back. A job that still trains in RUN is not interrupted, but its next save fails with CommitConflictError, so that it
    can never undo the rollback: stop it first.
    """
    if yes and dry_run:
        raise click.UsageError("--yes and --dry-run contradict each other.")
    storage = open_run(run)
    plan, shown = describe_rollback(storage, step, now_unix_s=time.time())
    if not as_json:
        from dckpt.viz.terminal import render_rollback

        click.echo(render_rollback(shown), nl=False)
    is_applied = False
    if plan is not None and not dry_run:
        is_applied = is_confirmed(f"Make {plan.target.name} the latest?", yes=yes, as_json=as_json)
    if plan is not None and is_applied:
        apply_rollback(storage, plan)
    if as_json:
        print_json({"plan": shown, "is_applied": is_applied})
    elif is_applied and shown is not None:
        click.echo(f"{shown.checkpoint} is the latest now (generation {shown.generation}).")
    return OK if is_applied or (dry_run and plan is not None) else INCOMPLETE
