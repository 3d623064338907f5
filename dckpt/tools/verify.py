"""`dckpt verify`: read every byte of a checkpoint and say what it is good for. Reads only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from dckpt.blocks.read import VerifiedFile, read_checked
from dckpt.blocks.scan import FileScan, ScanItem, scan_files
from dckpt.errors import CorruptCheckpointError, FormatVersionError, StorageError
from dckpt.findings import Finding
from dckpt.format.checksum import Sums, parse_sums
from dckpt.format.index import LayoutIndex, parse_index
from dckpt.format.layout import MANIFEST_NAME
from dckpt.format.manifest import MANIFEST_BYTES_MAX, FileEntry, Manifest, parse_manifest
from dckpt.format.shard_file import ShardHeader, header_bytes_needed, parse_shard_header
from dckpt.storage.base import Storage
from dckpt.tools.components import Component, is_training_state, list_components, missing_components
from dckpt.tools.damage import (
    NO_EXTENTS,
    Damage,
    Extents,
    compare_header,
    damage_from_error,
    extents_from_header,
    extents_from_index,
    merge_ranges,
    ranks_of,
    sorted_damages,
)
from dckpt.tools.references import check_fingerprints, check_places, check_references, check_strays

Verdict = Literal["COMPLETE", "PARTIAL", "CORRUPT", "UNREADABLE"]

_ReadError = (CorruptCheckpointError, FormatVersionError, StorageError)


@dataclass(frozen=True, slots=True)
class CheckpointReport:
    """What one checkpoint's bytes gave."""

    checkpoint: str
    verdict: Verdict
    components: tuple[Component, ...]
    damages: tuple[Damage, ...]
    findings: tuple[Finding, ...]
    num_files: int
    bytes_total: int
    bytes_read: int
    is_quick: bool
    duration_s: float


@dataclass(frozen=True, slots=True)
class Watch:
    """How a caller follows the reading: a checkpoint with its bytes begins; so many bytes more were read."""

    on_checkpoint: Callable[[str, int], None] | None = None
    on_bytes: Callable[[int], None] | None = None


def verify_checkpoint(
    storage: Storage, name: str, *, is_run: bool, is_quick: bool = False, watch: Watch | None = None
) -> CheckpointReport:
    """Every file of the checkpoint against the manifest, its checksums and the index; all damages listed.

    With `is_quick` no tensor data is read: the shard files' sizes and headers, every byte of all other files.
    """
    started = time.monotonic()
    check = _Check(storage, name, is_run=is_run, is_quick=is_quick, watch=watch or Watch())
    check.run()
    damages = sorted_damages(check.damages)
    components = () if check.manifest is None else check.list_components()
    findings = [*check.findings, *_missing_findings(check.manifest, components)]
    return CheckpointReport(
        checkpoint=name,
        verdict=_verdict(damages, findings),
        components=components,
        damages=damages,
        findings=tuple(findings),
        num_files=0 if check.manifest is None else len(check.manifest.files) + 1,
        bytes_total=0 if check.manifest is None else check.manifest.total_bytes,
        bytes_read=check.bytes_read,
        is_quick=is_quick,
        duration_s=time.monotonic() - started,
    )


