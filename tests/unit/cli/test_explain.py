"""`dckpt explain`: the page of a check, the table of all, the closest names; and what a report calls it."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import dckpt
from dckpt.cli.main import main
from dckpt.resume import explain
from dckpt.resume.checks.registry import ALL_IDS
from tests.support.resume_runs import SmallRun, open_run, save_run

PAGES = Path(explain.__file__).parent / "pages"


def explained(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["explain", *arguments])


def test_in_a_pipe_a_page_is_printed_as_it_is_written() -> None:
    result = explained("global_batch")

    assert (result.exit_code, result.stdout) == (0, (PAGES / "global_batch.md").read_text())


def test_on_a_terminal_a_page_is_set() -> None:
    controller, terminal = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "dckpt.cli.main", "explain", "seed"], stdout=terminal)
    assert process.wait(timeout=60) == 0
    os.close(terminal)
    shown = os.read(controller, 100_000).decode()
    os.close(controller)

    assert "\x1b[" in shown and "What is compared" in shown and "## What" not in shown


def test_without_a_name_all_checks_are_listed() -> None:
    result = explained()

    assert result.exit_code == 0
    assert set(ALL_IDS) <= {line.split()[0] for line in result.stdout.splitlines() if line.strip()}


def test_a_name_that_is_none_is_a_wrong_command_line_and_gets_the_closest() -> None:
    result = explained("globl_batch")

    assert result.exit_code == 2
    assert "such as global_batch" in result.stderr


def test_json_has_the_same() -> None:
    one, every = json.loads(explained("global_batch", "--json").stdout), json.loads(explained("--json").stdout)

    assert (one["check"], one["phase"], one["severities"]) == ("global_batch", "before", ["critical", "info"])
    assert [page["check"] for page in every["checks"]] == list(explain.CHECK_IDS)


def test_reports_and_refusals_name_the_command_that_prints_the_page(tmp_path: Path) -> None:
    save_run(tmp_path)
    run = SmallRun(batch=dckpt.Batch(32))
    with open_run(tmp_path) as checkpointer, pytest.raises(dckpt.ResumeRejectedError) as caught:
        checkpointer.resume(run.state)
    with open_run(tmp_path) as checkpointer:
        report = checkpointer.resume(run.state, policy=dckpt.ResumePolicy(allow=("global_batch",)))
    assert report is not None

    assert "`dckpt explain global_batch`" in str(caught.value)
    assert "`dckpt explain global_batch`" in report.text()
    for finding in report.to_json()["findings"]:
        assert explained(*finding["page"].split()[2:]).exit_code == 0
