"""One layout from the first save to the loads, as a JSON record: `python -m benchmarks.simulation.measure --help`."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.simulation.loading import Opening, open_on_one_rank
from benchmarks.simulation.model import LAYOUTS, Llama, state_of_rank
from benchmarks.simulation.saving import Coordinator, Save
from dckpt.storage.base import Storage
from dckpt.storage.local import LocalStorage

# What is asked for.
COORDINATOR_S, EXCHANGE_BYTES, INDEX_BYTES, FIND_S = 2.0, 1024, 50_000_000, 1.0
OPENINGS = 3


def measure(layout: str, ranks: int, rounds: int, layers: int, root: str) -> dict[str, Any]:
    """Seconds, bytes and memory of one layout; `root` is an empty directory for the run."""
    sizes = Llama.for_ranks(ranks, layers)
    with Coordinator(layout, ranks, sizes, root) as coordinator:
        before_bytes = _resident_bytes()
        first = coordinator.save()
        steady = [coordinator.save() for _ in range(rounds)]
        memory_bytes = _peak_bytes() - before_bytes
        same = _openings(coordinator.storage, coordinator.state, layout, source_rank=0)
    # In a process of its own: torch keeps meshes, and a rank never becomes another one.
    # Of the first pipeline stage: a stage's optimizer values are kept by rank, and elsewhere those of rank 0 are taken.
    rank = ranks // 48 if layout == "fsdp+pp" else ranks // 6
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        other = pool.apply(_open_elsewhere, (root, layout, ranks // 2, rank, sizes))
    record = {
        "layout": layout,
        "ranks": ranks,
        "tensors": coordinator.num_tensors,
        "bytes_of_state": coordinator.state_bytes,
        "first_save": _saves([first]),
        "steady_save": _saves(steady),
        "open_same_ranks": _opened(same),
        "open_half_the_ranks": _opened(other),
        "coordinator_memory_bytes": memory_bytes,
        "file_bytes_of_a_rank": coordinator.file_bytes,
    }
    return record | {"asked_for": _judge(record)}


def _openings(storage: Storage, state: Any, layout: str, *, source_rank: int | None) -> list[Opening]:
    others = ("model.*", "optim.*") if layout == "fsdp+pp" else ()
    return [open_on_one_rank(storage, state, source_rank=source_rank, others=others) for _ in range(OPENINGS)]


def _open_elsewhere(root: str, layout: str, ranks: int, rank: int, sizes: Llama) -> list[Opening]:
    with state_of_rank(layout, ranks, rank, sizes) as state:
        return _openings(LocalStorage(root), state, layout, source_rank=None)


def _saves(saves: Sequence[Save]) -> dict[str, Any]:
    last = saves[-1].traffic
    return {
        "cpu_s": _median(save.coordinator_cpu_s for save in saves),
        "clock_s": _median(save.coordinator_s for save in saves),
        "of_it_cpu_s": _medians(save.parts for save in saves) | {"exchanges": _median(s.exchange_cpu_s for s in saves)},
        "every_rank_cpu_s": _medians(save.own for save in saves),
        "payload_bytes": last.payload_bytes,
        "answer_bytes": last.answer_bytes,
        "exchange_bytes": sum(last.payload_bytes.values()) + sum(last.answer_bytes.values()),
        "wire_bytes_sent": _median(save.traffic.sent_bytes for save in saves),
        "wire_bytes_received": _median(save.traffic.received_bytes for save in saves),
    }


def _opened(openings: Sequence[Opening]) -> dict[str, Any]:
    last = openings[-1]
    return {
        "cpu_s": _median(sum(opening.parts.values()) for opening in openings),
        "clock_s": _median(opening.clock_s for opening in openings),
        "of_it_cpu_s": _medians(opening.parts for opening in openings),
        "first_time_cpu_s": sum(openings[0].parts.values()),
        "reads": last.num_reads,
        "files": last.num_files,
        "bytes_to_read": last.bytes_read,
        "manifest_bytes": last.manifest_bytes,
        "index_bytes": last.index_bytes,
    }


def _judge(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    steady = record["steady_save"]
    return [
        _line("coordinator, steady state, CPU s", steady["cpu_s"], COORDINATOR_S),
        _line("exchange of a rank, steady state, bytes", steady["exchange_bytes"], EXCHANGE_BYTES),
        _line("layout index, bytes", record["open_same_ranks"]["index_bytes"], INDEX_BYTES),
        _line("one rank finds its chunks, CPU s", record["open_same_ranks"]["cpu_s"], FIND_S),
        _line("one rank of half as many finds its chunks, CPU s", record["open_half_the_ranks"]["cpu_s"], FIND_S),
    ]


def _line(what: str, found: float, limit: float) -> dict[str, Any]:
    return {"what": what, "found": found, "limit": limit, "is_met": found <= limit}


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)


def _medians(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    found = list(parts)
    return {name: _median(one.get(name, 0.0) for one in found) for name in found[0]}


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def main() -> None:
    """Prints the record as one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layout", choices=LAYOUTS, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--root", required=True)
    args = parser.parse_args()
    print(json.dumps(measure(args.layout, args.ranks, args.rounds, args.layers, args.root)))


if __name__ == "__main__":
    main()