class _Check:
    """One pass over one checkpoint; collects, never stops at a damage."""

    def __init__(self, storage: Storage, name: str, *, is_run: bool, is_quick: bool, watch: Watch) -> None:
        self.storage = storage
        self.name = name
        self.is_run = is_run
        self.is_quick = is_quick
        self.watch = watch
        self.manifest: Manifest | None = None
        self.index: LayoutIndex | None = None
        self.damages: list[Damage] = []
        self.findings: list[Finding] = []
        self.bytes_read = 0

    def run(self) -> None:
        self.manifest = self._read_manifest()
        if self.manifest is None:
            return
        if self.watch.on_checkpoint is not None:
            self.watch.on_checkpoint(self.name, sum(entry.size for entry in self.manifest.shard_entries))
        damages, findings = check_strays(self.storage, self.name, self.manifest)
        self.damages += damages
        self.findings += findings
        self.damages += check_places(self.storage, self.name, self.manifest)
        self.index = self._read_index(self.manifest)
        if self.index is not None:
            self.damages += check_references(self.manifest, self.index, key=self._index_key(self.manifest))
        sums = {entry.name: self._read_sums(self.manifest, entry) for entry in self.manifest.shard_entries}
        if self.index is not None:
            self.damages += check_fingerprints(self.manifest, self.index, sums, checkpoint=self.name)
        if self.is_quick:
            for entry in self.manifest.shard_entries:
                self._check_quickly(entry)
        else:
            self._scan_shards(self.manifest, sums)

    def list_components(self) -> tuple[Component, ...]:
        """By the index; without one, only what the manifest itself names is known."""
        assert self.manifest is not None
        index = self.index
        metas = [] if index is None else [index.meta(name) for name in index.names()]
        return list_components(self.manifest, [(meta.name, meta.dtype, tuple(meta.shape)) for meta in metas])

    def _read_manifest(self) -> Manifest | None:
        key = f"{self.name}/{MANIFEST_NAME}"
        try:
            data = self.storage.read_bytes(key, limit=MANIFEST_BYTES_MAX)
            self.bytes_read += len(data)
            manifest = parse_manifest(data, key=key)
        except _ReadError as error:
            self.damages.append(damage_from_error(error, key))
            return None
        if self.is_run and (manifest.id is None or manifest.id.name != self.name):
            found = "a stand-alone checkpoint" if manifest.id is None else manifest.id.name
            self.damages.append(Damage(file=key, what=f"the directory is {self.name}, the manifest is of {found}"))
        return manifest

    def _index_key(self, manifest: Manifest) -> str:
        return self._key(manifest.index_entry)

    def _key(self, entry: FileEntry) -> str:
        return entry.key_in(self.name)

    def _read_index(self, manifest: Manifest) -> LayoutIndex | None:
        key = self._index_key(manifest)
        try:
            data = read_checked(self.storage, self.name, manifest.index_entry)
            self.bytes_read += len(data)
            return parse_index(data, key=key)
        except _ReadError as error:
            self.damages.append(damage_from_error(error, key))
            return None

    def _read_sums(self, manifest: Manifest, shard: FileEntry) -> Sums | None:
        entry = manifest.sums_entry(shard)
        key = self._key(entry)
        try:
            data = read_checked(self.storage, self.name, entry)
            self.bytes_read += len(data)
            sums = parse_sums(data, key=key)
        except _ReadError as error:
            self.damages.append(damage_from_error(error, key, ranks=ranks_of(shard)))
            return None
        if (sums.file_bytes, sums.digest) == (shard.size, shard.digest):
            return sums
        what = (
            f"checksums of another file: expected {shard.size:,} bytes with digest {shard.digest}, "
            f"found {sums.file_bytes:,} with {sums.digest}"
        )
        self.damages.append(Damage(file=key, what=what, ranks=ranks_of(shard)))
        return None

    def _scan_shards(self, manifest: Manifest, sums: dict[str, Sums | None]) -> None:
        shards = {self._key(entry): entry for entry in manifest.shard_entries}
        items = [ScanItem(key, entry.digest, sums[entry.name]) for key, entry in shards.items()]
        for item, result in scan_files(self.storage, items, on_bytes=self.watch.on_bytes):
            shard = shards[item.key]
            if isinstance(result, FileScan):
                self.bytes_read += result.size
                self._judge_scan(shard, result)
            else:
                extents = self._extents(shard, None)
                lost = tuple(name for name, _, _ in extents.tensors)
                self.damages.append(damage_from_error(result, item.key, ranks=ranks_of(shard), tensors=lost))

    def _judge_scan(self, shard: FileEntry, scan: FileScan) -> None:
        ranges = list(scan.bad_ranges or ())
        if scan.size != shard.size:
            ranges.append((min(scan.size, shard.size), max(scan.size, shard.size)))
        is_good = not ranges and scan.digest == shard.digest
        header = self._read_header(shard, scan.key, is_trusted=is_good, uncached=scan.is_unstable)
        extents = self._extents(shard, header)
        for begin, end in merge_ranges(ranges):
            self.damages.append(self._range_damage(shard, scan, extents, begin, end))
        if scan.digest != shard.digest and not ranges:
            what = f"expected digest {shard.digest}, found {scan.digest}"
            if scan.bad_ranges is None:
                what += "; which bytes is not known, its checksums are lost"
            names = tuple(name for name, _, _ in extents.tensors)
            self.damages.append(Damage(scan.key, what, 0, scan.size, ranks_of(shard), names))
        if scan.is_unstable:
            self.findings.append(_unstable_finding(scan.key))
        if header is not None and is_good:
            self._compare_header(shard, header)

    def _range_damage(self, shard: FileEntry, scan: FileScan, extents: Extents, begin: int, end: int) -> Damage:
        if scan.size < shard.size == end:
            what = f"cut short: expected {shard.size:,} bytes, found {scan.size:,}"
        elif scan.size > shard.size and end == scan.size:
            what = f"too long: expected {shard.size:,} bytes, found {scan.size:,}"
        else:
            what = f"{extents.describe(begin, end)}: these bytes differ from their checksums"
        return Damage(scan.key, what, begin, end, ranks_of(shard), extents.names_in(begin, end))

    def _check_quickly(self, shard: FileEntry) -> None:
        """Size and header only; the header's blocks are compared with their checksums."""
        assert self.manifest is not None
        key = self._key(shard)
        try:
            with VerifiedFile(self.storage, self.name, shard, self.manifest.sums_entry(shard)) as file:
                needed = header_bytes_needed(bytes(file.read(0, min(8, shard.size))), file_bytes=shard.size, key=key)
                prefix = bytes(file.read(0, needed))
            self.bytes_read += len(prefix)
            header = parse_shard_header(prefix, file_bytes=shard.size, key=key)
        except _ReadError as error:
            lost = tuple(name for name, _, _ in self._extents(shard, None).tensors)
            self.damages.append(damage_from_error(error, key, ranks=ranks_of(shard), tensors=lost))
            return
        self._compare_header(shard, header)

    def _read_header(self, shard: FileEntry, key: str, *, is_trusted: bool, uncached: bool) -> ShardHeader | None:
        """The file's header, or None. In a file that differs anyway it only helps to name tensors."""
        try:
            with self.storage.open_reader(key, uncached=uncached) as reader:
                first = memoryview(bytearray(min(8, reader.size)))
                reader.read_into(0, first)
                needed = header_bytes_needed(bytes(first), file_bytes=reader.size, key=key)
                prefix = memoryview(bytearray(needed))
                reader.read_into(0, prefix)
                return parse_shard_header(bytes(prefix), file_bytes=shard.size, key=key)
        except _ReadError as error:
            if is_trusted:
                self.damages.append(damage_from_error(error, key, ranks=ranks_of(shard)))
            return None

    def _file_number(self, shard: FileEntry) -> int | None:
        """The shard's number in the index, whose names are relative to the attempt's directory."""
        if self.index is None:
            return None
        name = shard.name
        return self.index.files.index(name) if name in self.index.files else None

    def _extents(self, shard: FileEntry, header: ShardHeader | None) -> Extents:
        number = self._file_number(shard)
        if self.index is not None and number is not None:
            extents = extents_from_index(self.index, number)
            # Where the data begins is the header's to say; without it the first chunk tells.
            return extents if header is None else Extents(header.data_begin, extents.tensors)
        return NO_EXTENTS if header is None else extents_from_header(header)

    def _compare_header(self, shard: FileEntry, header: ShardHeader) -> None:
        number = self._file_number(shard)
        if self.index is None:
            return  # The lost index is a damage of its own; there is nothing to compare with.
        key = self._key(shard)
        if number is None:
            self.damages.append(Damage(key, "the index does not name this file", ranks=ranks_of(shard)))
            return
        self.damages += compare_header(header, self.index, number, key=key, ranks=ranks_of(shard))


