"""`dckpt verify RUN[@STEP]`."""

from __future__ import annotations

import sys

import click

from dckpt.cli.outcome import CORRUPT, INCOMPLETE, OK, STORAGE, json_option, print_json, returns_exit_code
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
@json_option
@returns_exit_code
def verify(target: str, is_all: bool, is_quick: bool, as_json: bool) -> int:
    """Read every byte and compare it with its checksum; then say what the checkpoint is good for.

    Without STEP the latest is read. All damages are listed, with file, bytes, ranks and tensors. Reads only.
    """
    place = open_target(target)
    with reading_progress(is_shown=sys.stderr.isatty() and not as_json) as (on_checkpoint, on_bytes):
        report = verify_target(place, is_all=is_all, is_quick=is_quick, watch=Watch(on_checkpoint, on_bytes))
    if as_json:
        print_json(report)
    else:
        click.echo(render_verification(report), nl=False)
    return _EXIT_CODES[report.verdict]
