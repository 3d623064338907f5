"""`dckpt ls RUN`."""

from __future__ import annotations

import time

import click

from dckpt.cli.outcome import CORRUPT, OK, json_option, print_json, returns_exit_code
from dckpt.tools.inspect import list_run
from dckpt.tools.target import open_run


@click.command(
    epilog="\b\nExit codes: 0 ok, 3 no such run, 4 a manifest or generation is damaged (the rest is shown),\n"
    "5 storage trouble."
)
@click.argument("run")
@json_option
@returns_exit_code
def ls(run: str, as_json: bool) -> int:
    """List the checkpoints of RUN, newest first.

    States: `latest` is what a resume loads; `on the line` leads to it; `superseded` lies on an abandoned
    branch and is never resumed from; `pinned` is never expired.
    """
    now_unix_s = time.time()
    listing = list_run(open_run(run), now_unix_s=now_unix_s)
    if as_json:
        print_json(listing)
    else:
        from dckpt.viz.terminal import render_listing

        click.echo(render_listing(listing, now_unix_s=now_unix_s), nl=False)
    is_damaged = bool(listing.notes) or any(row.damage is not None for row in listing.checkpoints)
    return CORRUPT if is_damaged else OK
