"""Checks of a run's generations: the records themselves, and that each hangs on the checkpoint it names."""

from __future__ import annotations

from collections.abc import Sequence

from dckpt.catalog.catalog import Catalog
from dckpt.catalog.generations import list_generations, read_generation
from dckpt.errors import CorruptCheckpointError, FormatVersionError, StorageError, StorageMissingError
from dckpt.findings import Finding
from dckpt.format.generation import Generation, Parent
from dckpt.format.layout import CheckpointId, generation_key
from dckpt.storage.base import Storage
from dckpt.tools.damage import Damage, damage_from_error

_ReadError = (CorruptCheckpointError, FormatVersionError, StorageError)


def check_history(storage: Storage) -> tuple[list[Damage], list[Finding]]:
    """Every generation record read and checked: seal, number, run id, parents that exist, digests of their
    manifests, and a record for the generation of each checkpoint. All damages, none raised.
    """
    damages: list[Damage] = []
    try:
        numbers = list_generations(storage)
        checkpoints = Catalog(storage).checkpoints()
        pins = Catalog(storage).pins()
    except _ReadError as error:
        return [damage_from_error(error, "generations/")], []
    records = {number: record for number in numbers if (record := _read_record(storage, number, damages))}
    damages += _missing_records(numbers, checkpoints)
    damages += _foreign_records(records)
    for number, record in sorted(records.items()):
        if record.parent is not None:
            damages += _parent_damages(storage, number, record.parent, numbers)
    names = {checkpoint.name for checkpoint in checkpoints}
    return damages, [_idle_pin(pin) for pin in sorted(pins - names)]


def _read_record(storage: Storage, number: int, damages: list[Damage]) -> Generation | None:
    key = generation_key(number)
    try:
        record = read_generation(storage, number)
    except _ReadError as error:
        damages.append(damage_from_error(error, key))
        return None
    if record.number != number:
        damages.append(Damage(key, f"the file is of generation {number}, its record of {record.number}"))
        return None
    return record


def _missing_records(numbers: Sequence[int], checkpoints: Sequence[CheckpointId]) -> list[Damage]:
    missing: dict[int, list[str]] = {}
    for checkpoint in checkpoints:
        if checkpoint.generation not in numbers:
            missing.setdefault(checkpoint.generation, []).append(checkpoint.name)
    return [
        Damage(generation_key(number), f"missing, and {', '.join(names)} was written under it")
        for number, names in sorted(missing.items())
    ]


def _foreign_records(records: dict[int, Generation]) -> list[Damage]:
    """Records of another run than the newest one: two runs were copied over each other."""
    if not records:
        return []
    run_id = records[max(records)].run_id
    return [
        Damage(
            generation_key(number),
            f"expected run id {run_id} as in the newest generation, found {record.run_id}",
        )
        for number, record in sorted(records.items())
        if record.run_id != run_id
    ]


def _parent_damages(storage: Storage, number: int, parent: Parent, numbers: Sequence[int]) -> list[Damage]:
    key = generation_key(number)
    damages = []
    if parent.generation not in numbers:
        damages.append(Damage(generation_key(parent.generation), f"missing, and generation {number} descends from it"))
    try:
        _, found = Catalog(storage).read_manifest(parent.checkpoint)
    except StorageMissingError:
        return damages  # An expired parent is no damage: the chain needs its name, not its bytes.
    except _ReadError as error:
        return [*damages, damage_from_error(error, f"{parent.checkpoint}/manifest.json")]
    if found != parent.manifest_sha256:
        what = (
            f"{parent.checkpoint} is not the checkpoint that generation {number} continued from: expected "
            f"its manifest to have sha256 {parent.manifest_sha256}, found {found}"
        )
        damages.append(Damage(key, what))
    return damages


def _idle_pin(name: str) -> Finding:
    return Finding(
        check="pins",
        severity="info",
        expected="the pinned checkpoint",
        found="none",
        remedy=f"Remove pins/{name} if it is not coming back.",
        message=f"pins/{name}: no such checkpoint in this run.",
    )
