"""All checks, in the order in which a report lists them."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import replace

from dckpt.findings import Finding
from dckpt.resume.checks import data, environment, history, model, origin, probe, schedule, settings, streams, tensors
from dckpt.resume.checks.base import Check, Evidence, Phase

log = logging.getLogger(__name__)

ALL_CHECKS: tuple[Check, ...] = (
    *history.CHECKS,
    *origin.CHECKS,
    *settings.CHECKS,
    *data.CHECKS,
    *tensors.CHECKS,
    *schedule.CHECKS,
    *model.CHECKS,
    *streams.CHECKS,
    *environment.CHECKS,
    *probe.CHECKS,
)

EXTRA_IDS = ("buffers", "probe_gradient", "first_steps")
"""Findings that a check of another name gives, or that come later than a report."""

ALL_IDS = frozenset(check.id for check in ALL_CHECKS) | frozenset(EXTRA_IDS)


CHANGED_BY_A_LEG = frozenset({"dataset", "split", "data_order", "work_remains", "global_batch", "samples", "config"})
"""What the first moment of a new leg changes on purpose."""
CHANGED_BY_A_SCHEDULE = frozenset({"schedule", "scheduler", "schedule_continues"})
"""What a fresh schedule changes besides."""


def run_checks(
    evidence: Evidence,
    phases: Collection[Phase] = ("before", "after", "probe"),
    without: Collection[str] = (),
) -> tuple[list[Finding], int]:
    """All findings, the critical ones first, and how many checks ran without any.

    A check that fails to run is a finding itself: a resume must not depend on the shape of a fact that an older or newer
    version recorded, and must not hide it either.
    """
    found: list[Finding] = []
    passed = 0
    for check in ALL_CHECKS:
        if check.phase not in phases or check.id in without:
            continue
        try:
            own = list(check.run(evidence))
        except Exception as error:
            log.debug("check %s", check.id, exc_info=True)
            own = [
                Finding(
                    check=check.id,
                    severity="not checked",
                    expected="facts in the form of this version",
                    found=f"{type(error).__name__}: {error}"[:200],
                    remedy="report it with the checkpoint's manifest",
                    message=f"the facts could not be compared ({type(error).__name__}: {error})"[:300],
                )
            ]
        passed += not own
        found += own
    order = {"critical": 0, "warning": 1, "info": 2, "not checked": 3}
    found = [_allowed(item, evidence.allowed) for item in found]
    return sorted(found, key=lambda item: order[item.severity]), passed


def _allowed(item: Finding, allowed: frozenset[str]) -> Finding:
    if item.severity != "critical" or item.check not in allowed:
        return item
    return replace(item, severity="warning", message=f"{item.message} (Allowed by name.)")
