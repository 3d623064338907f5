"""The commands' answers: text for people, JSON for programs, and the exit codes that `--help` documents."""

from __future__ import annotations

import json
import os
import pty
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from dckpt.catalog.catalog import Catalog
from dckpt.cli.main import COMMANDS, main
from dckpt.storage.local import LocalStorage
from tests.support.runs import training_tensors, write_checkpoint

DCKPT = [sys.executable, "-m", "dckpt.cli.main"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Generation 1: steps 10, 20, 30. Generation 2 continues from 20: step 40."""
    storage = LocalStorage(str(tmp_path / "run"))
    write_checkpoint(storage, 10, 1, training_tensors(), metrics={"loss": 3.25})
    parent = write_checkpoint(storage, 20, 1, training_tensors(), metrics={"loss": 2.5})
    write_checkpoint(storage, 30, 1, training_tensors())
    write_checkpoint(storage, 40, 2, training_tensors(), parent=parent, metrics={"loss": float("nan")})
    return tmp_path / "run"


def dckpt(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def from_json(result: Result) -> Any:
    return json.loads(result.stdout)


def damage(run: Path, name: str = "step-0000000040.g0002") -> Path:
    path = next(run.glob(f"{name}/*/rank00001.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return path


def test_ls_prints_a_table_and_the_line(run: Path) -> None:
    result = dckpt("ls", run)

    assert result.exit_code == 0
    assert "4 checkpoints" in result.stdout
    rows = [line.split() for line in result.stdout.splitlines() if line.strip().startswith(("10", "20", "30", "40"))]
    assert [row[0] for row in rows] == ["30", "40", "20", "10"] or [row[0] for row in rows] == ["40", "30", "20", "10"]
    assert any("latest" in row for row in rows)
    assert any("superseded" in row for row in rows)
    assert "3.25" in result.stdout
    assert "generation 2 (resume from step-0000000020.g0001, 2 ranks) <- generation 1 (start, 2 ranks)" in result.stdout
    assert not any(line != line.rstrip() for line in result.stdout.splitlines())


def test_ls_json_is_one_object_with_every_field(run: Path) -> None:
    listing = from_json(dckpt("ls", run, "--json"))

    assert [row["step"] for row in listing["checkpoints"]] == [40, 30, 20, 10]
    assert listing["checkpoints"][0]["metrics"] == {"loss": "nan"}
    assert listing["checkpoints"][0]["states"] == ["latest"]


def test_ls_of_a_damaged_manifest_says_so_and_exits_4(run: Path) -> None:
    (run / "step-0000000020.g0001" / "manifest.json").write_bytes(b"{")

    result = dckpt("ls", run)

    assert result.exit_code == 4
    assert "damaged manifest" in result.stdout
    assert "step-0000000020.g0001/manifest.json" in result.stdout


def test_ls_mentions_leftovers_in_one_line(run: Path) -> None:
    (run / f".tmp-{'a' * 32}").mkdir()

    assert "Leftovers: 1 attempt" in dckpt("ls", run).stdout


@pytest.mark.parametrize("command", ["ls", "show", "verify"])
def test_a_place_that_is_no_run_exits_3_as_text_and_as_json(tmp_path: Path, command: str) -> None:
    result = dckpt(command, tmp_path / "nothing")
    assert result.exit_code == 3
    assert str(tmp_path / "nothing") in result.stderr
    assert "Traceback" not in result.stderr

    result = dckpt(command, tmp_path / "nothing", "--json")
    assert result.exit_code == 3
    assert from_json(result)["error"]["type"] == "CheckpointNotFoundError"


def test_an_unknown_step_exits_3_and_lists_what_exists(run: Path) -> None:
    result = dckpt("show", f"{run}@15")

    assert result.exit_code == 3
    assert "step-0000000040.g0002" in result.stderr


def test_an_unsupported_scheme_and_a_wrong_option_exit_2(run: Path) -> None:
    assert dckpt("ls", "gopher://host/run").exit_code == 2
    assert dckpt("ls", run, "--nonsense").exit_code == 2
    assert dckpt("prune", run).exit_code == 2
    assert dckpt("prune", run, "--last", "0").exit_code == 2
    assert dckpt("prune", run, "--best", "loss:up").exit_code == 2
    assert dckpt("prune", run, "--last", "1", "--yes", "--dry-run").exit_code == 2


def test_show_prints_everything_a_person_asks(run: Path) -> None:
    result = dckpt("show", f"{run}@20", "--tensors")

    assert result.exit_code == 0
    for expected in (
        *("step-0000000020.g0001", "on the line", "world size", "model", "optim", "scheduler.last_epoch"),
        *("equal on all ranks", "rank00001.safetensors", "model.weight", "[64, 8]", "F32", "dckpt 0.0.0"),
    ):
        assert expected in result.stdout, expected
    assert from_json(dckpt("show", f"{run}@20", "--json"))["tensors"] is None


def test_verify_exits_0_for_complete_1_for_partial_4_for_corrupt(run: Path) -> None:
    result = dckpt("verify", run)
    assert (result.exit_code, "COMPLETE: every byte is good" in result.stdout) == (0, True)

    path = damage(run)
    result = dckpt("verify", run)
    assert result.exit_code == 4
    assert "CORRUPT" in result.stdout
    assert "`dckpt repair` shows what can be restored" in " ".join(result.stdout.split())
    assert "64 KiB, the unit of checksums" in " ".join(result.stdout.split())
    assert str(path.relative_to(run)) in result.stdout
    assert "written by rank 1" in result.stdout
    assert "model.weight" in result.stdout
    assert dckpt("verify", f"{run}@20").exit_code == 0
    assert dckpt("verify", run, "--all").exit_code == 4
    assert from_json(dckpt("verify", run, "--json"))["verdict"] == "CORRUPT"


def test_verify_of_a_partial_checkpoint_says_what_training_will_feel(tmp_path: Path) -> None:
    tensors = {"model.weight": np.zeros((4, 4), np.float32)}
    write_checkpoint(LocalStorage(str(tmp_path / "run")), 1, 1, tensors, parts=("model",), values={})

    result = dckpt("verify", tmp_path / "run")

    assert result.exit_code == 1
    assert "PARTIAL" in result.stdout
    assert "No optim: moments restart at zero; expect a loss spike." in result.stdout


def test_prune_without_a_terminal_asks_for_yes_and_removes_nothing(run: Path) -> None:
    result = dckpt("prune", run, "--last", "1")

    assert result.exit_code == 2
    assert "--yes" in result.stderr
    assert len(Catalog(LocalStorage(str(run))).checkpoints()) == 4


def test_prune_shows_its_plan_and_with_yes_carries_it_out(run: Path) -> None:
    shown = dckpt("prune", run, "--last", "1", "--dry-run")
    assert shown.exit_code == 0
    assert len(Catalog(LocalStorage(str(run))).checkpoints()) == 4

    done = dckpt("prune", run, "--last", "1", "--superseded", "--yes")

    assert done.exit_code == 0
    assert "Removed 3 checkpoints" in done.stdout
    assert [c.step for c in Catalog(LocalStorage(str(run))).checkpoints()] == [40]
    assert dckpt("prune", run, "--last", "1", "--yes").exit_code == 1
    assert from_json(dckpt("prune", run, "--last", "1", "--json", "--dry-run"))["is_applied"] is False


@pytest.mark.parametrize(("answer", "left", "code"), [("n", 4, 1), ("y", 2, 0)])
def test_prune_on_a_terminal_asks_first(run: Path, answer: str, left: int, code: int) -> None:
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [*DCKPT, "prune", str(run), "--last", "1"], stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    os.write(controller, f"{answer}\n".encode())
    out, err = process.communicate(timeout=60)
    os.close(controller)
    os.close(terminal)

    assert process.returncode == code, err
    assert b"Remove 2 checkpoints" in out + err
    assert len(Catalog(LocalStorage(str(run))).checkpoints()) == left


def test_every_command_documents_its_exit_codes() -> None:
    for command in COMMANDS:
        assert "Exit codes" in dckpt(command, "--help").stdout
    help_text = dckpt("--help").stdout
    for command, line in COMMANDS.items():
        assert command in help_text
        assert line in help_text


@pytest.mark.parametrize("arguments", [("ls",), ("show",), ("verify", "--quick"), ("prune", "--last=1", "--dry-run")])
def test_no_command_imports_torch_and_ls_not_even_numpy(run: Path, arguments: tuple[str, ...]) -> None:
    forbidden = ["torch", "numpy"] if arguments == ("ls",) else ["torch"]
    code = (
        "import sys; from dckpt.cli.main import main\n"
        "try: main()\n"
        f"finally: print([name for name in {forbidden} if name in sys.modules], file=sys.stderr)"
    )

    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, str(run)], capture_output=True, text=True, timeout=60, check=False
    )

    assert done.returncode == 0, done.stderr
    assert done.stderr == "[]\n"


def test_ls_of_100_checkpoints_answers_in_a_third_of_a_second(tmp_path: Path) -> None:
    """Processor time of the best of some runs: it is single-threaded, and others on the machine must not decide."""
    storage = LocalStorage(str(tmp_path / "run"))
    tensors = {"model.weight": np.zeros((8, 4), np.float32)}
    for step in range(100):
        write_checkpoint(storage, step, 1, tensors, world_size=8, metrics={"loss": 1.0})
    seconds = []
    for _ in range(10):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [*DCKPT, "ls", str(tmp_path / "run")], capture_output=True, text=True, timeout=60, check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if seconds[-1] <= 0.3:
            break

    assert "100 checkpoints" in done.stdout
    assert min(seconds) <= 0.3, seconds


def test_verify_shows_a_progress_bar_on_a_terminal_only(run: Path) -> None:
    controller, terminal = pty.openpty()
    process = subprocess.Popen([*DCKPT, "verify", str(run)], stdout=subprocess.PIPE, stderr=terminal)
    out, _ = process.communicate(timeout=60)
    os.close(terminal)
    shown = os.read(controller, 100_000)
    os.close(controller)

    assert process.returncode == 0
    assert b"step-0000000040.g0002" in shown
    assert b"COMPLETE" in out
    assert dckpt("verify", run).stderr == ""
