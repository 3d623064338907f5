"""`dckpt unpin RUN@STEP`."""

from __future__ import annotations

import click

from dckpt.cli.outcome import INCOMPLETE, OK, json_option, print_json, returns_exit_code
from dckpt.tools import pins


@click.command(
    epilog="\b\nExit codes: 0 unpinned, 1 it was not pinned, 2 no step given, 3 not found, 5 storage trouble."
)
@click.argument("target", metavar="RUN@STEP")
@json_option
@returns_exit_code
def unpin(target: str, as_json: bool) -> int:
    """Let the retention policy and `dckpt prune` judge this checkpoint again. Deletes nothing by itself."""
    change = pins.unpin(target)
    if as_json:
        print_json(change)
    elif change.is_changed:
        click.echo(f"{change.checkpoint} is not pinned any more: the next commit or `dckpt prune` may expire it.")
    else:
        click.echo(f"{change.checkpoint} was not pinned.")
    return OK if change.is_changed else INCOMPLETE
