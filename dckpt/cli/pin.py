"""`dckpt pin RUN@STEP`."""

from __future__ import annotations

import click

from dckpt.cli.outcome import OK, json_option, print_json, returns_exit_code
from dckpt.tools import pins


@click.command(
    epilog="\b\nExit codes: 0 pinned (also if it was before), 2 no step given, 3 not found, 5 storage trouble."
)
@click.argument("target", metavar="RUN@STEP")
@json_option
@returns_exit_code
def pin(target: str, as_json: bool) -> int:
    """Keep this checkpoint whatever the retention policy or `dckpt prune` says, until it is unpinned.

    A running job heeds it at its next commit.
    """
    change = pins.pin(target)
    if as_json:
        print_json(change)
    else:
        click.echo(f"{change.checkpoint} {'is pinned' if change.is_changed else 'was pinned already'}.")
    return OK
