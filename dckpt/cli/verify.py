"""`dckpt verify RUN[@STEP]`."""

from __future__ import annotations

import sys

import click

from dckpt.cli.outcome import CORRUPT, INCOMPLETE, OK, STORAGE, json_option, print_json, returns_exit_code
from dckpt.tools.foreign import is_foreign
from dckpt.tools.target import open_target
from dckpt.tools.verify import Verdict, Watch
from dckpt.tools.verify_run import verify_target
from dckpt.viz.progress import reading_progress
from dckpt.viz.terminal import render_verification

_EXIT_CODES: dict[Verdict, int] = {
    "COMPLETE": OK,
    "PARTIAL": INCOMPLETE,
    "CORRUPT": CORRUPT,
    "UNREADABLE": STORAGE,
}


@click.command(
    epilog="\b\nExit codes: 0 COMPLETE, 1 PARTIAL (something is missing), 3 not found, 4 CORRUPT,\n"
    "5 storage trouble (UNREADABLE). Of several checkpoints the worst one decides."
)
@click.argument("target", metavar="RUN[@STEP]")
@click.option("--all", "is_all", is_flag=True, help="Every checkpoint of the run, superseded ones too.")
@click.option(
    "--quick",
    "is_quick",
    is_flag=True,
    help="Do not read tensor data: sizes, headers and all small files only.",
)
@click.option("--fix", is_flag=True, help="Then repair what can be repaired: the same as `dckpt repair` afterwards.")
@click.option(
    "--from", "copies", multiple=True, metavar="COPY", help="With --fix: another run or checkpoint with the same bytes."
)
@click.option("--yes", is_flag=True, help="With --fix: do not ask.")
@json_option
@returns_exit_code
def verify(
    target: str, is_all: bool, is_quick: bool, fix: bool, copies: tuple[str, ...], yes: bool, as_json: bool
) -> int:
    """Read every byte and compare it with its checksum; then say what the checkpoint is good for.

    Without STEP the latest is read. All damages are listed, with file, bytes, ranks and tensors. Reads only, unless --fix is
    given: then the plan of `dckpt repair` follows, and the exit code is that of the repair, 0 if nothing had to be repaired.
    """
    if fix and (is_all or is_quick):
        raise click.UsageError("--fix repairs one checkpoint after reading all of it: without --all and --quick.")
    if (copies or yes) and not fix:
        raise click.UsageError("--from and --yes belong to --fix.")
    if is_foreign(target):
        return _verify_foreign(target, fix=fix, yes=yes, as_json=as_json)
    place = open_target(target)
    with reading_progress(is_shown=sys.stderr.isatty() and not as_json) as (on_checkpoint, on_bytes):
        report = verify_target(place, is_all=is_all, is_quick=is_quick, watch=Watch(on_checkpoint, on_bytes))
    code = _EXIT_CODES[report.verdict]
    if as_json and not fix:
        print_json(report)
    elif not as_json:
        click.echo(render_verification(report), nl=False)
    if not fix:
        return code
    if report.checkpoints[0].verdict == "COMPLETE":
        # Damage to the run's own records, if there is any, is no checkpoint's: there is nothing to write anew.
        if as_json:
            print_json({"report": report, "plan": None, "is_applied": False})
        return code
    from dckpt.cli.repair import run_repair

    return run_repair(target, copies, yes=yes, as_json=as_json, report=report)


def _verify_foreign(target: str, *, fix: bool, yes: bool, as_json: bool) -> int:
    from dckpt.tools.foreign_verdict import verify_foreign
    from dckpt.viz.repair import render_foreign

    report = verify_foreign(target)
    if not as_json:
        click.echo(render_foreign(report), nl=False)
    elif not fix:
        print_json(report)
    if not fix:
        return _EXIT_CODES[report.verdict]
    from dckpt.cli.repair import run_repair

    return run_repair(target, (), yes=yes, as_json=as_json, report=report)
