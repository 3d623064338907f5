"""`dckpt doctor`: would this run resume cleanly with these settings? Asked before accelerators are rented, without torch."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dckpt.catalog.catalog import Catalog
from dckpt.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    DckptError,
    FormatVersionError,
    StorageMissingError,
)
from dckpt.findings import Finding
from dckpt.format.layout import CheckpointId
from dckpt.format.manifest import Manifest
from dckpt.resume.checks.base import Evidence, Phase, finding, some
from dckpt.resume.checks.registry import run_checks
from dckpt.resume.facts.code import describe_code
from dckpt.resume.validator import describe_manifest
from dckpt.storage.base import Storage
from dckpt.tools.target import Target

LIBRARIES = ("torch", "numpy")
BEFORE: tuple[Phase, ...] = ("before",)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the new run will be. None: as it was saved, or, of code and facts, not known.

    mesh: axis -> size. facts: as given to `TrainState(facts=...)`. code: a script or the directory of its work tree.
    """

    world_size: int | None = None
    mesh: Mapping[str, int] | None = None
    micro: int | None = None
    accumulation: int | None = None
    data_parallel: int | None = None
    max_steps: int | None = None
    max_epochs: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    code: Path | None = None


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The verdict on one checkpoint. `walked_past`: newer ones that cannot be read."""

    url: str
    checkpoint: str
    step: int | None
    saved_world_size: int
    world_size: int
    walked_past: tuple[str, ...]
    passed: int
    findings: tuple[Finding, ...]

    @property
    def exit_code(self) -> int:
        """0: it would resume cleanly. 1: with warnings. 2: it would be refused."""
        severities = {found.severity for found in self.findings}
        return 2 if "critical" in severities else 1 if "warning" in severities else 0


def diagnose(target: Target, settings: Settings) -> Diagnosis:
    """Reads the manifest and the sizes of files; no tensor data.

    Without a step in `target` the newest checkpoint whose manifest can be read and whose files are there in full length, as
    `resume` would take it; if no files are whole, the newest whose manifest can be read. Raises `CheckpointNotFoundError` if
    there is none, `CorruptCheckpointError` if no manifest can be read.
    """
    name, manifest, faults, damaged = _choose(target)
    storage = target.storage
    current = describe_settings(settings, manifest)
    checkpoint = {**describe_manifest(name, manifest), **_storage_facts(target, manifest)}
    checkpoint["file_faults"] = faults
    evidence = Evidence(saved=manifest.facts, current=current, checkpoint=checkpoint, load=None)
    found, passed = run_checks(evidence, phases=BEFORE)
    walked = [_unreadable(each, why, name) for each, why in damaged]
    order = {"critical": 0, "warning": 1, "info": 2, "not checked": 3}
    return Diagnosis(
        url=storage.url,
        checkpoint=name,
        step=manifest.step,
        saved_world_size=manifest.world_size,
        world_size=int(current["world"]["size"]),
        walked_past=tuple(each for each, _ in damaged),
        passed=passed + (not walked),
        findings=tuple(sorted([*walked, *found], key=lambda item: order[item.severity])),
    )


def _choose(target: Target) -> tuple[str, Manifest, list[str], list[tuple[str, str]]]:
    """The checkpoint that resume would take, its manifest, what is wrong with its files, and (name, why) of newer ones.

    One that was asked for by its step is taken as it is. If none is whole, the newest whose manifest can be read.
    """
    catalog = Catalog(target.storage)
    if target.checkpoint is not None:
        manifest = catalog.read_manifest(target.checkpoint)[0]
        return target.checkpoint, manifest, find_file_faults(target.storage, target.checkpoint, manifest), []
    damaged: list[tuple[str, str]] = []
    first_error: DckptError | None = None
    with_faults: tuple[str, Manifest, list[str], list[tuple[str, str]]] | None = None
    for item in catalog.line():
        try:
            manifest = catalog.read_manifest(item.name)[0]
        except (CorruptCheckpointError, StorageMissingError, FormatVersionError) as error:
            first_error = first_error or error
            damaged.append((item.name, str(error)))
            continue
        faults = find_file_faults(target.storage, item.name, manifest)
        if not faults:
            return item.name, manifest, [], damaged
        with_faults = with_faults or (item.name, manifest, faults, list(damaged))
        damaged.append((item.name, f"its files are not whole: {some(faults)}."))
    if with_faults is not None:
        return with_faults
    if first_error is not None:
        raise first_error
    raise CheckpointNotFoundError(
        f"Run {target.storage.url}: expected a checkpoint on the current line, found none. A run there begins at step 0."
    )


def describe_settings(settings: Settings, manifest: Manifest) -> dict[str, Any]:
    """The facts of the run that would continue, as far as the settings and the checkpoint tell them."""
    saved = manifest.facts
    size = settings.world_size or manifest.world_size
    mesh = dict(settings.mesh) if settings.mesh else None
    if mesh is None and size == manifest.world_size and manifest.mesh is not None:
        mesh = dict(zip(manifest.mesh.axes, manifest.mesh.shape, strict=True))
    current: dict[str, Any] = {
        "world": {"size": size, "mesh": mesh},
        "max_steps": settings.max_steps if settings.max_steps is not None else saved.get("max_steps"),
        "max_epochs": settings.max_epochs if settings.max_epochs is not None else saved.get("max_epochs"),
        "user": dict(settings.facts),
        "versions": _installed(),
    }
    batch = _batch(settings, saved.get("batch"), size, manifest.world_size)
    if batch is not None:
        current["batch"] = batch
    if settings.code is not None:
        current["code"] = describe_code(settings.code.resolve())
    return {name: value for name, value in current.items() if value is not None}


def _batch(settings: Settings, saved: Any, size: int, saved_size: int) -> dict[str, int] | None:
    """What was not said is as saved; data-parallel ranks grow and shrink with the ranks."""
    was = saved if isinstance(saved, dict) else {}
    parallel = settings.data_parallel
    if parallel is None and "data_parallel" in was:
        parallel = max(1, was["data_parallel"] * size // saved_size)
    found = {
        "micro": settings.micro or was.get("micro"),
        "accumulation": settings.accumulation or was.get("accumulation"),
        "data_parallel": parallel or (size if settings.micro else None),
    }
    if found["accumulation"] is None and found["micro"] is not None:
        found["accumulation"] = 1
    return (
        None
        if any(value is None for value in found.values())
        else {key: int(value or 1) for key, value in found.items()}
    )


def _installed() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # the machine that asks need not be the one that trains
    return found


def _storage_facts(target: Target, manifest: Manifest) -> dict[str, Any]:
    storage = target.storage
    found: dict[str, Any] = {}
    size = sum(entry.size for entry in manifest.files if entry.checkpoint is None)
    try:
        if target.is_run:
            line = Catalog(storage).trace()
            found["lineage"] = {"notes": list(line.notes), "siblings": _siblings(line.superseded, manifest)}
        storage.ensure_writable()
        read_only = ""
    except DckptError as error:
        read_only = str(error)
    found["space"] = {"free": storage.free_bytes(), "checkpoint_bytes": size, "read_only": read_only}
    return found


def _siblings(superseded: tuple[CheckpointId, ...], manifest: Manifest) -> list[str]:
    return [item.name for item in superseded if item.step == manifest.step and item.generation > manifest.generation]


def find_file_faults(storage: Storage, name: str, manifest: Manifest) -> list[str]:
    """Files that the manifest names and that are missing or have another size. The bytes are `dckpt verify`'s."""
    faults = []
    for entry in manifest.files:
        try:
            size: int | None = storage.size(entry.key_in(name))
        except (StorageMissingError, CorruptCheckpointError):
            size = None
        if size != entry.size:
            faults.append(f"{entry.path}: {'missing' if size is None else f'{size} bytes, not {entry.size}'}")
    return faults


def _unreadable(name: str, why: str, chosen: str) -> Finding:
    return finding(
        "walked_back",
        "warning",
        f"{name} cannot be read, and resume would walk back to {chosen}: {why}",
        expected="the newest checkpoint is whole",
        found=f"{name} is damaged",
        remedy=f"run `dckpt verify` on {name}",
    )
