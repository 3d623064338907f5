"""The time in which a person may decide about critical findings, on the coordinator's terminal."""

from __future__ import annotations

import select
import sys
import time
from collections.abc import Callable
from typing import IO

from dckpt.resume.report import ResumeReport

TICK_S = 0.25


def has_person(stdin: IO[str] | None = None, stderr: IO[str] | None = None) -> bool:
    """Whether somebody can read and answer: both streams are a terminal."""
    streams = (stdin or sys.stdin, stderr or sys.stderr)
    try:
        return all(stream is not None and stream.isatty() for stream in streams)
    except ValueError:  # closed
        return False


def ask_to_go_on(
    report: ResumeReport,
    seconds: float,
    stdin: IO[str] | None = None,
    stderr: IO[str] | None = None,
    on_tick: Callable[[], None] = lambda: None,
) -> bool:
    """Counts down visibly; True if `y` was entered. Ctrl-C stops at once; without an answer it is False.

    on_tick: called several times a second, so that whoever waits knows that nobody hangs.
    """
    source, target = stdin or sys.stdin, stderr or sys.stderr
    names = ", ".join(dict.fromkeys(finding.check for finding in report.critical))
    print(f"{report.text()}\nCritical: {names}. Enter y to go on all the same; Ctrl-C stops.", file=target)
    end = time.monotonic() + seconds
    shown = -1
    while (left := end - time.monotonic()) > 0:
        if int(left) + 1 != shown:
            shown = int(left) + 1
            print(f"\rStopping in {shown} s ", end="", file=target, flush=True)
        on_tick()
        ready, _, _ = select.select([source], [], [], min(TICK_S, left))
        if ready:
            line = source.readline()
            if line.strip().lower() in ("y", "yes"):
                print("Going on.", file=target, flush=True)
                return True
            if line.strip() or not line:  # another answer, or nobody is there any more
                break
    print("\nStopped.", file=target, flush=True)
    return False
