"""From a record to text and pictures; sizes that fit; the command line."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks import machine
from benchmarks.figures import Line, Value
from benchmarks.options import parse_options
from benchmarks.pictures import draw
from benchmarks.record import (
    count_lines,
    measured_scenario,
    read_record,
    record_of,
    skipped_scenario,
    write_record,
    wrong_figures,
)
from benchmarks.report import BEGIN, END, main, replaced
from benchmarks.series import Entrant, Series
from benchmarks.setup import Setup
from benchmarks.table import render

MACHINE = {
    "cores": 2,
    "processor": "Some Processor",
    "memory_bytes": 8 << 30,
    "kernel": "6.1",
    "file_system": "ext4",
    "gpus": [],
    "python": "3.11",
    "versions": {"dckpt": "0.1", "torch": "2.13", "torch_checkpointing": None},
}


def make_record(*, ours: float = 0.5, storage: str = "s3://bucket/secret") -> dict:
    series = Series(
        name="disk",
        title="Blocking save, on disk",
        conditions={"ranks": 2, "bytes": 1_000_000_000, "tensors": 4, "file_system": "ext4"},
        entrants=(
            Entrant("peer", "peer", "its file"),
            Entrant("dckpt", "dckpt", "every file and directory"),
            Entrant("raw", "limit", "its file"),
        ),
        rounds=({"peer": {"save_s": 2.0}, "dckpt": {"save_s": ours}, "raw": {"save_s": 0.4}},),
        lines=(
            Line("speed / raw", "at least", 0.9, Value("raw", "save_s"), Value("dckpt", "save_s")),
            Line("speed / peer", "at least", 1.3, Value("peer", "save_s"), Value("dckpt", "save_s")),
            Line("speed / fio", "at least", 0.9, Value("fio", "save_s"), Value("dckpt", "save_s")),
        ),
        skipped={"fio": "fio is not installed"},
    ).to_json()
    setup = Setup(Path("somewhere"), storage, 1000, 1, False)
    scenarios = [
        measured_scenario("blocking-save", "Blocking save", [series], 3.0),
        skipped_scenario("scale", "Many ranks", "needs more"),
    ]
    return record_of(MACHINE, setup, 2, scenarios, 0.0)


def test_the_text_shows_targets_figures_and_what_was_not_measured():
    text = render(make_record())

    assert "| Blocking save, on disk | speed / raw | ≥ 0.9 | 0.8 | 0.8 to 0.8 | **missed** |" in text
    assert "| Blocking save, on disk | speed / peer | ≥ 1.3 | 4 | 4 to 4 | holds |" in text
    assert "| Blocking save, on disk | speed / fio | ≥ 0.9 |  |  | not measured |" in text
    assert "| **dckpt** | 0.5 s, 2.00 GB/s | 1 | every file and directory |" in text
    assert "Not measured: fio (fio is not installed)." in text
    assert "Not measured: needs more." in text
    assert text.index("| raw |") < text.index("| **dckpt** |") < text.index("| peer |")


def test_lines_are_counted_by_verdict():
    assert count_lines(make_record()) == (1, 1, 1)


@pytest.mark.parametrize(("storage", "kind"), [("s3://bucket/secret", "s3"), ("/disk/secret", "file")])
def test_a_record_names_no_place(tmp_path, storage, kind):
    record = make_record(storage=storage)
    write_record(record, tmp_path / "record.json")

    text = (tmp_path / "record.json").read_text()
    assert "somewhere" not in text and "secret" not in text and record["storage"] == kind
    assert read_record(tmp_path / "record.json") == record


def test_another_document_is_refused(tmp_path):
    (tmp_path / "record.json").write_text("{}")

    with pytest.raises(ValueError, match="expected a dckpt benchmark record"):
        read_record(tmp_path / "record.json")


def test_a_figure_that_is_not_a_number_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_record(make_record(ours=math.nan), tmp_path / "record.json")


@pytest.mark.parametrize("figure", [0.0, -1.0, math.inf, math.nan])
def test_wrong_figures_are_found(figure):
    record = make_record()
    assert wrong_figures(record) == []

    record["scenarios"][0]["series"][0]["rounds"][0]["peer"]["save_s"] = figure
    assert len(wrong_figures(record)) == 1


def test_a_contender_without_a_figure_is_found():
    record = make_record()
    del record["scenarios"][0]["series"][0]["rounds"][0]["peer"]

    assert "peer" in wrong_figures(record)[0]


def test_pictures_are_drawn_in_both_formats(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need dckpt[report]")

    paths = draw(make_record(), tmp_path)

    assert sorted(path.name for path in paths) == ["blocking-save.png", "blocking-save.svg"]
    assert (tmp_path / "blocking-save.png").read_bytes().startswith(b"\x89PNG")
    assert "torch" not in (svg := (tmp_path / "blocking-save.svg").read_text()) and "<svg" in svg


def test_the_page_keeps_everything_outside_its_markers():
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"

    assert replaced(page, "new\n") == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"


@pytest.mark.parametrize("page", ["", f"{END}{BEGIN}", BEGIN, f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_page_without_its_markers_is_refused(page):
    with pytest.raises(ValueError, match="expected one"):
        replaced(page, "new")


def test_the_command_writes_the_page(tmp_path):
    write_record(make_record(), tmp_path / "record.json")
    (tmp_path / "page.md").write_text(f"# Page\n{BEGIN}\n{END}\n")

    assert main([str(tmp_path / "record.json"), "--readme", str(tmp_path / "page.md")]) == 0
    assert render(make_record()).strip() in (tmp_path / "page.md").read_text()


@pytest.mark.parametrize(
    ("memory", "disk", "megabytes"),
    [(20e9, 100e9, 2000), (1e12, 1e12, 3200), (1e12, 12e9, 1000), (1e6, 1e6, 64)],
)
def test_the_size_follows_from_the_scarcer_of_memory_and_disk(memory, disk, megabytes):
    assert machine.fitting_megabytes(int(memory), int(disk)) == megabytes


def test_the_machine_is_described():
    assert machine.free_memory_bytes() > 0
    assert machine.file_system(Path("/proc")) == "proc"
    assert machine.version_of("no-such-distribution") is None


def test_a_real_run_has_at_least_five_rounds_and_a_quick_one_has_one():
    assert parse_options([], ["a"]).rounds == 5
    assert parse_options(["--quick"], ["a"]).rounds == 1
    assert parse_options(["--quick", "--rounds", "3"], ["a"]).rounds == 3


@pytest.mark.parametrize("arguments", [["--only", "b"], ["--ranks", "0"], ["--rounds", "-1"], ["--device", "tpu"]])
def test_wrong_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        parse_options(arguments, ["a"])
    assert "usage" in capsys.readouterr().err
