"""What the kernel saw of a run equals what `Posix` recorded: nothing writes past the one place for it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, sys
from pathlib import Path
from tests.support.commits import life_of_a_run
posix = life_of_a_run(Path(sys.argv[1]))
Path(sys.argv[2]).write_text(json.dumps(posix.calls))
"""

TRACED = (
    *("openat", "?open", "?creat", "mkdirat", "?mkdir", "pwrite64", "write", "writev", "pwritev", "pwritev2"),
    *("ftruncate", "truncate", "fallocate", "copy_file_range", "sendfile", "fsync", "fdatasync"),
    *("sync_file_range", "?rename", "renameat", "renameat2", "?link", "linkat", "?unlink", "unlinkat"),
    *("?rmdir", "symlinkat", "?symlink", "mmap", "io_uring_setup", "io_uring_enter"),
)

KINDS = {
    "openat": "create",
    "mkdir": "mkdir",
    "mkdirat": "mkdir",
    "pwrite64": "write",
    "ftruncate": "truncate",
    "fsync": "fsync",
    "rename": "rename",
    "renameat": "rename",
    "renameat2": "rename",
    "link": "link",
    "linkat": "link",
    "unlink": "unlink",
    "unlinkat": "unlink",
    "rmdir": "rmdir",
}

_LINE = re.compile(r"^\d+\s+(?P<call>\w+)\((?P<arguments>.*)\)\s+= (?P<result>\S+)")


def why_not_strace() -> str | None:
    if shutil.which("strace") is None:
        return "strace is not installed; the recorded histories run all the same"
    probe = subprocess.run(["strace", "-qq", "-e", "trace=none", "true"], capture_output=True, timeout=30, check=False)
    return None if probe.returncode == 0 else f"ptrace is refused: {probe.stderr.decode().strip()[-200:]}"


def parse_trace(text: str, base: str) -> list[tuple[str, str]]:
    """Calls below `base` that may change something, as (kind, path); an unexpected one keeps its own name."""
    found = []
    for line in text.splitlines():
        if base not in line or (match := _LINE.match(line)) is None:
            assert base not in line or "resumed" not in line, f"an interrupted call cannot be compared: {line}"
            continue
        call, arguments = match["call"], match["arguments"]
        if call in ("open", "openat") and "O_CREAT" not in arguments and "O_TRUNC" not in arguments:
            continue
        if call == "mmap" and not ("PROT_WRITE" in arguments and "MAP_SHARED" in arguments):
            continue
        places = re.findall(rf'[<"]{re.escape(base)}(?:/([^>"]*))?[>"]', arguments)
        kind = KINDS.get(call, call)
        if call == "unlinkat" and "AT_REMOVEDIR" in arguments:
            kind = "rmdir"
        # A rename is recorded by its old name, a link by its new one, both as in `Posix`.
        found.append((kind, places[-1] if kind == "link" else places[0]))
    return found


def test_the_system_calls_of_a_run_are_the_recorded_ones(tmp_path: Path):
    if (reason := why_not_strace()) is not None:
        pytest.skip(reason)
    base, trace, calls = tmp_path / "base", tmp_path / "trace", tmp_path / "calls.json"
    command = ["strace", "-f", "-y", "-qq", "-s", "0", "-o", str(trace), "-e", f"trace={','.join(TRACED)}"]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}

    done = subprocess.run(
        [*command, sys.executable, "-c", PROGRAM, str(base), str(calls)],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    recorded = [(kind, path) for kind, path in json.loads(calls.read_text()) if path != ""]
    seen = [item for item in parse_trace(trace.read_text(), str(base)) if item[1] != ""]

    assert {kind for kind, _ in recorded} == {"create", "write", "fsync", "mkdir", "rename", "link", "unlink", "rmdir"}
    assert seen == recorded
