"""`dckpt doctor RUN[@STEP]`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from dckpt.cli.outcome import json_option, print_json, returns_exit_code
from dckpt.errors import ConfigError
from dckpt.findings import page_of
from dckpt.tools.doctor import Settings, diagnose
from dckpt.tools.target import open_target

COUNT = click.IntRange(min=1)


@click.command(
    epilog="\b\nExit codes: 0 it would resume cleanly, 1 with warnings, 2 it would be refused (or wrong command line),\n"
    "3 no such run or step, 4 no manifest can be read, 5 storage trouble."
)
@click.argument("target", metavar="RUN[@STEP]")
@click.option("--world-size", type=COUNT, help="Ranks of the new run; as saved unless told.")
@click.option("--mesh", help="Their arrangement, such as dp=4,tp=2.")
@click.option("--micro-batch", type=COUNT, help="Samples of one forward pass; as saved unless told.")
@click.option("--accumulation", type=COUNT, help="Forward passes of one step; as saved unless told.")
@click.option("--data-parallel", type=COUNT, help="Ranks with data of their own; grows with --world-size unless told.")
@click.option("--max-steps", type=click.IntRange(min=0), help="Where the new run ends; as saved unless told.")
@click.option("--max-epochs", type=click.IntRange(min=0), help="The same in epochs.")
@click.option(
    "--code", type=click.Path(exists=True, path_type=Path), help="The script that will train, or its work tree."
)
@click.option(
    "--facts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSON of what TrainState(facts=...) gets.",
)
@json_option
@returns_exit_code
def doctor(target: str, mesh: str | None, facts: Path | None, as_json: bool, **options: Any) -> int:
    """Would this run resume cleanly with these settings? Reads manifests and file sizes, not tensors.

    Runs before any accelerator is rented: the same checks as resume makes, as far as they need no tensors.
    """
    settings = Settings(
        world_size=options["world_size"],
        mesh=_parse_mesh(mesh),
        micro=options["micro_batch"],
        accumulation=options["accumulation"],
        data_parallel=options["data_parallel"],
        max_steps=options["max_steps"],
        max_epochs=options["max_epochs"],
        facts=_read_facts(facts),
        code=options["code"],
    )
    diagnosis = diagnose(open_target(target), settings)
    if as_json:
        print_json({**_plain(diagnosis), "exit_code": diagnosis.exit_code})
    else:
        from dckpt.viz.findings import render_diagnosis

        click.echo(render_diagnosis(diagnosis), nl=False)
    return diagnosis.exit_code


def _plain(diagnosis: Any) -> dict[str, Any]:
    names = ("url", "checkpoint", "step", "saved_world_size", "world_size", "walked_past", "passed")
    found = {name: getattr(diagnosis, name) for name in names}
    return {**found, "findings": [{**item.to_json(), "page": page_of(item.check)} for item in diagnosis.findings]}


def _parse_mesh(text: str | None) -> dict[str, int] | None:
    if text is None:
        return None
    try:
        return {axis.strip(): int(size) for axis, size in (item.split("=") for item in text.split(","))}
    except ValueError as error:
        raise ConfigError(f"--mesh {text}: expected axes and sizes such as dp=4,tp=2.") from error


def _read_facts(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"--facts {path}: expected a JSON object, found {error}.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"--facts {path}: expected a JSON object, found {type(found).__name__}.")
    return found
