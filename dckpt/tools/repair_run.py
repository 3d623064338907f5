"""Carries a repair out: good files are linked or copied, others written anew and compared with their digests, one commit.

The old checkpoint is only read. Nothing is visible before the commit; a repair that dies leaves a leftover and nothing else.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace

from dckpt import failpoint
from dckpt.blocks.source import PieceMemory, parts_of_piece
from dckpt.blocks.write import WriterPool, checksum_source, write_shard_file, write_small
from dckpt.catalog.generations import create_generation
from dckpt.catalog.transaction import Transaction
from dckpt.errors import CorruptCheckpointError, StorageFullError, StorageMissingError
from dckpt.format.checksum import Sums, digest_bytes, encode_sums, parse_sums
from dckpt.format.layout import sums_file_name
from dckpt.format.manifest import REUSED_MAX, FileEntry
from dckpt.format.origin import CHANGES_MAX, Origin
from dckpt.format.shard_file import ShardFilePlan
from dckpt.tools.repair import Prepared
from dckpt.tools.repair_layout import NewFile
from dckpt.tools.restore import FileState
from dckpt.version import __version__

log = logging.getLogger(__name__)

SLACK_BYTES = 2**20  # index and manifest
SENTENCE_CHARS_MAX = 1000
SUMS_BYTES_MAX = 2**30

OnBytes = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class ExactSource:
    """A `FileSource`: the file as it was, every block from where it is good."""

    state: FileState

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.state.entry.size

    @property
    def plan(self) -> ShardFilePlan | None:
        """Where its tensors lie."""
        return self.state.plan

    def piece(self, begin: int, end: int, memory: PieceMemory) -> memoryview:
        """Read and verified; see `FileState.read`."""
        piece = memory.take(end - begin)
        self.state.read(begin, end, piece)
        return piece

    def in_place(self, begin: int, end: int) -> None:
        """Nothing lies in memory."""
        del begin, end


@dataclass(frozen=True, slots=True)
class ChangedSource:
    """A `FileSource`: some tensors of an old file, verified, and some new bytes."""

    plan: ShardFilePlan
    old: FileState | None
    tensors: tuple[int | bytes, ...]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.plan.size

    def piece(self, begin: int, end: int, memory: PieceMemory) -> memoryview:
        """The header as planned, each tensor from its source."""
        piece = memory.take(end - begin)
        for number, offset, target in parts_of_piece(self.plan, begin, piece):
            source = self.tensors[number]
            if isinstance(source, bytes):
                target[:] = source[offset : offset + len(target)]
            else:
                assert self.old is not None
                self.old.read(source + offset, source + offset + len(target), target)
        return piece

    def in_place(self, begin: int, end: int) -> None:
        """Nothing lies in memory."""
        del begin, end


def apply_repair(prepared: Prepared, *, on_bytes: OnBytes = lambda _: None) -> None:
    """Writes and commits the new checkpoint; on return it exists, durably.

    `CommitConflictError` if another job began a generation meanwhile, `CorruptCheckpointError` if a source changed since the plan
    was made, `StorageFullError` before anything is written if there is no room. `UnknownOutcomeError`: the new checkpoint
    may be there, and nothing is cleaned up. After any other error there is none.
    """
    assert not prepared.plan.refusals
    assert prepared.index is not None
    storage, destination = prepared.destination.storage, prepared.destination
    _ensure_room(prepared)
    attempt = uuid.uuid4().hex
    transaction = Transaction(
        storage, checkpoint=destination.checkpoint, attempt=attempt, generation=destination.generation
    )
    transaction.begin()
    pool = WriterPool()
    try:
        entries: list[FileEntry] = []
        for state in prepared.kept:
            entries += _keep(prepared, state, transaction.attempt_dir, attempt, pool, on_bytes)
        for file in prepared.written:
            entries += _write(prepared, file, transaction.attempt_dir, attempt, pool, on_bytes)
        storage.sync_dir(transaction.attempt_dir)
        failpoint.reach("after_directory_sync")
        transaction.ensure_files(entries)
        entries.append(transaction.write_index(prepared.index))
        transaction.stage_manifest(
            replace(
                prepared.manifest,
                run_id=destination.run_id,
                generation=destination.generation,
                attempt=attempt,
                created_unix_s=time.time(),
                writer={**prepared.source.writer, "dckpt": __version__},
                lineage=_origin(prepared),
                files=tuple(entries),
            )
        )
        if destination.generation:
            failpoint.reach("before_generation")
            record = destination.record(prepared.manifest.world_size, "repair")
            create_generation(storage, record, expected_newest=destination.observed)
            failpoint.reach("after_generation")
        failpoint.reach("before_commit")
        transaction.publish()
    except BaseException:
        transaction.abandon()
        raise
    finally:
        pool.stop()
    failpoint.reach("after_commit")


def _origin(prepared: Prepared) -> Origin:
    source = prepared.source
    told = dict.fromkeys(_sentence(str(change)) for change in prepared.plan.changes)
    return Origin(
        how="repair",
        run_id=source.run_id,
        checkpoint=prepared.plan.source.rpartition("/")[2],
        step=source.step,
        micro_step=source.micro_step,
        generation=source.generation,
        manifest_sha256=prepared.sha256,
        world_size=source.world_size,
        changes=tuple(told)[:CHANGES_MAX],
    )


def _sentence(text: str) -> str:
    printable = "".join(character if character.isprintable() else " " for character in text)
    return printable[:SENTENCE_CHARS_MAX]


def _ensure_room(prepared: Prepared) -> None:
    storage, needed = prepared.destination.storage, prepared.plan.bytes_written + SLACK_BYTES
    free = storage.free_bytes()
    if free is not None and free < needed:
        raise StorageFullError(
            f"{storage.url}: expected {needed:,} bytes of free space for the repaired checkpoint, found {free:,}. Nothing was "
            "written: `dckpt prune` removes checkpoints and leftovers.",
            key=storage.url,
        )


def _keep(
    prepared: Prepared, state: FileState, directory: str, attempt: str, pool: WriterPool, on_bytes: OnBytes
) -> list[FileEntry]:
    """A file whose every byte is good: one more name for it where the storage has that, else a copy."""
    entry = state.entry
    target = f"{directory}/{entry.name}"
    is_here = prepared.destination.storage.url == state.place.storage.url
    try:
        is_linked = is_here and prepared.destination.storage.link(state.place.key, target)
    except StorageMissingError as error:
        raise CorruptCheckpointError(
            f"{state.place.storage.locate(state.place.key)}: expected the file that was there when this repair was planned, "
            "found none. Somebody deletes the checkpoint; plan again.",
            key=state.place.key,
        ) from error
    if not is_linked:
        return _write(prepared, NewFile(entry.name, entry.rank or 0, state, None), directory, attempt, pool, on_bytes)
    sums_name = sums_file_name(entry.name)
    sums = _sums_bytes(prepared, state, pool)
    on_bytes(entry.size)
    write_small(prepared.destination.storage, f"{directory}/{sums_name}", sums)
    # A stand-alone checkpoint states no reuse (FORMAT.md, section 8.2).
    reused = min(entry.reused + 1, REUSED_MAX) if prepared.destination.generation else 0
    return [
        replace(entry, path=f"{attempt}/{entry.name}", checkpoint=None, reused=reused),
        FileEntry(f"{attempt}/{sums_name}", len(sums), digest_bytes(sums), "sums", entry.rank),
    ]


def _sums_bytes(prepared: Prepared, state: FileState, pool: WriterPool) -> bytes:
    """The sums file as it was, if it is good and has fingerprints; made again from the file otherwise."""
    assert state.sums is not None
    if state.plan is not None and not state.sums.fingerprints:
        return encode_sums(checksum_source(ExactSource(state), lambda _: None, pool))
    if state.has_good_sums:
        entry = prepared.source.sums_entry(state.entry)
        name = prepared.plan.source.rpartition("/")[2]
        data = prepared.storage.read_bytes(entry.key_in(name), limit=entry.size)
        if digest_bytes(data) == entry.digest:
            return data
    return encode_sums(state.sums)


def _write(
    prepared: Prepared, file: NewFile, directory: str, attempt: str, pool: WriterPool, on_bytes: OnBytes
) -> list[FileEntry]:
    storage = prepared.destination.storage
    if file.plan is not None:
        source: ExactSource | ChangedSource = ChangedSource(file.plan, file.old, file.tensors)
    else:
        assert file.old is not None
        source = ExactSource(file.old)
    found = write_shard_file(storage, directory, attempt, file.rank, file.name, source, on_bytes, pool)
    if file.plan is None and file.old is not None:
        expected, shard = file.old.entry, found[0]
        if (shard.size, shard.digest) != (expected.size, expected.digest):
            raise CorruptCheckpointError(
                f"{storage.locate(directory)}/{file.name}: expected digest {expected.digest} of the restored file, found "
                f"{shard.digest}. Its blocks match their checksums, the file does not match its digest; nothing was committed.",
                key=file.name,
                field="digest",
                expected=expected.digest,
                found=shard.digest,
            )
    if file.plan is not None and file.old is not None and file.old.sums is not None:
        _ensure_same_tensors(prepared, file, file.old.sums, f"{directory}/{found[1].name}")
    return found


def _ensure_same_tensors(prepared: Prepared, file: NewFile, old: Sums, sums_key: str) -> None:
    """Every tensor that was taken over has the fingerprint that it had when it was saved."""
    storage = prepared.destination.storage
    assert file.plan is not None
    assert file.old is not None
    new = parse_sums(storage.read_bytes(sums_key, limit=SUMS_BYTES_MAX), key=sums_key)
    if file.old.plan is None or not old.fingerprints or not new.fingerprints:
        return
    before = dict(zip((tensor.name for tensor in file.old.plan.tensors), old.fingerprints, strict=True))
    for tensor, source, value in zip(file.plan.tensors, file.tensors, new.fingerprints, strict=True):
        if not isinstance(source, bytes) and before[tensor.name] != value:
            raise CorruptCheckpointError(
                f"{storage.locate(sums_key)}: expected fingerprint {before[tensor.name]:032x} of {tensor.name}, found "
                f"{value:032x}. Somebody changes the files; nothing was committed, plan again.",
                key=tensor.name,
                field="fingerprint",
            )
