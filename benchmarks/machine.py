"""What this machine is, and which size fits it."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

SMALLEST_MB, LARGEST_MB = 64, 3200
MEMORY_COPIES = 10  # state, gradients, staging of three contenders, a raw buffer, files in tmpfs, and room to spare
DISK_COPIES = 12  # each contender's newest checkpoint, and room to spare


def fitting_megabytes(free_memory_bytes: int, free_disk_bytes: int) -> int:
    """The state's size, over all ranks, that lets every contender keep its copies: at least 64 MB, at most 3.2 GB."""
    fitting = min(free_memory_bytes // MEMORY_COPIES, free_disk_bytes // DISK_COPIES) // 1_000_000
    return max(SMALLEST_MB, min(LARGEST_MB, fitting))


def free_memory_bytes() -> int:
    """What can be allocated without swapping, by the kernel's own estimate; the cgroup's limit where that is lower."""
    available = _field("/proc/meminfo", "MemAvailable") or 0
    limit, used = _number("/sys/fs/cgroup/memory.max"), _number("/sys/fs/cgroup/memory.current")
    return min(available, limit - used) if limit is not None and used is not None else available


def free_disk_bytes(directory: Path) -> int:
    """What can be written into the directory's file system."""
    return shutil.disk_usage(directory).free


def cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


def file_system(path: Path) -> str:
    """The type of the file system that holds `path`, such as ext4, xfs or tmpfs."""
    best, kind = "", "unknown"
    place = str(path.resolve())
    with open("/proc/self/mounts", encoding="utf-8") as mounts:
        for line in mounts:
            _, mounted, found, *_ = line.split()
            is_above = place == mounted or place.startswith(mounted.rstrip("/") + "/")
            if is_above and len(mounted) >= len(best):
                best, kind = mounted, found
    return kind


def version_of(distribution: str) -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def describe(directory: Path) -> dict[str, Any]:
    """The facts that a figure means nothing without; no host name and no path."""
    import torch

    import dckpt

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cores": len(cores()),
        "processor": _field_text("/proc/cpuinfo", "model name") or platform.machine(),
        "memory_bytes": _field("/proc/meminfo", "MemTotal"),
        "kernel": platform.release().split("-")[0],
        "file_system": file_system(directory),
        "gpus": gpus,
        "python": platform.python_version(),
        "versions": {
            "dckpt": dckpt.__version__,
            "torch": torch.__version__,
            "safetensors": version_of("safetensors"),
            "torch_checkpointing": version_of("torch_checkpointing"),
        },
    }


def _field_text(path: str, name: str) -> str | None:
    with open(path, encoding="utf-8") as file:
        for line in file:
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    return None


def _field(path: str, name: str) -> int | None:
    """A field in kB, as bytes."""
    text = _field_text(path, name)
    return None if text is None else int(text.split()[0]) * 1024


def _number(path: str) -> int | None:
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return None  # no such control group: then nothing limits us there
    return int(text) if text.isdigit() else None
