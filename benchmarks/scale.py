"""What saves and loads of a 405B-parameter Llama cost its coordinator, and one rank, on thousands of simulated ranks.

    python -m benchmarks.scale --ranks 4096

The coordinator is real: its `TrainState` (FSDP2, tensor parallelism and AdamW by torch itself, over a fake process group),
saver, store, directory, commit and retention. The other ranks say through real sessions what they would say, and their files
have the right sizes and no contents. Layouts: FSDP2 over all ranks; HSDP with 8 replicas; FSDP2 over tensor parallelism of 8;
8 pipeline stages of FSDP2. Below 4,096 ranks the model has as many tensors, each narrower. Needs about 2 GB of memory and
5 GB of disk; saves are blocking. What every rank
does for itself (capture, writing) is told apart. Judged are processor seconds, with those of the clock beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LAYOUTS = ("fsdp", "hsdp", "fsdp+tp", "fsdp+pp")
LAYERS = 126
LAYOUT_S_MAX = 1800.0


def run(
    ranks: int = 4096,
    rounds: int = 5,
    layouts: Sequence[str] = LAYOUTS,
    layers: int = LAYERS,
    directory: str | None = None,
) -> dict[str, Any]:
    """One record over all layouts, each measured in a process of its own so that memory is its own.

    ranks: a multiple of 16. directory: where the runs are written and removed again; None is the system's temporary one.
    """
    if ranks % 16:
        raise ValueError(f"ranks={ranks}: expected a multiple of 16")
    return {
        "program": "scale",
        "ranks": ranks,
        "rounds": rounds,
        "layers": layers,
        "machine": {
            "cores": os.cpu_count(),
            "platform": f"{platform.system()} {platform.release().split('-')[0]}",
            "python": platform.python_version(),
        },
        "layouts": [_measure(layout, ranks, rounds, layers, directory) for layout in layouts],
    }


def _measure(layout: str, ranks: int, rounds: int, layers: int, directory: str | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="dckpt-scale-", dir=directory) as root:
        command = [sys.executable, "-m", "benchmarks.simulation.measure", "--layout", layout, "--root", root]
        command += ["--ranks", str(ranks), "--rounds", str(rounds), "--layers", str(layers)]
        done = subprocess.run(
            command,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            timeout=LAYOUT_S_MAX,
            cwd=Path(__file__).resolve().parent.parent,
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(record: dict[str, Any]) -> str:
    """The record as text: what was asked for by layout, then where the time goes."""
    layouts = record["layouts"]
    lines = [
        f"{record['ranks']:,} ranks, {layouts[0]['tensors']:,} tensors on rank 0, medians of {record['rounds']} saves"
    ]
    head = "".join(f"{found['layout']:>14}" for found in layouts)
    lines.append(f"{'':52}{head}")
    for number, asked in enumerate(layouts[0]["asked_for"]):
        found = [layout["asked_for"][number] for layout in layouts]
        verdict = "" if all(one["is_met"] for one in found) else "  MISSED"
        lines.append(
            f"{asked['what']:52}{_cells(one['found'] for one in found)}  (at most {asked['limit']:,}){verdict}"
        )
    for part, title in (
        ("steady_save", "steady save, coordinator"),
        ("first_save", "first save, coordinator"),
        ("open_same_ranks", "opening on as many ranks"),
        ("open_half_the_ranks", "opening on half the ranks"),
    ):
        lines.append(f"{title + ', by the clock, s':52}{_cells(layout[part]['clock_s'] for layout in layouts)}")
        lines.append(f"{title + ', CPU s':52}{_cells(layout[part]['cpu_s'] for layout in layouts)}")
        names = dict.fromkeys(name for layout in layouts for name in layout[part]["of_it_cpu_s"])
        lines += [
            f"    {name:48}{_cells(layout[part]['of_it_cpu_s'].get(name, 0.0) for layout in layouts)}" for name in names
        ]
    lines += [
        f"{title + ' save, ' + key.replace('_', ' '):52}{_cells(layout[part][key] for layout in layouts)}"
        for part, title in (("first_save", "first"), ("steady_save", "steady"))
        for key in ("exchange_bytes", "wire_bytes_sent", "wire_bytes_received")
    ]
    lines.append(f"{'manifest, bytes':52}{_cells(layout['open_same_ranks']['manifest_bytes'] for layout in layouts)}")
    memory = _cells(layout["coordinator_memory_bytes"] for layout in layouts)
    lines.append(f"{'memory that saves take on the coordinator, bytes':52}{memory}")
    return "\n".join(lines)


def _cells(values: Any) -> str:
    return "".join(
        f"{value:14,.3f}" if isinstance(value, float) and value < 1e4 else f"{value:14,.0f}" for value in values
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, writes one JSON record, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4096, help="a multiple of 16")
    parser.add_argument("--rounds", type=int, default=5, help="saves after the first one")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--directory", help="where to write; some gigabytes")
    parser.add_argument("--output", default="benchmarks/results/scale.json")
    args = parser.parse_args(arguments)
    record = run(args.ranks, args.rounds, args.layouts, args.layers, args.directory)
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(record))


if __name__ == "__main__":
    main()
