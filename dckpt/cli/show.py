"""`dckpt show RUN[@STEP]`."""

from __future__ import annotations

import time

import click

from dckpt.cli.outcome import OK, json_option, print_json, returns_exit_code
from dckpt.tools.show import show_checkpoint
from dckpt.tools.target import open_target


@click.command(epilog="\b\nExit codes: 0 ok, 3 not found, 4 manifest, index or generation damaged, 5 storage trouble.")
@click.argument("target", metavar="RUN[@STEP]")
@click.option("--tensors", is_flag=True, help="List every tensor with dtype, shape, chunks and files.")
@json_option
@returns_exit_code
def show(target: str, tensors: bool, as_json: bool) -> int:
    """Everything about one checkpoint: of RUN the latest, or the one at STEP; or a checkpoint's directory."""
    details = show_checkpoint(open_target(target), with_tensors=tensors)
    if as_json:
        print_json(details)
    else:
        from dckpt.viz.terminal import render_details

        click.echo(render_details(details, now_unix_s=time.time()), nl=False)
    return OK
