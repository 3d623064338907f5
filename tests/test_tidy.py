"""The tree stays easy to read: sizes are reported and bounded, text is free of one machine's paths, links lead somewhere."""

from __future__ import annotations

import ast
import re
import subprocess
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FILE_AIM, FILE_LIMIT = 450, 600
FUNCTION_AIM, FUNCTION_LIMIT = 60, 100

# In parts, so that this file does not hold what it looks for.
MACHINE_PATHS = re.compile(r"(?:^|[^A-Za-z0-9._~-])/(?:work|root|opt|home|Users|mnt)/[A-Za-z.]")
FORBIDDEN = re.compile(
    "|".join(("cla" + "ude", "anth" + "ropic", "open" + "ai", "chat" + "gpt", "copi" + "lot", "work" + "place"))
    + "|"
    + r"\bAI\b.{0,3}(?:session|assistant|agent|tool)|\bhel"
    + r"per [A-E]\b|\bthe integ"
    + "rator",
    re.IGNORECASE,
)


def tracked_files() -> list[str]:
    """What git holds or would add; every text file here when this is not a checkout."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, check=False)
    if listing.returncode == 0:
        names = [name for name in listing.stdout.decode().split("\0") if name]
    else:
        skipped = {".venv", "build", "demo-run", "runs", "__pycache__"}
        paths = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
        names = [path.as_posix() for path in paths if not skipped & set(path.parts)]
    return sorted(name for name in set(names) if (ROOT / name).is_file())


def read_text(name: str) -> str | None:
    try:
        return (ROOT / name).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def function_lengths(source: str) -> list[tuple[str, int, int]]:
    """(name, first line, lines without the docstring) of each function."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0]
            has_docstring = ast.get_docstring(node, clean=False) is not None
            docstring = (first.end_lineno or 0) - first.lineno + 1 if has_docstring else 0
            found.append((node.name, node.lineno, (node.end_lineno or 0) - node.lineno + 1 - docstring))
    return found


@pytest.mark.filterwarnings("default::UserWarning")
def test_files_and_functions_keep_to_their_sizes() -> None:
    """Past the aim: a warning in the summary, a reason to look again. Past the limit: a failure."""
    long, too_long = [], []
    for name in tracked_files():
        if not name.endswith(".py"):
            continue
        source = read_text(name)
        assert source is not None, name
        lines = source.count("\n")
        if lines > FILE_AIM:
            (too_long if lines > FILE_LIMIT else long).append(f"{name}: {lines} lines")
        for function, line, length in function_lengths(source):
            if length > FUNCTION_AIM:
                (too_long if length > FUNCTION_LIMIT else long).append(f"{name}:{line} {function}: {length} lines")
    if long:
        warnings.warn("longer than the aim:\n" + "\n".join(long), UserWarning, stacklevel=1)

    assert not too_long, "\n" + "\n".join(too_long)


def test_the_length_of_a_function_leaves_its_docstring_out() -> None:
    source = 'def f():\n    """One.\n\n    Two.\n    """\n    return 1\n'

    assert function_lengths(source) == [("f", 1, 2)]


def test_no_text_names_a_path_of_one_machine_or_who_typed_it() -> None:
    faults = []
    for name in tracked_files():
        for number, line in enumerate((read_text(name) or "").splitlines(), start=1):
            for rule in (MACHINE_PATHS, FORBIDDEN):
                found = rule.search(line)
                if found:
                    faults.append(f"{name}:{number}: {found.group().strip()}")

    assert not faults, "\n" + "\n".join(faults)


@pytest.mark.parametrize(
    "text", ["see /wo" + "rk/main", "'/ro" + "ot/.cache'", "as Cla" + "ude said", "an A" + "I assistant"]
)
def test_forbidden_text_is_found(text: str) -> None:
    assert MACHINE_PATHS.search(text) or FORBIDDEN.search(text)


@pytest.mark.parametrize("text", ["https://a.b/opt/x", "runs/work/x", "a byte-level GPT", "./home/x", "/tmp/x"])
def test_ordinary_text_passes(text: str) -> None:
    assert not MACHINE_PATHS.search(text) and not FORBIDDEN.search(text)


def links_of(text: str) -> list[str]:
    """Targets of Markdown links that are files here, without their anchors; code blocks left out."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    prose = re.sub(r"`[^`\n]*`", "", prose)
    targets = re.findall(r"\]\(\s*<?([^)>\s]+)>?[^)]*\)", prose) + re.findall(r'\bsrc="([^"]+)"', prose)
    return [target.split("#")[0] for target in targets if not re.match(r"[a-z][a-z0-9+.-]*:|#", target)]


def test_relative_links_in_documents_exist() -> None:
    documents = [name for name in tracked_files() if name.endswith(".md")]
    broken = [
        f"{name}: {target}"
        for name in documents
        for target in links_of(read_text(name) or "")
        if not ((ROOT / name).parent / target).exists()
    ]

    assert not broken, "\n" + "\n".join(broken)


def test_a_link_is_found_and_a_code_block_is_not() -> None:
    text = "[a](docs/a.md#part) [b](https://x.y/z) [c](#here)\n```\n[d](d.md)\n```\n![e](e.png 'title') `[f](f.md)`"

    assert links_of(text) == ["docs/a.md", "e.png"]
