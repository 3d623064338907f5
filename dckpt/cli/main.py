"""The command `dckpt`.

Exit codes, the same for every command:

====  =====================================================================================
code  meaning
====  =====================================================================================
0     ok
1     incomplete: a checkpoint is PARTIAL, or there was nothing to do, or you said no
2     the command line is wrong, or asks for what the checkpoint does not allow
3     not found: no such run, checkpoint or step
4     corrupt: a file differs from its checksums, is missing or cannot be parsed
5     storage trouble: no permission, a full disk, a device error, a format newer than this dckpt
6     conflict: another job changed the run meanwhile
====  =====================================================================================

With `--json`, standard output is exactly one JSON object; an error is ``{"error": {"type", "message"}}``.
"""

from __future__ import annotations

import importlib

import click

from dckpt.version import __version__

# One module of dckpt.cli each, with a click command of the same name; imported when it is called, not before.
COMMANDS: dict[str, str] = {
    "ls": "List the checkpoints of a run.",
    "show": "Everything about one checkpoint.",
    "verify": "Read every byte of a checkpoint and say what it is good for.",
    "doctor": "Would this run resume cleanly with these settings?",
    "repair": "Give back what can be proved, fill in what can be derived.",
    "prune": "Remove checkpoints by a policy, superseded steps and leftovers.",
    "pin": "Keep a checkpoint whatever the policy says.",
    "unpin": "Let the policy judge a checkpoint again.",
    "rollback": "Make an earlier step the latest again; nothing is deleted.",
    "import": "Make a checkpoint of another kind the first one of a run.",
    "reshard": "Rewrite a checkpoint for another number of ranks.",
    "explain": "What a check of the resume report means, and what to do.",
}

# `import` is a word of the language and cannot be a function's name.
MODULES = {"import": "import_run"}

EXIT_CODES_HELP = """\b
Exit codes:
  0  ok
  1  incomplete (PARTIAL), or nothing to do
  2  wrong command line
  3  not found
  4  corrupt
  5  storage trouble, or a format newer than this dckpt
  6  conflict with another job
"""


class _Commands(click.Group):
    """Imports a command's module only when that command runs: `dckpt ls` must not pay for `dckpt verify`."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        if cmd_name not in COMMANDS:
            return None
        module = MODULES.get(cmd_name, cmd_name)
        command = getattr(importlib.import_module(f"dckpt.cli.{module}"), module)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's signature
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Commands, epilog=EXIT_CODES_HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dckpt")
def main() -> None:
    """Look at, verify, repair, keep, roll back, prune and reshard the checkpoints of a training run.

    RUN is the directory that was given to Checkpointer. STEP is latest, a number, or a checkpoint's full
    name; a superseded step needs its full name.
    """


if __name__ == "__main__":
    main()
