"""`dckpt reshard` on the command line: the plan, the answer, the exit codes, the bar, and no torch."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from dckpt.blocks.gather import GATHER_BYTES_MAX
from dckpt.catalog.catalog import Catalog
from dckpt.cli.main import main
from dckpt.storage.local import LocalStorage
from tests.support.runs import training_tensors, write_checkpoint, write_generation
from tests.support.sharded_runs import Saved, State, unnamed, write_state

DCKPT = [sys.executable, "-m", "dckpt.cli.main"]
STATE_MIB = 600


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two steps of a complete training state, saved by two ranks."""
    storage = LocalStorage(str(tmp_path / "run"))
    for step in (10, 20):
        write_checkpoint(storage, step, 1, training_tensors(), metrics={"loss": 3.25})
    return tmp_path / "run"


def dckpt(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def from_json(result: Result) -> Any:
    return json.loads(result.stdout)


def content(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_it_says_what_it_did_and_verify_calls_the_result_complete(run: Path, tmp_path: Path) -> None:
    before = content(run)
    result = dckpt("reshard", run, tmp_path / "new", "--world-size", 3)

    assert result.exit_code == 0, result.stderr
    for expected in ("2 ranks", "3 ranks", "step-0000000020.g0001, the first of a new run", "Committed in"):
        assert expected in result.stdout, expected
    assert dckpt("verify", tmp_path / "new").exit_code == 0
    assert "COMPLETE" in dckpt("verify", tmp_path / "new").stdout
    assert "generation 1 (reshard, 3 ranks)" in dckpt("ls", tmp_path / "new").stdout
    assert "saved by 2 ranks (reshard)" in dckpt("show", tmp_path / "new").stdout
    assert from_json(dckpt("show", tmp_path / "new", "--json"))["made_from"]["checkpoint"] == "step-0000000020.g0001"
    assert content(run) == before


def test_a_step_into_its_own_run_names_what_it_supersedes(run: Path) -> None:
    result = dckpt("reshard", f"{run}@10", run, "--world-size", 3)

    assert result.exit_code == 0, result.stderr
    assert "Superseded by this: step-0000000020.g0001." in result.stdout
    listing = dckpt("ls", run).stdout
    assert "generation 2 (reshard from step-0000000010.g0001, 3 ranks) <- generation 1 (start, 2 ranks)" in listing


def test_the_plan_is_shown_and_nothing_is_written(run: Path, tmp_path: Path) -> None:
    result = dckpt("reshard", run, tmp_path / "new", "--mesh", "replicate=2, dp=2", "--dry-run")

    assert result.exit_code == 0, result.stderr
    assert "4 ranks (replicate=2, dp=2)" in result.stdout
    assert "Nothing was written: --dry-run." in result.stdout
    assert not (tmp_path / "new").exists()


def test_json_is_one_object_with_the_plan(run: Path, tmp_path: Path) -> None:
    plan = from_json(dckpt("reshard", run, tmp_path / "new", "--world-size", 3, "--dry-run", "--json"))
    done = from_json(dckpt("reshard", run, tmp_path / "new", "--world-size", 3, "--json"))

    assert (plan["is_done"], done["is_done"], done["duration_s"] > 0) == (False, True, True)
    assert plan["plan"]["checkpoint"] == done["plan"]["checkpoint"] == "step-0000000020.g0001"
    assert done["plan"]["num_bytes"] == plan["plan"]["num_bytes"]


def test_nothing_to_do_exits_1(run: Path, tmp_path: Path) -> None:
    result = dckpt("reshard", run, tmp_path / "new", "--world-size", 2)
    assert (result.exit_code, "Nothing to do" in result.stdout) == (1, True)
    assert from_json(dckpt("reshard", run, tmp_path / "new", "--world-size", 2, "--json"))["plan"] is None
    assert dckpt("reshard", run, tmp_path / "new", "--world-size", 2, "--dry-run").exit_code == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--world-size N, or --mesh"),
        (("--world-size", 0), "0"),
        (("--mesh", "dp"), "dp=4,tp=2"),
        (("--mesh", "dp=2,dp=2"), "distinct axes"),
        (("--mesh", "dp=-1"), "dp=-1"),
        (("--mesh", "dp=2", "--world-size", 3), "expected 3 ranks"),
        (("--mesh", "dp=2,tp=2"), "the checkpoint names no mesh"),
        (("--mesh", "dp=2,tp=2"), "Use --world-size, or pass TrainState(mesh=...) when saving"),
    ],
)
def test_a_wrong_command_line_and_an_impossible_mesh_exit_2(
    run: Path, tmp_path: Path, options: tuple, message: str
) -> None:
    result = dckpt("reshard", run, tmp_path / "new", *options)

    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "new").exists()


