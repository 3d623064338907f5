"""The house's rows: a module imports its own package and strictly lower rows; torch stays where tensors are."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import dckpt

ROOT = Path(__file__).resolve().parent.parent

ROWS: dict[str, int] = {
    "errors": 0,
    "version": 0,
    "telemetry": 1,
    "findings": 1,
    "failpoint": 1,
    "format": 2,
    "storage": 2,
    "ranks": 2,
    "catalog": 3,
    "state": 3,
    "data": 3,
    "blocks": 3,
    "planning": 3,
    "dcp": 4,
    "resume": 4,
    "engine": 5,
    "tools": 5,
    "viz": 5,
    "checkpointer": 6,
    "preemption": 6,
    "cli": 7,
}
TORCH_FREE = (
    "errors",
    "version",
    "failpoint",
    "findings",
    "format",
    "storage",
    "catalog",
    "blocks",
    "planning",
    "viz",
    "cli",
    "tools",
)
TORCH_FREE_FILES = (
    *(f"dckpt/data/{name}.py" for name in ("fingerprint", "order", "position", "split")),
    "dckpt/resume/explain.py",
)
"""Of packages that may import torch: what commands use that must not."""
TORCH_FREE_FOLDERS = ("dckpt/resume/checks/",)
"""Folders of packages that do import torch elsewhere."""
TORCH_ALLOWED: dict[str, str] = {
    "dckpt/tools/foreign_torch.py": "reads files of torch.save, with weights_only, inside functions that only such files need",
}
"""File -> why it may import torch although its package is torch-free."""
INTERNALS_ALLOWED: dict[str, str] = {
    "benchmarks/simulation/": "plays thousands of ranks on one machine: it says what the engine of each of them would say",
}
"""Folder of benchmarks -> why it may use more than public names."""


@dataclass(frozen=True)
class Import:
    """One imported module, with the place that imports it."""

    where: str
    module: str
    names: tuple[str, ...] = ()


def read_imports(source: str, path: str) -> Iterator[Import]:
    """Every import, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(f"{path}:{node.lineno}", alias.name)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield Import(f"{path}:{node.lineno}", node.module or "", tuple(alias.name for alias in node.names))
        elif _is_import_call(node) and node.args and isinstance(node.args[0], ast.Constant):
            yield Import(f"{path}:{node.lineno}", str(node.args[0].value))


def _is_import_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) in (
        "importlib.import_module",
        "import_module",
        "__import__",
    )


def room_of(path: str) -> str:
    """dckpt/format/index.py -> format; dckpt/errors.py -> errors."""
    return path.split("/")[1].removesuffix(".py")


def layer_faults(source: str, path: str) -> list[str]:
    room = room_of(path)
    if room not in ROWS:
        return [f"{path}: {room} has no row; give it one in tests/test_layers.py and in ARCHITECTURE.md"]
    faults = []
    for found in read_imports(source, path):
        if found.module != "dckpt" and not found.module.startswith("dckpt."):
            continue
        # `from dckpt import failpoint` names a module; `from dckpt import Checkpointer` would be the package root.
        targets = (
            [name for name in found.names if name in ROWS] if found.module == "dckpt" else [found.module.split(".")[1]]
        )
        if found.module == "dckpt" and len(targets) != max(1, len(found.names)):
            faults.append(f"{found.where}: imports the package root; import from the module that defines the name")
        for target in targets:
            if target != room and ROWS.get(target, 99) >= ROWS[room]:
                faults.append(
                    f"{found.where}: {room} (row {ROWS[room]}) imports {target} (row {ROWS.get(target, '?')})"
                )
    return faults


def torch_faults(source: str, path: str) -> list[str]:
    is_free = room_of(path) in TORCH_FREE or path in TORCH_FREE_FILES or path.startswith(TORCH_FREE_FOLDERS)
    if not is_free or path in TORCH_ALLOWED:
        return []
    heavy = [found for found in read_imports(source, path) if found.module.split(".")[0] == "torch"]
    return [f"{found.where}: {room_of(path)} must not import {found.module}" for found in heavy]


def public_use_faults(source: str, path: str) -> list[str]:
    """launch/ and benchmarks/ hold `import dckpt` and its public names, nothing else of it."""
    if path.startswith(tuple(INTERNALS_ALLOWED)):
        return []
    faults = [
        f"{found.where}: imports {found.module}; use `import dckpt` and its public names"
        for found in read_imports(source, path)
        if found.module.startswith("dckpt.") or (found.module == "dckpt" and found.names)
    ]
    for node in ast.walk(ast.parse(source, path)):
        is_use = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dckpt"
        if is_use and node.attr not in dckpt.__all__:
            faults.append(f"{path}:{node.lineno}: dckpt.{node.attr} is not a public name")
    return faults


