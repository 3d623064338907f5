"""One run of the benchmarks: sizes, places and ranks are settled, scenarios run one after another, the record is written."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.lab import Lab, Scenario
from benchmarks.launch import GivenWorld, NotHereError, OwnWorlds, RankError, Worlds
from benchmarks.options import Options, parse_options
from benchmarks.record import count_lines, failed_scenario, measured_scenario, record_of, skipped_scenario
from benchmarks.registry import MODULES, scenario
from benchmarks.report import write_report
from benchmarks.setup import Setup
from benchmarks.system import remove_tree

QUICK_MEGABYTES = 4
MEMORY_PLACE = Path("/dev/shm")


def main(arguments: Sequence[str]) -> int:
    """0 if every scenario ran or was skipped for a reason, 1 if one failed; a missed target is a result, not a failure."""
    options = parse_options(arguments, list(MODULES))
    if options.lists:
        for name in MODULES:
            print(f"{name:16}{scenario(name).title}")
        return 0
    # Ended from outside, a run still removes its gigabytes and ends its ranks.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return _run_given(options) if "RANK" in os.environ else _run_own(options)


def _run_own(options: Options) -> int:
    """With ranks of our own on this machine."""
    worlds = OwnWorlds(options.ranks or _usual_ranks(options.device), options.device)
    memory = MEMORY_PLACE if MEMORY_PLACE.is_dir() and machine.file_system(MEMORY_PLACE) == "tmpfs" else None
    with _scratch(options.directory) as directory, _scratch(memory) as in_memory:
        return _run_all(options, worlds, directory, None if memory is None else in_memory)


def _run_given(options: Options) -> int:
    """As one of the ranks that torchrun started, perhaps on several nodes."""
    worlds = GivenWorld(options.device)
    try:
        is_one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
        if not is_one_node and options.directory is None:
            raise SystemExit("On several nodes: give --directory, a directory that all of them share.")
        with _scratch(options.directory) as own:
            # Every rank makes a directory, so that each removes what it made; all of them use rank 0's.
            return _run_all(options, worlds, worlds.shared(own), None)
    finally:
        worlds.close()


def _run_all(options: Options, worlds: Worlds, directory: Path, memory: Path | None) -> int:
    megabytes = options.megabytes or _fitting_megabytes(options, directory)
    # A run of dckpt must be new: under the storage's URL every run of the benchmarks has a place of its own.
    storage = None if options.storage is None else f"{options.storage.rstrip('/')}/{directory.name}"
    setup = Setup(directory, storage, megabytes, options.rounds, options.quick)
    lab = Lab(worlds, setup, memory, print if worlds.is_told else _say_nothing)
    chosen = [scenario(name) for name in (options.only or MODULES)]
    lab.told(f"{megabytes:,} MB over {lab.ranks} ranks, {options.rounds} rounds after a discarded one")
    began = time.time()
    measured = [_run_one(lab, one, memory) for one in chosen]
    record = record_of(machine.describe(directory), setup, lab.ranks, measured, began)
    if worlds.is_told:
        write_report(record, options.output, pictures=options.pictures)
        passed, missed, open_lines = count_lines(record)
        print(f"Lines: {passed} hold, {missed} missed, {open_lines} not measured. Written to {options.output}")
    return 1 if any(one["failed"] for one in measured) else 0


def _run_one(lab: Lab, one: Scenario, memory: Path | None) -> dict[str, Any]:
    lab.told(f"{one.name}: {one.title}")
    begin = time.monotonic()
    try:
        return measured_scenario(one.name, one.title, one.run(lab), time.monotonic() - begin)
    except NotHereError as reason:
        lab.told(f"  skipped: {reason}")
        return skipped_scenario(one.name, one.title, str(reason))
    except (RankError, RuntimeError, OSError) as error:
        if isinstance(lab.worlds, GivenWorld):
            raise  # the other ranks of torchrun wait for this one; it ends them
        lab.told(f"  failed: {error}")
        return failed_scenario(one.name, one.title, str(error))
    finally:
        for place in (lab.setup.directory, memory):
            if place is not None and lab.worlds.is_told:
                _empty(place)


def _usual_ranks(device: str) -> int:
    """One rank a GPU; without GPUs two, which is where everything distributed begins."""
    import torch

    return torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 2


def _fitting_megabytes(options: Options, directory: Path) -> int:
    if options.quick:
        return QUICK_MEGABYTES
    return machine.fitting_megabytes(machine.free_memory_bytes(), machine.free_disk_bytes(directory))


@contextmanager
def _scratch(parent: Path | None) -> Iterator[Path]:
    """A directory of our own in `parent` (default: the system's temporary one), removed at the end."""
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="dckpt-benchmark-", dir=parent, ignore_cleanup_errors=True) as directory:
        yield Path(directory)


def _empty(directory: Path) -> None:
    """What a scenario left is gone before the next begins."""
    for path in directory.iterdir():
        remove_tree(path)


def _say_nothing(_: str) -> None:
    """For the ranks that do not write the record."""
