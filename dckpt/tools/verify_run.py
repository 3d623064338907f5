"""Which checkpoints `dckpt verify` reads, and the verdict over all of them."""

from __future__ import annotations

from dataclasses import dataclass

from dckpt.catalog.catalog import Catalog
from dckpt.errors import CheckpointNotFoundError, CorruptCheckpointError, FormatVersionError
from dckpt.findings import Finding
from dckpt.storage.base import Storage
from dckpt.tools.damage import Damage, sorted_damages
from dckpt.tools.history import check_history
from dckpt.tools.target import Target
from dckpt.tools.verify import CheckpointReport, Verdict, Watch, verify_checkpoint

_WORST_FIRST: tuple[Verdict, ...] = ("CORRUPT", "UNREADABLE", "PARTIAL", "COMPLETE")


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The checkpoints that were read, newest first, and what is wrong with the run's own records."""

    url: str
    verdict: Verdict
    checkpoints: tuple[CheckpointReport, ...]
    run_damages: tuple[Damage, ...]
    run_findings: tuple[Finding, ...]


def verify_target(
    target: Target, *, is_all: bool = False, is_quick: bool = False, watch: Watch | None = None
) -> VerifyReport:
    """The checkpoint that the target names; of a run its latest, or with `is_all` every one it has."""
    storage = target.storage
    damages, findings = check_history(storage) if target.is_run else ([], [])
    names = _choose(target, is_all=is_all)
    reports = tuple(
        verify_checkpoint(storage, name, is_run=target.is_run, is_quick=is_quick, watch=watch) for name in names
    )
    run_damages = sorted_damages(damages)
    return VerifyReport(
        url=storage.url,
        verdict=_overall(reports, run_damages),
        checkpoints=reports,
        run_damages=run_damages,
        run_findings=tuple(findings),
    )


def _choose(target: Target, *, is_all: bool) -> list[str]:
    if target.checkpoint is not None and not is_all:
        return [target.checkpoint]
    catalog = Catalog(target.storage)
    names = [checkpoint.name for checkpoint in reversed(catalog.checkpoints())]
    if not names:
        raise CheckpointNotFoundError(
            f"Run {target.storage.url}: expected a checkpoint, found none. Nothing is committed yet."
        )
    return names if is_all else [_newest(target.storage, names)]


def _newest(storage: Storage, names: list[str]) -> str:
    """The latest of the line; when a damaged record hides the line, the newest by name."""
    try:
        return Catalog(storage).resolve("latest").name
    except (CorruptCheckpointError, FormatVersionError):
        return names[0]


def _overall(reports: tuple[CheckpointReport, ...], run_damages: tuple[Damage, ...]) -> Verdict:
    verdicts: set[Verdict] = {report.verdict for report in reports}
    if run_damages:
        verdicts.add("UNREADABLE" if all(damage.is_unreadable for damage in run_damages) else "CORRUPT")
    return min(verdicts, key=_WORST_FIRST.index, default="COMPLETE")
