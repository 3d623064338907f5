"""`dckpt explain [CHECK]`."""

from __future__ import annotations

import click

from dckpt.cli.outcome import OK, json_option, print_json, returns_exit_code
from dckpt.resume.explain import PHASES, read_page, read_pages


@click.command(epilog="\b\nExit codes: 0 shown, 2 no such check.")
@click.argument("check", metavar="[CHECK]", required=False)
@json_option
@returns_exit_code
def explain(check: str | None, as_json: bool) -> int:
    """What a check of the resume report means, why it matters and what to do. Without CHECK: all of them."""
    if check is not None:
        page = read_page(check)
        if as_json:
            print_json(page)
        else:
            from dckpt.viz.explain import render_page

            click.echo(render_page(page), nl=False)
        return OK
    pages = read_pages()
    if as_json:
        print_json({"checks": pages})
    else:
        from dckpt.viz.explain import render_pages

        click.echo(render_pages(pages, PHASES), nl=False)
    return OK
