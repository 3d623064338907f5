"""The sentences that every survivor of a failure reads, and the text form in which errors cross ranks. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dckpt.errors import (
    ConfigError,
    CoordinationTimeoutError,
    DckptError,
    IncompatibleStateError,
    PeerFailedError,
    from_wire,
    to_wire,
)

TEXT_CHARS_MAX = 16 * 1024  # of one error's message; a longer one is cut
_CALLERS_TO_FIX = (ConfigError, IncompatibleStateError)
FAILURES_TOLD = 4  # distinct failures that one message spells out; further ranks are named without their text


def format_ranks(ranks: Sequence[int]) -> str:
    """`[1, 2, 3, 7]` as "ranks 1-3 and 7", `[5]` as "rank 5"."""
    ordered = sorted(set(ranks))
    runs: list[list[int]] = []
    for rank in ordered:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts: list[str] = []
    for run in runs:
        # Two neighbours read better as two numbers than as a range.
        parts.extend([f"{run[0]}-{run[-1]}"] if len(run) > 2 else [str(rank) for rank in run])
    listed = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    return f"{'rank' if len(ordered) == 1 else 'ranks'} {listed}"


def cause_to_show(error: DckptError, cause: BaseException | None) -> BaseException | None:
    """`cause`, for `raise error from`; None where it says the same: a refusal reads the same on the rank that noticed it."""
    is_same = isinstance(cause, _CALLERS_TO_FIX) and type(cause) is type(error) and str(cause) == str(error)
    return None if is_same else cause


def sentence(error: BaseException) -> str:
    """`error` in one bounded line, whatever its text does: odd characters and failing `__str__` included."""
    try:
        text = str(to_wire(error)["message"])
    except Exception:  # noqa: BLE001 - a broken __str__ must not hide that the rank failed
        text = f"{type(error).__name__} (its text cannot be read)"
    line = " ".join(text.split())
    return line if len(line) <= TEXT_CHARS_MAX else line[:TEXT_CHARS_MAX] + " ..."


def error_to_text(error: DckptError) -> str:
    """`error` as ASCII JSON; fields that JSON cannot hold are kept as their repr."""
    record = {"type": type(error).__name__, "message": sentence(error), "fields": error.fields()}
    try:
        return json.dumps(record, default=repr)
    except (TypeError, ValueError, RecursionError):
        return json.dumps({**record, "fields": {}})


def error_from_text(text: str) -> DckptError:
    """The error that `error_to_text` wrote: same type, same message."""
    return from_wire(json.loads(text))


def failure_to_bytes(error: BaseException) -> bytes:
    """What a rank posts in place of its payload when it failed."""
    return json.dumps({"cause": type(error).__name__, "message": sentence(error)}).encode("ascii")


def failure_from_bytes(data: bytes) -> tuple[str, str]:
    """The cause's type name and its message."""
    record: dict[str, Any] = json.loads(data)
    return str(record["cause"]), str(record["message"])


def peers_failed(what: str, phase: str, failures: Mapping[int, tuple[str, str]], consequence: str) -> PeerFailedError:
    """One error for all ranks that failed in `phase`, by rank: (cause, message). Equal texts are told once."""
    by_failure: dict[tuple[str, str], list[int]] = {}
    for rank in sorted(failures):
        by_failure.setdefault(failures[rank], []).append(rank)
    groups = list(by_failure.items())
    told = [
        f"{format_ranks(ranks)} failed in phase {phase}: {message.rstrip('.')}"
        for (_, message), ranks in groups[:FAILURES_TOLD]
    ]
    untold = [rank for _, ranks in groups[FAILURES_TOLD:] for rank in ranks]
    if untold:
        told.append(f"{format_ranks(untold)} failed too")
    first = min(failures)
    return PeerFailedError(
        f"{what}: {'; '.join(told)}. {consequence}", rank=first, phase=phase, cause=failures[first][0]
    )


def ranks_late(
    what: str,
    phase: str,
    *,
    absent: Sequence[int],
    stalled: Sequence[int],
    call: str,
    deadline_s: float,
    consequence: str,
) -> CoordinationTimeoutError:
    """The error for ranks that never called (`absent`) and ranks that came but stand still (`stalled`)."""
    told = []
    if absent:
        told.append(f"{format_ranks(absent)} did not call {call} within {deadline_s:g} s; every rank must call it")
    if stalled:
        told.append(f"{format_ranks(stalled)} made no progress in phase {phase} for {deadline_s:g} s")
    return CoordinationTimeoutError(
        f"{what}: {'; '.join(told)}. {consequence}", ranks=sorted({*absent, *stalled}), phase=phase
    )


def total_exceeded(
    what: str, phase: str, ranks: Sequence[int], total_s: float, consequence: str
) -> CoordinationTimeoutError:
    """The error for a session that outlived its optional total."""
    return CoordinationTimeoutError(
        f"{what}: {format_ranks(ranks)} did not finish phase {phase}, {total_s:g} s after the start, "
        f"which is the limit. {consequence}",
        ranks=sorted(ranks),
        phase=phase,
    )


def coordinator_lost(what: str, phase: str, consequence: str) -> PeerFailedError:
    """The error when the connection to rank 0 is gone."""
    return PeerFailedError(
        f"{what}: the coordinator (rank 0) cannot be reached in phase {phase}. {consequence}",
        rank=0,
        phase=phase,
        cause="ConnectionLost",
    )


def coordinator_silent(what: str, phase: str, deadline_s: float, consequence: str) -> CoordinationTimeoutError:
    """The error when the connection to rank 0 stands but nothing is answered."""
    return CoordinationTimeoutError(
        f"{what}: the coordinator (rank 0) gave no sign in phase {phase} for {deadline_s:g} s. {consequence}",
        ranks=[0],
        phase=phase,
    )
