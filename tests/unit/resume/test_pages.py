"""Each check has a page, the pages say what the checks do, and a wheel holds them."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from collections import defaultdict
from pathlib import Path

import pytest

from dckpt.errors import ConfigError
from dckpt.resume.checks.registry import ALL_CHECKS, ALL_IDS
from dckpt.resume.explain import CHECK_IDS, PHASES, read_page, read_pages

ROOT = Path(__file__).resolve().parents[3]
PAGES = ROOT / "dckpt/resume/pages"
SEVERITIES = ("critical", "warning", "info")


def test_every_check_has_a_page_and_every_page_is_of_a_check() -> None:
    assert {path.stem for path in PAGES.glob("*.md")} - {"README"} == set(ALL_IDS) == set(CHECK_IDS)


@pytest.mark.parametrize("check", sorted(ALL_IDS))
def test_a_page_says_what_is_compared_why_it_matters_and_what_to_do(check: str) -> None:
    page = read_page(check)

    sections = re.findall(r"^## (.+)$", page.text, flags=re.MULTILINE)
    assert sections == ["What is compared", "Why it matters", "What to do"]
    assert 15 <= page.text.count("\n") <= 40
    for block in re.findall(r"```python\n(.*?)```", page.text, flags=re.DOTALL):
        compile(block, f"{check}.md", "exec")
    if "critical" in page.severities:
        assert re.search(rf'allow=\("{check}",\)', page.text), "how to allow it by name"
    else:
        assert "allow=" not in page.text, "only critical findings need to be allowed"


@pytest.mark.parametrize("check", ALL_CHECKS, ids=lambda check: check.id)
def test_a_page_has_the_title_and_the_phase_of_its_check(check) -> None:
    page = read_page(check.id)

    assert (page.title, page.phase) == (check.title, check.phase)


def given_severities() -> dict[str, set[str]]:
    """Check -> severities in calls of `finding("<check>", <severity>, ...)`; checks with one that is computed are left out."""
    found: dict[str, set[str]] = defaultdict(set)
    computed: set[str] = set()
    for path in (ROOT / "dckpt/resume/checks").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or ast.unparse(node.func) != "finding":
                continue
            name, severity = node.args[:2]
            if isinstance(name, ast.Constant):
                known = {n.value for n in ast.walk(severity) if isinstance(n, ast.Constant) and n.value in SEVERITIES}
                found[name.value] |= known
                computed |= set() if known else {name.value}
    return {check: given for check, given in found.items() if check not in computed}


def test_pages_name_the_severities_that_the_checks_give() -> None:
    given = given_severities()
    assert len(given) > 30

    assert {check: set(read_page(check).severities) for check in given} == given


def test_the_index_lists_every_page_under_its_phase() -> None:
    index = (PAGES / "README.md").read_text()
    for phase, words in PHASES.items():
        rows = re.search(
            rf"## {words[:1].upper()}{words[1:]}\n\n.*?\|---\|---\|---\|\n(.*?)(?:\n\n|\Z)", index, re.DOTALL
        )
        assert rows is not None, phase

        assert rows[1].strip().splitlines() == [
            f"| [`{page.check}`]({page.check}.md) | {', '.join(page.severities)} | {page.title} |"
            for page in read_pages()
            if page.phase == phase
        ]


@pytest.mark.parametrize(
    ("name", "closest"), [("learnig_rate", "learning_rate"), ("moments", "moments_lost"), ("train-mode", "train_mode")]
)
def test_a_name_that_is_none_gets_the_closest_ones(name: str, closest: str) -> None:
    with pytest.raises(ConfigError, match=closest):
        read_page(name)


def test_a_wheel_holds_every_page(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    shutil.copytree(ROOT / "dckpt", source / "dckpt", ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools import build_meta; build_meta.build_wheel('..')"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    assert {f"dckpt/resume/pages/{path.name}" for path in PAGES.glob("*.md")} <= names
    assert "dckpt/format/FORMAT.md" in names
