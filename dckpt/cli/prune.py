"""`dckpt prune RUN`."""

from __future__ import annotations

import time
from typing import Literal

import click

from dckpt.catalog.retention import Best, Retention
from dckpt.cli.outcome import INCOMPLETE, OK, is_confirmed, json_option, print_json, returns_exit_code
from dckpt.tools.prune import LEFTOVER_HOURS, PruneRequest, apply_prune, plan_prune
from dckpt.tools.target import open_run
from dckpt.viz.terminal import render_plan
from dckpt.viz.units import format_count


@click.command(
    epilog="\b\nExit codes: 0 done (or shown, with --dry-run), 1 nothing to remove, or you said no,\n"
    "2 no policy given, 3 no such run, 4 a generation is damaged, 5 storage trouble,\n"
    "6 the run changed meanwhile."
)
@click.argument("run")
@click.option("--last", type=click.IntRange(min=1), metavar="N", help="Keep the newest N of the line.")
@click.option("--every", type=click.IntRange(min=1), metavar="N", help="Keep the newest in each N steps.")
@click.option("--best", metavar="METRIC[:max]", help="Keep the best by METRIC, the smallest unless `:max` is added.")
@click.option(
    "--daily", type=click.IntRange(min=1), metavar="N", help="Keep the newest of each of the newest N days (UTC)."
)
@click.option("--superseded", is_flag=True, help="Remove superseded steps.")
@click.option("--leftovers", is_flag=True, help="Remove what never committed (.tmp-*) or is half deleted (.trash-*).")
@click.option(
    "--older-than",
    "older_than_hours",
    type=click.FloatRange(min=0),
    default=LEFTOVER_HOURS,
    show_default=True,
    metavar="HOURS",
    help="Leave younger leftovers alone: a running save's files look the same.",
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Show the plan and remove nothing.")
@json_option
@returns_exit_code
def prune(
    run: str,
    last: int | None,
    every: int | None,
    best: str | None,
    daily: int | None,
    superseded: bool,
    leftovers: bool,
    older_than_hours: float,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Show what a policy keeps and what it removes, ask, and remove it.

    The newest checkpoint of the line, pinned ones, and those in which unchanged files of others lie always
    stay. --last, --every, --best and --daily add up: what any of them keeps stays. The plan says for each checkpoint why
    it stays or goes.
    """
    if yes and dry_run:
        raise click.UsageError("--yes and --dry-run contradict each other.")
    retention = Retention(last=last, every=every, best=_parse_best(best), daily=daily)
    has_policy = retention != Retention()
    if not (has_policy or superseded or leftovers):
        raise click.UsageError("Say what to remove: --last, --every, --best, --daily, --superseded or --leftovers.")
    storage = open_run(run)
    request = PruneRequest(
        retention if has_policy else None, superseded, leftovers, older_than_s=older_than_hours * 3600
    )
    plan = plan_prune(storage, request, now_unix_s=time.time())
    if not as_json:
        click.echo(render_plan(plan), nl=False)
    question = (
        f"Remove {format_count(len(plan.remove), 'checkpoint')} and {format_count(len(plan.leftovers), 'leftover')}?"
    )
    is_applied = not plan.is_empty and not dry_run and is_confirmed(question, yes=yes, as_json=as_json)
    num_removed = apply_prune(storage, plan) if is_applied else 0
    if as_json:
        print_json({"plan": plan, "freed_bytes": plan.freed_bytes, "is_applied": is_applied})
    elif is_applied:
        click.echo(
            f"Removed {format_count(num_removed, 'checkpoint')} and {format_count(len(plan.leftovers), 'leftover')}."
        )
    return OK if is_applied or (dry_run and not plan.is_empty) else INCOMPLETE


def _parse_best(text: str | None) -> Best | None:
    if text is None:
        return None
    metric, _, mode = text.partition(":")
    choices: dict[str, Literal["min", "max"]] = {"": "min", "min": "min", "max": "max"}
    if not metric or mode not in choices:
        raise click.BadParameter(f"expected METRIC, METRIC:min or METRIC:max, found {text}", param_hint="--best")
    return Best(metric, mode=choices[mode])
