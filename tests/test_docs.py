"""The README claims nothing without a test, and its links and commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import dckpt
from dckpt.cli.main import COMMANDS
from dckpt.resume.checks.registry import ALL_IDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FOR_USERS = ["README.md", *(path.relative_to(ROOT).as_posix() for path in (ROOT / "dckpt/resume/pages").glob("*.md"))]


def _promise_rows() -> list[tuple[str, str]]:
    table = README.split("## What it promises")[1].split("\n\n")[1]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]]
    return [(row[0].strip("| "), row[-1].strip("`| ")) for row in rows]


def test_the_table_of_promises_is_found():
    assert len(_promise_rows()) >= 10


@pytest.mark.parametrize(("promise", "test"), _promise_rows())
def test_every_promise_names_a_test_that_exists(promise, test):
    path, _, name = test.partition("::")
    source = (ROOT / path).read_text()

    assert re.search(rf"^def {name or 'test_'}", source, flags=re.MULTILINE), promise


@pytest.mark.parametrize(
    "page", ["README.md", "dckpt/ARCHITECTURE.md", "dckpt/format/FORMAT.md", "tests/faults/README.md"]
)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_the_loop_in_the_readme_is_python():
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        compile(block, "README.md", "exec")


def test_tests_that_other_pages_name_exist():
    page = (ROOT / "tests/faults/README.md").read_text()
    for path, name in re.findall(r"`(test_\w+\.py)::(test_\w+?)(?:_?\.\.)?`", page):
        assert f"def {name}" in (ROOT / "tests/faults" / path).read_text(), f"{path}::{name}"


@pytest.mark.parametrize("page", FOR_USERS)
def test_commands_public_names_and_checks_that_a_page_names_exist(page):
    text = (ROOT / page).read_text()

    assert set(re.findall(r"`dckpt ([a-z]+)", text)) <= set(COMMANDS)
    assert set(re.findall(r"\bdckpt\.([A-Z]\w*)", text)) <= set(dckpt.__all__)
    assert {
        name for names in re.findall(r"allow=\(([^)]*)\)", text) for name in re.findall(r'"(\w+)"', names)
    } <= ALL_IDS
    assert set(re.findall(r"(?:CRITICAL|WARNING|INFO) \[(\w+)\]", text)) <= ALL_IDS
