"""What measures, measures right: raw files, the kernel's counters, pinned threads, reports of other programs."""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path

import pytest

from benchmarks import fio, system
from benchmarks.raw import ALIGNMENT, BLOCK_BYTES, RawFile, takes_direct
from benchmarks.scenarios.simulation import as_series
from benchmarks.training import on_core

MIB = 1 << 20


@pytest.mark.parametrize("size", [1, ALIGNMENT, BLOCK_BYTES + 1, 3 * BLOCK_BYTES])
@pytest.mark.parametrize("is_direct", [True, False])
def test_a_raw_file_comes_back_as_it_was_written(tmp_path, size, is_direct):
    if is_direct and not takes_direct(tmp_path):
        pytest.skip("this file system takes no O_DIRECT")
    with RawFile(tmp_path / "raw", size, is_direct=is_direct) as raw:
        raw.write()
        written = (tmp_path / "raw").read_bytes()
        assert len(written) == raw.size and size <= raw.size < size + ALIGNMENT
        assert len({written[offset : offset + 8] for offset in range(0, len(written), 4096)}) > len(written) // 8192

        with open(tmp_path / "raw", "r+b") as file:
            file.write(b"another beginning")
        raw.read(is_direct=is_direct)
        raw.write()
    assert (tmp_path / "raw").read_bytes()[:17] == b"another beginning"


def test_a_file_system_without_direct_io_is_told():
    assert not takes_direct(Path("/proc"))


def test_forgotten_files_are_read_from_the_device_again(tmp_path):
    if not takes_direct(tmp_path):
        pytest.skip("this file system has no device below it")
    path = tmp_path / "file"
    path.write_bytes(os.urandom(4 * MIB))

    class Alone:
        local_rank = 0

        def barrier(self) -> None:
            pass

    warm = system.counted(path.read_bytes)
    system.forget(Alone(), tmp_path)
    cold = system.counted(path.read_bytes)
    system.forget(Alone(), tmp_path)
    system.remember(Alone(), tmp_path)
    again = system.counted(path.read_bytes)

    assert again.device_bytes < MIB
    assert warm.read_bytes >= 4 * MIB and cold.read_bytes >= 4 * MIB
    assert warm.device_bytes < MIB
    assert cold.device_bytes >= 4 * MIB or system_is_in_memory(tmp_path)


def system_is_in_memory(path: Path) -> bool:
    from benchmarks.machine import file_system

    return file_system(path) in ("tmpfs", "overlay")


def test_a_peak_that_is_over_before_anyone_looks_is_seen():
    system.reset_peak()
    before = system.resident_bytes()
    with mmap.mmap(-1, 64 * MIB) as memory:
        memory.write(b"\1" * (64 * MIB))

    assert system.peak_bytes() - before >= 64 * MIB
    assert system.resident_bytes() - before < 32 * MIB


def test_one_thread_is_pinned_and_the_others_are_free():
    everywhere = os.sched_getaffinity(0)
    if len(everywhere) < 2:
        pytest.skip("needs two cores")
    wake, seen = threading.Event(), []
    other = threading.Thread(target=lambda: (wake.wait(10), seen.append(os.sched_getaffinity(0))))
    core = min(everywhere)
    os.sched_setaffinity(0, {core})
    other.start()  # born with one core
    os.sched_setaffinity(0, everywhere)

    with on_core(core):
        assert os.sched_getaffinity(0) == {core}
        wake.set()
        other.join()

    assert seen == [everywhere]
    assert os.sched_getaffinity(0) == everywhere


def test_fio_gives_seconds_and_leaves_what_it_reads(tmp_path):
    if fio.version() is None:
        pytest.skip("fio is not installed")

    assert fio.seconds(tmp_path, 2, 5 * MIB + 1, "write") > 0
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert sizes == [5 * MIB + ALIGNMENT] * 2
    assert fio.seconds(tmp_path, 2, 5 * MIB + 1, "read") > 0


def test_a_simulation_becomes_judged_lines():
    layout = {
        "layout": "fsdp",
        "asked_for": [
            {"what": "steady save, s", "found": 1.5, "limit": 2.0, "is_met": True},
            {"what": "bytes a rank", "found": 2000, "limit": 1024, "is_met": False},
        ],
    }

    series = as_series({"ranks": 4096, "rounds": 5, "layers": 126}, layout)

    assert [(line["text"], line["value"], line["passed"]) for line in series["lines"]] == [
        ("steady save, s", 1.5, True),
        ("bytes a rank", 2000.0, False),
    ]
