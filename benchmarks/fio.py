"""The device's limit by fio: the same number of jobs, bytes and block size as our own raw writer."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, Literal

from benchmarks.raw import ALIGNMENT, BLOCK_BYTES, IN_FLIGHT
from benchmarks.world import World

DEADLINE_S = 900


def version() -> str | None:
    """Such as "fio-3.33"; None where it is not installed."""
    if shutil.which("fio") is None:
        return None
    return subprocess.run(["fio", "--version"], capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def why_not(world: World) -> str | None:
    """Why fio cannot give the limit of these ranks; None if it can."""
    if world.local_size < world.size:
        return "fio runs on one node, and the ranks are on several"
    return "fio is not installed" if version() is None else None


def seconds(directory: Path, jobs: int, job_bytes: int, kind: Literal["write", "read"]) -> float:
    """Runs fio once and returns the seconds of its slowest job, the fsync at the end of a write included.

    `write` leaves new files in the directory, `read` reads those that `write` left.
    """
    size = -(-job_bytes // ALIGNMENT) * ALIGNMENT
    command = [
        "fio", "--name=limit", f"--directory={directory}", f"--rw={kind}", f"--numjobs={jobs}", f"--size={size}",
        f"--bs={min(BLOCK_BYTES, size)}", f"--iodepth={IN_FLIGHT}", "--ioengine=libaio", "--direct=1", "--fallocate=none",
        "--group_reporting", "--thread", "--output-format=json",
    ]  # fmt: skip
    if kind == "write":
        for old in directory.glob("limit.*"):
            old.unlink()
        command.append("--end_fsync=1")
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    if ended.returncode:
        raise RuntimeError(f"fio ended with {ended.returncode}: {ended.stderr.strip() or ended.stdout.strip()}")
    return _seconds(json.loads(ended.stdout), kind)


def _seconds(report: dict[str, Any], kind: str) -> float:
    """From the group's totals: bytes over bandwidth, which is finer than the runtime in whole milliseconds."""
    group = report["jobs"][0][kind]
    return float(group["io_bytes"]) / float(group["bw_bytes"])
