"""What becomes of a resume report: it is logged, kept beside the run, and critical findings stop every rank."""

from __future__ import annotations

import itertools
import logging
import time
from typing import Any

from dckpt.engine.abort_window import ask_to_go_on, has_person
from dckpt.errors import DckptError, ResumeRejectedError
from dckpt.findings import page_of
from dckpt.format.layout import checkpoint_name
from dckpt.format.values import dump_json
from dckpt.ranks.coordination import Coordination
from dckpt.ranks.topology import Topology
from dckpt.resume.report import ResumeReport
from dckpt.storage.base import Storage

log = logging.getLogger(__name__)

REPORTS_DIR = "reports"


def log_report(report: ResumeReport) -> None:
    """On the coordinator: the whole report in one message, as loud as its worst finding."""
    level = logging.ERROR if report.critical else logging.WARNING if report.warnings else logging.INFO
    log.log(level, "%s", report.text())


def keep_report(storage: Storage, report: ResumeReport) -> str | None:
    """Writes the report beside the run as JSON and returns its key. A run that cannot be written is told, and no error."""
    loaded = report.loaded
    name = loaded.checkpoint
    if loaded.step is not None:
        name = checkpoint_name(loaded.step, loaded.generation, loaded.micro_step)
    key = f"{REPORTS_DIR}/{name}-{time.time_ns() // 1_000_000}.json"
    try:
        storage.create(key, dump_json(report.to_json()))
    except DckptError as error:
        log.warning("the resume report was not kept: %s", error)
        return None
    return key


def decide(
    report: ResumeReport, coordination: Coordination, topology: Topology, *, countdown_s: float, number: int
) -> tuple[str, ...]:
    """Returns the critical checks that a person let pass, () without any. Raises `ResumeRejectedError` on every rank else."""
    if not report.critical:
        return ()
    names = tuple(dict.fromkeys(finding.check for finding in report.critical))
    session = coordination.session(f"decide-{number}", what="decision about critical findings", call="resume(state)")

    def ask(_: list[bytes]) -> bytes:
        ticks = itertools.count(1)
        goes_on = has_person() and ask_to_go_on(report, countdown_s, on_tick=lambda: session.beat(next(ticks)))
        return b"1" if goes_on else b"0"

    try:
        answer = session.exchange("decide", b"", ask)
    finally:
        session.close()
    if answer == b"1":
        if topology.is_coordinator:
            log.warning("going on in spite of: %s", ", ".join(names))
        return names
    first = report.critical[0]
    more = f" And {len(report.critical) - 1} more." if len(report.critical) > 1 else ""
    raise ResumeRejectedError(
        f"Resume from {report.loaded.checkpoint}: {len(report.critical)} critical "
        f"finding{'s' * (len(report.critical) > 1)}; training does not start. "
        f"[{first.check}] {first.message}{more} `{page_of(first.check)}` says more. To go on all the same: "
        f"ResumePolicy(allow={names!r}).",
        report=report.to_json(),
    )


def resume_facts(report: ResumeReport, allowed: frozenset[str], let_pass: tuple[str, ...]) -> dict[str, Any]:
    """What later manifests say of the resume that they descend from."""
    loaded = report.loaded
    return {
        # Not "checkpoint": under that key a manifest names the checkpoints whose files it needs.
        "resumed_from": loaded.checkpoint,
        "saved_world_size": loaded.manifest.world_size,
        "world_size": report.world_size,
        "rng": dict(loaded.rng),
        "warnings": sorted({finding.check for finding in report.warnings}),
        "allowed": sorted((allowed & {finding.check for finding in report.findings}) | set(let_pass)),
    }