def python_files(*folders: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for folder in folders for path in (ROOT / folder).rglob("*.py"))


def check(files: list[str], find_faults) -> None:
    faults = [fault for name in files for fault in find_faults((ROOT / name).read_text(encoding="utf-8"), name)]

    assert not faults, "\n" + "\n".join(faults)


def library_files() -> list[str]:
    return [name for name in python_files("dckpt") if name != "dckpt/__init__.py"]


def test_modules_import_only_their_own_package_and_lower_rows() -> None:
    """No cycle, no import up, no import of the package root."""
    files = library_files()
    assert len(files) > 20
    check(files, layer_faults)


def test_torch_is_imported_only_where_tensors_are() -> None:
    check(library_files(), torch_faults)


def test_exceptions_to_the_torch_rule_exist_and_are_used() -> None:
    for name, reason in TORCH_ALLOWED.items():
        source = (ROOT / name).read_text(encoding="utf-8")
        assert reason and any(found.module.split(".")[0] == "torch" for found in read_imports(source, name)), name


def test_launch_and_benchmarks_use_public_names_only() -> None:
    check(python_files("launch", "benchmarks"), public_use_faults)


def test_packages_import_nothing_when_they_are_imported() -> None:
    """An `__init__.py` that imports would make every name in the package cost the whole package."""
    for name in library_files():
        if name.endswith("/__init__.py"):
            source = (ROOT / name).read_text(encoding="utf-8")
            body = ast.parse(source).body
            assert len(body) == 1 and ast.get_docstring(ast.parse(source)), (
                f"{name}: expected one docstring, nothing else"
            )


@pytest.mark.parametrize(
    ("source", "path", "expected"),
    [
        ("from dckpt.engine.saver import Saver", "dckpt/format/index.py", "imports engine (row 5)"),
        ("from dckpt.ranks.client import Client", "dckpt/storage/local.py", "imports ranks (row 2)"),
        ("def f():\n    import dckpt.cli.main", "dckpt/tools/verify.py", "imports cli (row 7)"),
        (
            "if TYPE_CHECKING:\n    from dckpt.state.tree import flatten",
            "dckpt/catalog/line.py",
            "imports state (row 3)",
        ),
        ("import importlib\nimportlib.import_module('dckpt.engine.saver')", "dckpt/dcp/read.py", "imports engine"),
        ("import dckpt", "dckpt/engine/saver.py", "package root"),
        ("from dckpt import Checkpointer, failpoint", "dckpt/engine/saver.py", "package root"),
        ("x = 1", "dckpt/helpers.py", "has no row"),
    ],
)
def test_a_wrong_import_is_found(source: str, path: str, expected: str) -> None:
    """The rule's own test: it would fail if the rule let things through."""
    assert any(expected in fault for fault in layer_faults(source, path))


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("from dckpt.format.layout import x\nfrom dckpt import failpoint\nimport torch", "dckpt/engine/saver.py"),
        ("from dckpt.format.values import x", "dckpt/format/index.py"),
        ("import json", "dckpt/errors.py"),
    ],
)
def test_a_right_import_passes(source: str, path: str) -> None:
    assert layer_faults(source, path) == []


def test_a_hidden_torch_import_is_found() -> None:
    assert torch_faults("def f():\n    from torch import nn", "dckpt/cli/ls.py")
    assert torch_faults("import torch.distributed as dist", "dckpt/blocks/read.py")
    assert torch_faults("import torch", "dckpt/data/order.py")
    assert torch_faults("import torch", "dckpt/resume/checks/data.py")
    assert not torch_faults("import torch", "dckpt/engine/saver.py")


def test_folders_that_may_use_internals_exist_and_do() -> None:
    for folder, reason in INTERNALS_ALLOWED.items():
        sources = [(ROOT / name).read_text(encoding="utf-8") for name in python_files(folder)]
        assert reason and any("from dckpt." in source for source in sources), folder


def test_private_use_in_launch_is_found() -> None:
    assert public_use_faults("from dckpt.engine.saver import Saver", "benchmarks/scale.py")
    assert public_use_faults("from dckpt.engine.saver import Saver", "launch/x.py")
    assert public_use_faults("from dckpt import Every", "launch/x.py")
    assert public_use_faults("import dckpt\ndckpt.engine", "launch/x.py")
    assert not public_use_faults("import dckpt\ndckpt.Every(steps=1)", "launch/x.py")