def _verdict(damages: Sequence[Damage], findings: Sequence[Finding]) -> Verdict:
    if any(not damage.is_unreadable for damage in damages):
        return "CORRUPT"
    if damages:
        return "UNREADABLE"
    if any(finding.severity == "critical" for finding in findings):
        return "CORRUPT"
    return "PARTIAL" if any(finding.check == MISSING_COMPONENT for finding in findings) else "COMPLETE"


MISSING_COMPONENT = "component"


def _missing_findings(manifest: Manifest | None, components: Sequence[Component]) -> Iterator[Finding]:
    if manifest is None:
        return
    if not is_training_state(manifest):
        yield Finding(
            check="completeness",
            severity="not checked",
            expected="a checkpoint of a TrainState",
            found="one that was written through the DCP plug-in",
            remedy="Compare the components with what the training needs.",
            message="Written through the DCP plug-in, which is not told what belongs to the training state.",
        )
        return
    for component in missing_components(components):
        yield Finding(
            check=MISSING_COMPONENT,
            severity="warning",
            expected=f"{component.name} in the checkpoint",
            found="none",
            remedy=f"Pass {component.name} to TrainState, or accept the effect.",
            message=f"No {component.name}: {component.consequence}.",
        )


def _unstable_finding(key: str) -> Finding:
    return Finding(
        check="stable reads",
        severity="warning",
        expected="the same bytes from both reads",
        found="a first read that differs from the checksums, and a second, uncached one that matches",
        remedy="The file is good; test this machine's memory and its storage driver.",
        message=f"{key}: two reads gave different bytes.",
    )
