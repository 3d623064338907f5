"""What the validation of a resume takes beyond reading, for one rank of a job.

    python -m benchmarks.validation --parameters 250 --dtype float32

A model of matrices with AdamW's moments, of one dtype, is saved and loaded on one rank; the load is validated `rounds` times.
Seconds are of the clock, medians; they grow with the bytes that a rank holds, so they are also told for a billion parameters.
Needs memory for three tensors of each parameter and as much disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dckpt

SIDE = 2048
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def run(
    parameters: int = 250_000_000,
    dtype: str = "float32",
    *,
    side: int = SIDE,
    rounds: int = 5,
    directory: str | None = None,
) -> dict[str, Any]:
    """One record. parameters: about how many, in matrices of `side` x `side`. directory: where the run is written and removed."""
    state, count = _trained(max(1, round(parameters / side**2)), DTYPES[dtype], side)
    with (
        tempfile.TemporaryDirectory(prefix="dckpt-validation-", dir=directory) as root,
        dckpt.Checkpointer(Path(root) / "run", signals=()) as checkpointer,
    ):
        checkpointer.resume(state)
        checkpointer.save(state, blocking=True)
        began = time.monotonic()
        loaded = checkpointer.load(state)
        load_s = time.monotonic() - began
        reports = [checkpointer.validate(state, loaded) for _ in range(rounds)]
    seconds = statistics.median(report.seconds for report in reports)
    return {
        "program": "validation",
        "parameters": count,
        "tensors": 3 * count // side**2,
        "dtype": dtype,
        "bytes": 3 * count * DTYPES[dtype].itemsize,
        "rounds": rounds,
        "machine": {
            "cores": os.cpu_count(),
            "platform": f"{platform.system()} {platform.release().split('-')[0]}",
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "load_s": load_s,
        "validation_s": seconds,
        "validation_s_a_billion": seconds * 1e9 / count,
        "checks_passed": reports[-1].passed,
        "findings": [finding.check for finding in (*reports[-1].warnings, *reports[-1].critical)],
    }


def _trained(matrices: int, dtype: torch.dtype, side: int) -> tuple[dckpt.TrainState, int]:
    """A state as after some steps: moments that belong to the same gradients."""
    model = nn.ModuleList(nn.Linear(side, side, bias=False, dtype=dtype) for _ in range(matrices))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), foreach=False)
    progress = dckpt.TrainProgress(max_steps=1000, batch=dckpt.Batch(micro=8))
    for parameter in model.parameters():
        parameter.grad = parameter.detach() * 0.1
    optimizer.step()
    optimizer.zero_grad()
    progress.advance(loss=1.0)
    return dckpt.TrainState(model=model, optimizer=optimizer, progress=progress), matrices * side**2


def table(record: dict[str, Any]) -> str:
    """The record as text."""
    rows = (
        (
            "parameters",
            f"{record['parameters'] / 1e6:,.0f} M in {record['dtype']}, {record['bytes'] / 1e9:.2f} GB with moments",
        ),
        ("load", f"{record['load_s']:.2f} s"),
        ("validation", f"{record['validation_s']:.2f} s, {record['bytes'] / record['validation_s'] / 1e9:.1f} GB/s"),
        ("for a billion parameters", f"{record['validation_s_a_billion']:.2f} s"),
        ("checks", f"{record['checks_passed']} passed, findings: {', '.join(record['findings']) or 'none'}"),
    )
    return "\n".join(f"{name:<26}{text}" for name, text in rows)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.validation", description=__doc__.split("\n")[0])
    parser.add_argument("--parameters", type=int, default=250, help="millions of parameters")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", help="where the run is written and removed again")
    parser.add_argument("--json", action="store_true", help="print the record as JSON")
    options = parser.parse_args()
    record = run(options.parameters * 10**6, options.dtype, rounds=options.rounds, directory=options.directory)
    print(json.dumps(record, indent=1) if options.json else table(record))


if __name__ == "__main__":
    main()