def test_what_is_not_there_exits_3(run: Path, tmp_path: Path) -> None:
    assert dckpt("reshard", tmp_path / "none", tmp_path / "new", "--world-size", 3).exit_code == 3
    assert dckpt("reshard", f"{run}@15", tmp_path / "new", "--world-size", 3).exit_code == 3


def test_a_damaged_source_exits_4_and_names_the_file(run: Path, tmp_path: Path) -> None:
    path = next(run.glob("step-0000000020.g0001/*/rank00001.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    result = dckpt("reshard", run, tmp_path / "new", "--world-size", 3, "--json")

    assert result.exit_code == 4
    assert path.name in from_json(result)["error"]["message"]
    assert not list((tmp_path / "new").glob("*"))


def test_a_full_disk_exits_5(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalStorage, "free_bytes", lambda _: 1000)
    result = dckpt("reshard", run, tmp_path / "new", "--world-size", 3)

    assert result.exit_code == 5
    assert "found 1,000" in result.stderr


def test_a_taken_name_exits_6(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    for name in ("old", "new"):
        write_checkpoint(storage, None, 0, {"w": np.zeros(4, np.float32)}, name=name, parts=(), values={})

    assert dckpt("reshard", tmp_path / "old", tmp_path / "new", "--world-size", 3).exit_code == 6


def test_another_run_in_the_way_exits_2(run: Path, tmp_path: Path) -> None:
    write_generation(LocalStorage(str(tmp_path / "new")), 1)
    result = dckpt("reshard", run, tmp_path / "new", "--world-size", 3)

    assert result.exit_code == 2
    assert "found another run" in result.stderr


def test_a_bar_with_the_time_left_is_shown_on_a_terminal_only(run: Path, tmp_path: Path) -> None:
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [*DCKPT, "reshard", str(run), str(tmp_path / "new"), "--world-size", "3"],
        stdout=subprocess.PIPE,
        stderr=terminal,
    )
    out, _ = process.communicate(timeout=60)
    os.close(terminal)
    shown = os.read(controller, 100_000).decode()
    os.close(controller)

    assert process.returncode == 0
    assert "step-0000000020.g0001" in shown
    assert ":" in shown, "the time left"
    assert b"Committed" in out
    assert dckpt("reshard", run, tmp_path / "other", "--world-size", 3).stderr == ""


MEASURED = """
import resource, sys
from dckpt.cli.main import main
import dckpt.cli.reshard, dckpt.viz.terminal, rich.table
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
try: main()
except SystemExit as end: assert end.code == 0, end.code
names = [name for name in ("torch",) if name in sys.modules]
print(peak() - before, names, file=sys.stderr)
"""


def large_run(root: Path) -> LocalStorage:
    """600 MiB in tensors larger and smaller than a piece, cut along the last dimension, which costs reads most."""
    storage = LocalStorage(str(root))
    rows = STATE_MIB * 2**20 // 4 // 2048 // 10
    array = np.arange(rows * 2048, dtype=np.float32).reshape(rows, 2048)
    cut = ((), (("rank",),))
    tensors = {f"model.{number}": Saved(array, cuts=cut) for number in range(10)}
    write_state(storage, State(unnamed(2), tensors))
    return storage


def test_memory_is_bounded_however_large_the_checkpoint_is_and_torch_is_not_imported(tmp_path: Path) -> None:
    """The peak of a process of its own, which grows by less than the stated constant and a fraction of the state."""
    storage = large_run(tmp_path / "run")
    command = [sys.executable, "-c", MEASURED, "reshard", storage.url, str(tmp_path / "new"), "--world-size", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    assert done.returncode == 0, done.stderr
    growth, _, names = done.stderr.strip().splitlines()[-1].partition(" ")
    assert names == "[]"
    assert int(growth) < GATHER_BYTES_MAX < STATE_MIB * 2**20 // 2
    first, second = (Catalog(LocalStorage(str(tmp_path / name))) for name in ("run", "new"))
    sizes = [catalog.read_manifest(catalog.line()[0].name)[0].total_bytes for catalog in (first, second)]
    assert min(sizes) >= STATE_MIB * 2**20
