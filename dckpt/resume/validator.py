"""From a manifest and the facts of a run to a report. Touches nothing and talks to nobody."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dckpt.findings import Finding
from dckpt.format.accumulation import GRADIENTS
from dckpt.format.manifest import Manifest
from dckpt.resume.checks.base import Evidence
from dckpt.resume.checks.registry import run_checks
from dckpt.resume.report import LoadResult, ResumeReport


def describe_manifest(name: str, manifest: Manifest) -> dict[str, Any]:
    """What checks may know of a manifest besides its facts."""
    mesh = manifest.mesh
    return {
        "name": name,
        "step": manifest.step,
        "micro_step": manifest.micro_step,
        "generation": manifest.generation,
        "world_size": manifest.world_size,
        "mesh": dict(zip(mesh.axes, mesh.shape, strict=True)) if mesh else None,
        "parts": list(manifest.parts),
        "aliases": dict(manifest.aliases),
        "rng": {stream: list(axes) for stream, axes in manifest.rng.items()},
        "writer": dict(manifest.writer),
        "origin": None if manifest.lineage is None else asdict(manifest.lineage),
    }


def describe_load(loaded: LoadResult) -> dict[str, Any]:
    """What checks may know of a load."""
    return {
        "rng": dict(loaded.rng),
        "damaged": list(loaded.damaged),
        "skipped_parts": [
            part
            for part in loaded.skipped_parts
            if part != GRADIENTS and not (loaded.begins_leg and part == "data")  # these have a check of their own
        ],
        "carried": list(loaded.carried_from_rank_0),
        "continued_micro_step": loaded.continued_micro_step,
    }


def judge(
    loaded: LoadResult,
    *,
    world_size: int,
    current: Mapping[str, Any],
    ranks: Sequence[Mapping[str, Any]],
    load: Mapping[str, Any] | None = None,
    storage: Mapping[str, Any] | None = None,
    allowed: frozenset[str] = frozenset(),
    without: frozenset[str] = frozenset(),
) -> ResumeReport:
    """The report on continuing from `loaded`. current: facts of the live run; ranks: what each rank found.

    load: more facts about the load than `describe_load` has. storage: `lineage` and `space`, if they were looked at.
    allowed: checks whose critical findings become warnings. without: checks that are left out.
    """
    saved = loaded.manifest.facts
    evidence = Evidence(
        saved=saved,
        current=current,
        checkpoint={**describe_manifest(loaded.checkpoint, loaded.manifest), **(storage or {})},
        load={**describe_load(loaded), **(load or {})},
        built=None if loaded.built is None else loaded.built.facts,
        ranks=ranks,
        allowed=allowed,
    )
    findings, passed = run_checks(evidence, without=without)
    return ResumeReport(loaded, world_size, tuple(findings), passed)


def findings_from_json(records: Sequence[Mapping[str, Any]]) -> tuple[Finding, ...]:
    """The findings that another rank sent."""
    return tuple(Finding(**record) for record in records)
