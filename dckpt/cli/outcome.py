"""From errors and records to exit codes and text: the part that every command shares."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import click

from dckpt.errors import (
    CheckpointNotFoundError,
    CommitConflictError,
    ConfigError,
    CorruptCheckpointError,
    DckptError,
    FormatVersionError,
    IncompatibleStateError,
    StorageError,
    StorageMissingError,
)

OK = 0
INCOMPLETE = 1
USAGE = 2
NOT_FOUND = 3
CORRUPT = 4
STORAGE = 5
CONFLICT = 6

# The first match decides, so a subclass stands before its base.
_EXIT_CODES: tuple[tuple[type[DckptError], int], ...] = (
    (ConfigError, USAGE),
    (IncompatibleStateError, USAGE),
    (CheckpointNotFoundError, NOT_FOUND),
    (CommitConflictError, CONFLICT),
    (CorruptCheckpointError, CORRUPT),
    (FormatVersionError, STORAGE),
    (StorageMissingError, NOT_FOUND),
    (StorageError, STORAGE),
)

Command = TypeVar("Command", bound=Callable[..., int])


def exit_code_of(error: DckptError) -> int:
    """The exit code that stands for the error; see the table in `dckpt/cli/main.py`."""
    return next((code for kind, code in _EXIT_CODES if isinstance(error, kind)), STORAGE)


def returns_exit_code(command: Command) -> Callable[..., NoReturn]:
    """The command's answer becomes the exit code of the process; so do our errors, each in one line."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> NoReturn:
        try:
            code = command(*args, **kwargs)
        except DckptError as error:
            if kwargs.get("as_json"):
                print_json({"error": {"type": type(error).__name__, "message": error.message}})
            else:
                click.echo(f"dckpt: {error.message}", err=True)
            code = exit_code_of(error)
        sys.exit(code)

    return run


def print_json(record: Any) -> None:
    """One JSON object on standard output: dataclasses by their fields; inf and nan as text."""
    click.echo(json.dumps(_plain(record), ensure_ascii=False, allow_nan=False, indent=2))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def is_confirmed(question: str, *, yes: bool, as_json: bool) -> bool:
    """Whether to go on: told so by `--yes`, or by a person at the terminal. A usage error where nobody can be asked."""
    if yes:
        return True
    if as_json or not sys.stdin.isatty():
        raise click.UsageError("Nobody is here to confirm: pass --yes to go on, or --dry-run to look.")
    return click.confirm(question)


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
