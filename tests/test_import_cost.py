"""`import dckpt` and the command line do not import torch, and `dckpt ls` answers at once on a long run."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from dckpt.cli.main import COMMANDS, MODULES
from dckpt.storage.local import LocalStorage
from tests.support.runs import training_tensors, write_checkpoint

CHECKPOINTS = 100
LS_LIMIT_S = 0.3
REPEATS = 5
HEAVY = ("torch", "safetensors.torch", "matplotlib", "hypothesis")


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 100 small but genuine checkpoints."""
    root = tmp_path_factory.mktemp("long") / "run"
    storage, tensors = LocalStorage(str(root)), training_tensors(size=4)
    for step in range(1, CHECKPOINTS + 1):
        write_checkpoint(storage, 10 * step, 1, tensors)
    return root


def modules_after(code: str) -> set[str]:
    """Names of all modules that a fresh interpreter holds after `code`."""
    program = f"{code}\nimport json, sys\nprint('\\n' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def median_seconds(*arguments: str) -> float:
    """Wall time of a process, the median of a few after one that warms the caches."""
    times = []
    for _ in range(REPEATS + 1):
        begun = time.perf_counter()
        subprocess.run([sys.executable, *arguments], capture_output=True, timeout=120, check=True)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def test_importing_dckpt_imports_next_to_nothing() -> None:
    bare = modules_after("pass")
    added = modules_after("import dckpt") - bare

    assert not added & {*HEAVY, "numpy", "rich", "click", "fsspec"}, sorted(added)
    assert {name for name in added if name.startswith("dckpt")} == {"dckpt", "dckpt.version"}


def test_a_public_name_that_needs_no_tensor_does_not_import_torch() -> None:
    added = modules_after("import dckpt\ndckpt.Retention(last=3, best=dckpt.Best('val_loss'))\ndckpt.StorageFullError")

    assert not added & set(HEAVY)


def test_a_public_name_that_needs_tensors_does_import_torch() -> None:
    """So that the tests around it would notice if `sys.modules` could not tell."""
    assert "torch" in modules_after("import dckpt\ndckpt.TrainState")


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_imports_torch(command: str, long_run: Path) -> None:
    """Run to its end on a real run, not only imported."""
    run, foreign = str(long_run), long_run.parent / "foreign"
    foreign.mkdir(exist_ok=True)
    # Weights alone, without a file of torch.save: those cannot be read without torch.
    safetensors.numpy.save_file({"weight": np.zeros((2, 2), np.float32)}, foreign / "model.safetensors")
    target = {
        "prune": [run, "--last", "3", "--dry-run"],
        "pin": [f"{run}@10"],
        "unpin": [f"{run}@10"],
        "rollback": [run, "--to", "500", "--dry-run"],
        "import": [str(foreign), str(long_run.parent / "imported"), "--dry-run"],
        "reshard": [run, str(long_run.parent / "new"), "--world-size", "3"],
        "explain": ["learning_rate"],
    }.get(command, [run])
    code = (
        "import sys\n"
        f"sys.argv = ['dckpt', {command!r}, *{target!r}]\n"
        "from dckpt.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code in (None, 0, 1, 2), end.code\n"
    )
    held = modules_after(code)

    assert f"dckpt.cli.{MODULES.get(command, command)}" in held
    assert not held & set(HEAVY)


def test_ls_on_a_long_run_answers_at_once(long_run: Path) -> None:
    """Within 0.3 s as a process; on a slow or busy machine, within twice what starting Python, click, rich and numpy
    costs there.
    """
    start = median_seconds("-c", "import click, numpy, rich.console, rich.table")
    listing = median_seconds("-m", "dckpt.cli.main", "ls", str(long_run))

    assert listing < max(LS_LIMIT_S, 2 * start), f"dckpt ls took {listing:.3f} s, an empty program {start:.3f} s"


def test_ls_shows_the_whole_run(long_run: Path) -> None:
    command = [sys.executable, "-m", "dckpt.cli.main", "ls", str(long_run), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)

    assert len(json.loads(done.stdout)["checkpoints"]) == CHECKPOINTS
