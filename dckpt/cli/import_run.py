"""`dckpt import DIR RUN`."""

from __future__ import annotations

import click

from dckpt.cli.outcome import CORRUPT, INCOMPLETE, OK, is_confirmed, json_option, print_json, returns_exit_code
from dckpt.tools.foreign_import import ImportRequest, apply_import, prepare_import


@click.command(
    "import",
    epilog="\b\nExit codes: 0 imported (or would be, with --dry-run), 1 imported without moments, scheduler, step or random\n"
    "streams, or you said no, 2 wrong command line, or RUN is taken, 3 no such checkpoint, 4 a file is damaged or\n"
    "does not fit: nothing was written, 5 storage trouble.",
)
@click.argument("source", metavar="DIR")
@click.argument("run")
@click.option("--order", metavar="FILE", help="Names of the optimizer's parameters, one a line, in its order.")
@click.option("--tie", "ties", multiple=True, metavar="ALIAS=NAME", help="A parameter that is the same as another one.")
@click.option(
    "--batch-size", type=click.IntRange(min=1), metavar="N", help="Samples of one optimizer step, over all ranks."
)
@click.option("--optimizer", metavar="CLASS", help="Class of the optimizer, if its state does not tell.")
@click.option("--fill", is_flag=True, help="Derive random streams that are missing, by the rule of `dckpt repair`.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Show the plan and write nothing.")
@json_option
@returns_exit_code
def import_run(
    source: str,
    run: str,
    order: str | None,
    ties: tuple[str, ...],
    batch_size: int | None,
    optimizer: str | None,
    fill: bool,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Make a checkpoint of the usual home-made kind the first one of RUN, an empty or missing directory.

    DIR holds model.safetensors or pytorch_model.bin (also in shards), optimizer.pt, scheduler.pt, trainer_state.json and
    rng_state*.pth, or is a .pt file that holds such parts in one dict. Files of torch.save are read with weights_only:
    nothing in them is executed. No file in DIR is changed.

    An optimizer's state names no parameters. Which moments belong to which is taken from --order, from the architecture that
    config.json names if transformers is installed, from the order of pytorch_model.bin, or from shapes that leave no choice;
    anything less is refused.
    """
    if yes and dry_run:
        raise click.UsageError("--yes and --dry-run contradict each other.")
    request = ImportRequest(source, run, order, ties, batch_size, optimizer, fill)
    return run_import(request, yes=yes, dry_run=dry_run, as_json=as_json)


def run_import(request: ImportRequest, *, yes: bool, dry_run: bool, as_json: bool, report: object = None) -> int:
    """The command's work; also that of `dckpt repair DIR`, and of `dckpt verify DIR --fix` with its report."""
    prepared = prepare_import(request)
    plan = prepared.plan
    if not as_json:
        from dckpt.viz.repair import render_import

        click.echo(render_import(plan), nl=False)
    is_applied = False
    if not plan.refusals and not dry_run:
        is_applied = is_confirmed("Import it?", yes=yes, as_json=as_json)
    if is_applied:
        apply_import(prepared)
    if as_json:
        told = {"plan": plan, "is_applied": is_applied}
        print_json(told if report is None else {"report": report, **told})
    elif is_applied:
        click.echo(f"{plan.destination} is committed; {plan.source} stays as it was.")
    if plan.refusals:
        return CORRUPT
    # Where the run stands in its data such files never say: that alone is no failure.
    is_whole = not set(plan.missing) - {"data"}
    return OK if (is_applied or dry_run) and is_whole else INCOMPLETE
