"""What was done to the checkpoint since training wrote it: a repair or an import says so in its manifest."""

from __future__ import annotations

from collections.abc import Iterator

from dckpt.findings import Finding
from dckpt.resume.checks.base import Check, Evidence, finding

DONE = {"repair": "repaired", "import": "imported"}
SHOWN = 5
LOST = ": lost: "
"""Between what was given up and how, in a sentence of `changes`."""


def check_origin(evidence: Evidence) -> Iterator[Finding]:
    """Nothing was given up when this checkpoint was made from another one."""
    origin = evidence.checkpoint.get("origin") or {}
    done = DONE.get(str(origin.get("how")))
    changes = [str(change) for change in origin.get("changes") or ()]
    if done is None or not changes:
        return
    lost = [change for change in changes if LOST in change]
    rest = [change for change in changes if LOST not in change]
    source = origin.get("checkpoint")
    if lost:
        yield finding(
            "origin",
            "warning",
            f"this checkpoint was {done} from {source} and lacks what was lost there: {'; '.join(lost[:SHOWN])}",
            expected="all of the state that was saved",
            found=f"{len(lost)} parts given up",
            remedy="watch the loss over the first steps, or continue from an older checkpoint",
        )
    if rest:
        yield finding(
            "origin",
            "info",
            f"this checkpoint was {done} from {source}: {'; '.join(rest[:SHOWN])}",
            expected="the state as training saved it",
            found=f"{len(rest)} parts restored, derived or filled in",
            remedy="`dckpt show` lists all of it",
        )


CHECKS = (Check("origin", "What was done to the checkpoint", "before", check_origin),)
