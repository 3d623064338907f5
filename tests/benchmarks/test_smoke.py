"""Every scenario runs, tiny and once, and its record has every figure."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.contenders.dckpt_run import has_command
from benchmarks.contenders.torch_checkpointing import is_installed
from benchmarks.record import read_record, wrong_figures
from benchmarks.registry import MODULES

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).parents[2]
DEADLINE_S = 560.0  # 30 s on two idle cores; a shared machine can be ten times slower

SERIES = {
    "blocking-save": {"disk", "tmpfs"},
    "many-small": {"whole", "sharded"},
    "async-stall": {"stall"},
    "overlap": {"free", "busy"},
    "load": {"same-ranks"},
    "reshard": {"fsdp-2-to-fsdp-3", "columns-2-to-fsdp-3"},
    "replicas": {"ddp", "hsdp"},
    "matched-layout": {"matched"} if has_command("reshard") else set(),
    "host-memory": {"async-save", "blocking-save", "load"},
    "lora": {"second-save"},
    "scale": {"fsdp"} if importlib.util.find_spec("benchmarks.scale") else set(),
}


def run_benchmarks(output: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> dict:
    command = [sys.executable, "-m", *launcher, "benchmarks", "--quick", "--output", str(output), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(2):
        ended = subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )
        # Threads of gloo sometimes abort a process of torchrun at its very end, also one that does nothing else.
        if "terminate called without an active exception" not in ended.stderr:
            break
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr[-4000:]}"
    return read_record(output / "record.json")


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("output")


@pytest.fixture(scope="module")
def record(output, tmp_path_factory) -> dict:
    directory = tmp_path_factory.mktemp("scratch")
    found = run_benchmarks(output, "--directory", str(directory))
    assert list(directory.iterdir()) == [], "a run removes what it wrote"
    return found


def scenario_of(record: dict, name: str) -> dict:
    (found,) = [scenario for scenario in record["scenarios"] if scenario["name"] == name]
    return found


@pytest.mark.parametrize("name", list(MODULES))
def test_a_scenario_measures_all_it_names(record, name):
    scenario = scenario_of(record, name)

    assert scenario["failed"] is None
    assert {series["name"] for series in scenario["series"]} == SERIES[name]
    assert bool(scenario["skipped"]) is (SERIES[name] == set())
    for series in scenario["series"]:
        roles = {contender["role"] for contender in series["contenders"].values()}
        assert "dckpt" in roles and (roles & {"peer", "limit"} or name in ("matched-layout", "scale"))
        assert all(contender["fsync"] for contender in series["contenders"].values())
        assert set(series["medians"]) == set(series["contenders"])
        missing = set(series["skipped"])
        for line in series["lines"]:
            is_skipped = any(contender in line["text"] for contender in missing)
            assert line["passed"] is not None or is_skipped, line


def test_every_figure_is_finite_and_positive(record):
    assert wrong_figures(record) == []


def test_peers_are_measured_or_named(record):
    (series,) = [one for one in scenario_of(record, "blocking-save")["series"] if one["name"] == "disk"]
    peers = {name for name, found in series["contenders"].items() if found["role"] == "peer"}

    assert {"dcp.save, 1 thread", "dcp.save, 2 threads", "torch.save", "safetensors"} <= peers
    assert ("torch_checkpointing" in peers) is is_installed()
    assert ("torch_checkpointing" in series["skipped"]) is not is_installed()


def test_the_bytes_in_the_record_are_those_that_are_saved(record):
    """What dcp.save leaves is the state that the record speaks of, and little else."""
    (series,) = scenario_of(record, "lora")["series"]
    written, total = series["medians"]["dcp.save"]["file_bytes"], series["conditions"]["bytes"]

    assert total < written < 1.2 * total


def test_the_machine_and_the_conditions_are_in_the_record(record):
    assert record["quick"] and record["rounds"] == 1 and record["ranks"] == 2
    assert record["machine"]["versions"]["dckpt"] and record["machine"]["versions"]["torch"]
    assert record["machine"]["file_system"] != "unknown"


def test_table_and_pictures_lie_beside_the_record(record, output):
    assert "A quick run" in (output / "table.md").read_text()
    pictures = {path.name for path in output.iterdir() if path.suffix in (".svg", ".png")}
    if pictures:
        assert {"blocking-save.svg", "blocking-save.png"} <= pictures


def test_under_torchrun_the_given_ranks_are_used(tmp_path):
    """One record; the storage is a URL, so that peers stand back; what needs other ranks says so."""
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    storage = (tmp_path / "stored").as_uri()
    arguments = ("--directory", str(tmp_path), "--storage", storage, "--only", "blocking-save", "--only", "reshard")

    record = run_benchmarks(tmp_path / "output", *arguments, "--no-pictures", launcher=launcher)

    (series,) = scenario_of(record, "blocking-save")["series"]
    assert set(series["contenders"]) == {"dckpt"} and "peers" in series["skipped"]
    assert scenario_of(record, "reshard")["skipped"] == "needs 3 ranks; torchrun started 2"
    assert wrong_figures(record) == []
    assert list((tmp_path / "stored").rglob("step-*"))
