"""Checks of a checkpoint's names: files that belong to nothing, names that lead nowhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dckpt.catalog.catalog import Catalog
from dckpt.errors import CorruptCheckpointError, FormatVersionError, StorageError, StorageMissingError
from dckpt.findings import Finding
from dckpt.format.checksum import Sums
from dckpt.format.index import LayoutIndex
from dckpt.format.layout import MANIFEST_NAME
from dckpt.format.manifest import Manifest
from dckpt.storage.base import Storage
from dckpt.tools.damage import Damage, ranks_of

DIRECTORIES_MAX = 64
"""Directories looked into; a checkpoint has two, so more than this is not a checkpoint's doing."""


def find_strays(storage: Storage, name: str, manifest: Manifest) -> Iterator[str]:
    """Keys under the checkpoint that its manifest does not name, directories with a trailing slash."""
    known = {f"{name}/{MANIFEST_NAME}"}
    known.update(f"{name}/{entry.path}" for entry in manifest.files if entry.checkpoint is None)
    parents = {key.rsplit("/", depth)[0] for key in known for depth in range(1, key.count("/") + 1)}
    waiting = [name]
    for _ in range(DIRECTORIES_MAX):
        if not waiting:
            return
        directory = waiting.pop()
        for entry in storage.list_dir(directory):
            key = f"{directory}/{entry.name}"
            if not entry.is_dir:
                if key not in known:
                    yield key
            elif key in parents:
                waiting.append(key)
            else:
                yield f"{key}/"


def check_strays(storage: Storage, name: str, manifest: Manifest) -> tuple[list[Damage], list[Finding]]:
    """Strays do not hurt dckpt, which reads what the manifest names. A foreign safetensors file in the
    attempt does hurt stock readers, which take every file of that directory: that one is damage.
    """
    damages: list[Damage] = []
    findings: list[Finding] = []
    attempt = f"{name}/{manifest.attempt}/"
    try:
        for key in find_strays(storage, name, manifest):
            if key.startswith(attempt) and key.endswith(".safetensors"):
                what = "stray: the manifest does not name it, and stock safetensors readers would load it"
                damages.append(Damage(file=key, what=what))
            else:
                findings.append(_stray_finding(key))
    except StorageError as error:
        damages.append(Damage(file=f"{name}/", what=error.message, is_unreadable=True))
    return damages, findings


def _stray_finding(key: str) -> Finding:
    return Finding(
        check="stray files",
        severity="warning",
        expected="only files that the manifest names",
        found=key,
        remedy="Find out who wrote it; dckpt does not read it.",
        message=f"{key}: stray, the manifest does not name it.",
    )


def check_places(storage: Storage, name: str, manifest: Manifest) -> list[Damage]:
    """Files that lie in other checkpoints: those are there, and hold these very files themselves."""
    damages = []
    for place in manifest.references:
        files = [entry for entry in manifest.files if entry.checkpoint == place]
        ranks = tuple(sorted({entry.rank for entry in files if entry.rank is not None}))
        key = f"{place}/{MANIFEST_NAME}"
        try:
            target, _ = Catalog(storage).read_manifest(place)
        except StorageMissingError:
            what = f"missing: {len(files)} files of {name} lie in this checkpoint, which is gone"
            damages.append(Damage(file=key, what=what, ranks=ranks))
            continue
        except (CorruptCheckpointError, FormatVersionError, StorageError):
            continue  # Damage of that checkpoint. The bytes that lie there are judged by this one's own checksums.
        own = {(entry.path, entry.size, entry.digest) for entry in target.files if entry.checkpoint is None}
        damages += [
            Damage(file=entry.key_in(name), what=f"{name} refers to it, and it is no file of {place}", ranks=ranks)
            for entry in files
            if (entry.path, entry.size, entry.digest) not in own
        ]
    return damages


def check_references(manifest: Manifest, index: LayoutIndex, *, key: str) -> list[Damage]:
    """Every tensor that the manifest's values, aliases or per-rank records name must be in the index."""
    return [
        Damage(file=key, what=f"the index lacks {tensor}, which the manifest names as {role}", tensors=(tensor,))
        for tensor, role in _named_tensors(manifest, index)
        if tensor not in index and tensor not in manifest.rank_tensors
    ]


def check_fingerprints(
    manifest: Manifest, index: LayoutIndex, sums: Mapping[str, Sums | None], *, checkpoint: str
) -> list[Damage]:
    """A sums file has a fingerprint for every chunk of its shard file, or none. `sums`: by the shard's name."""
    found = []
    for shard in manifest.shard_entries:
        known = sums.get(shard.name)
        if known is None or not known.fingerprints or shard.name not in index.files:
            continue
        number = len(index.chunks_in_file(index.files.index(shard.name)))
        if len(known.fingerprints) != number:
            what = f"expected a fingerprint for each of the {number} chunks of {shard.name}, found {len(known.fingerprints)}"
            found.append(Damage(file=manifest.sums_entry(shard).key_in(checkpoint), what=what, ranks=ranks_of(shard)))
    return found


def _named_tensors(manifest: Manifest, index: LayoutIndex) -> Iterator[tuple[str, str]]:
    for alias, tensor in manifest.aliases.items():
        yield tensor, f"the tensor behind {alias}"
    for component, value in manifest.values.items():
        named = _optimizer_references(value) if component == "optim" else _tensor_references(value)
        for tensor in named:
            yield tensor, f"part of the values of {component}"
    # Only RNG is kept for every rank: other records may be of some ranks only.
    if "rng" in manifest.rank_values:
        for rank in range(manifest.world_size):
            if f"rank.{rank}.values" not in index:
                yield f"rank.{rank}.values.rng", f"the random streams of rank {rank}"
    for name in manifest.rank_tensors:
        records = [f"rank.{rank}.{name}" for rank in range(manifest.world_size)]
        if not any(record in index for record in records):
            yield records[0], f"a tensor that differs by rank ({name})"


def _optimizer_references(value: object) -> Iterator[str]:
    """Parameters whose state has one structure share a template, whose names are relative (FORMAT.md, section 10.2)."""
    records = value.get("optimizers") if isinstance(value, dict) else None
    if not isinstance(records, dict):
        yield from _tensor_references(value)
        return
    for key, record in records.items():
        prefix = f"optim.{key}" if key else "optim"
        if not isinstance(record, dict):
            continue
        yield from _tensor_references({name: item for name, item in record.items() if name != "states"})
        for template in record.get("states", []):
            relative = list(_tensor_references(template["tree"]))
            yield from (f"{prefix}.{param}.{name}" for param in template["params"] for name in relative)


def _tensor_references(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        if value.get("$t") == "tensor":
            yield str(value.get("v"))
            return
        for item in value.values():
            yield from _tensor_references(item)
    elif isinstance(value, list):
        for item in value:
            yield from _tensor_references(item)
