"""What a small training job does to its run, without torch: commits by two ranks, a whole life of a run."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dckpt.blocks.source import ImageSource
from dckpt.blocks.take_over import Place, take_over
from dckpt.blocks.write import WriterPool, checksum_source, write_shard_file
from dckpt.catalog.catalog import Catalog
from dckpt.catalog.generations import create_generation
from dckpt.catalog.prune import expire
from dckpt.catalog.references import find_referable
from dckpt.catalog.transaction import Transaction
from dckpt.engine.reuse import reusable_files
from dckpt.errors import CorruptCheckpointError
from dckpt.format.checksum import digest_bytes
from dckpt.format.generation import Generation, Parent
from dckpt.format.index import Chunk, build_index
from dckpt.format.layout import CheckpointId, checkpoint_name, shard_file_name
from dckpt.format.manifest import FileEntry, Manifest
from dckpt.format.shard_file import ShardFilePlan, ShardTensor, plan_shard_file
from dckpt.storage.base import Storage
from dckpt.storage.local import LocalStorage
from tests.support.recording import RecordingPosix

RUN = "deep/run"
"""Where the run lies below the recorded directory: its root has to be made, with an ancestor."""

POOL = WriterPool(1)  # one thread: the order of system calls is then the same in every recording
WORLD_SIZE = 2


def make_record(number: int, parent: CheckpointId | None = None) -> Generation:
    link = None
    if parent is not None:
        link = Parent(parent.name, parent.step, parent.micro_step, parent.generation, "0" * 64)
    return Generation(
        number=number,
        run_id="run",
        parent=link,
        reason="start",
        world_size=WORLD_SIZE,
        created_unix_s=1.0,
        nonce=uuid.uuid4().hex,
    )


@dataclass(frozen=True)
class Base:
    """A tensor of rank 0 that does not change, in a file of its own; `parent`: the checkpoint to take it over from.

    has_looked: the save looked where it may refer to before anybody announced a deletion.
    """

    parent: str | None = None
    has_looked: bool = False


def stage_step(
    storage: Storage,
    step: int,
    generation: int,
    as_rank: Callable[[int], None] = lambda _: None,
    base: Base | None = None,
) -> Transaction:
    """Everything of a save but the commit. After an error the attempt is abandoned, as the saver does."""
    attempt = uuid.uuid4().hex
    name = checkpoint_name(step, generation)
    transaction = Transaction(storage, checkpoint=name, attempt=attempt, generation=generation)
    try:
        transaction.begin()
        _fill(storage, transaction, attempt, step, generation, as_rank, base)
    except Exception:
        transaction.abandon()
        raise
    return transaction


def _fill(
    storage: Storage,
    transaction: Transaction,
    attempt: str,
    step: int,
    generation: int,
    as_rank: Callable[[int], None],
    base: Base | None,
) -> None:
    entries: list[FileEntry] = []
    chunks, files = [], []
    tensors: dict[str, tuple[str, tuple[int, ...], list[Chunk]]] = {"model.w": ("I64", (16,), chunks)}
    for rank in range(WORLD_SIZE):
        as_rank(rank)
        plan = plan_shard_file(shard_file_name(rank), [ShardTensor("model.w", "I64", (8,), (8 * rank,))])
        image = plan.header + (np.arange(8, dtype="<i8") + step + 8 * rank).tobytes()
        entries += write_shard_file(
            storage,
            transaction.attempt_dir,
            attempt,
            rank,
            plan.file,
            ImageSource(memoryview(image)),
            lambda _: None,
            POOL,
        )
        chunks.append(Chunk((8 * rank,), (8,), len(files), plan.begins[0]))
        files.append(plan.file)
        if base is not None and rank == 0:
            frozen = plan_shard_file(shard_file_name(0, 1), [ShardTensor("model.base", "I64", (4,), (0,))])
            entries += _write_base(storage, transaction, attempt, frozen, base)
            tensors["model.base"] = ("I64", (4,), [Chunk((0,), (4,), len(files), frozen.begins[0])])
            files.append(frozen.file)
        storage.sync_dir(transaction.attempt_dir)
    as_rank(0)
    transaction.ensure_files(entries, patience_s=0)
    entries.append(transaction.write_index(build_index(files, tensors)))
    transaction.stage_manifest(
        Manifest(
            run_id="run",
            step=step,
            micro_step=0,
            generation=generation,
            attempt=attempt,
            created_unix_s=1.0,
            world_size=WORLD_SIZE,
            files=tuple(entries),
        )
    )


def _write_base(
    storage: Storage, transaction: Transaction, attempt: str, plan: ShardFilePlan, base: Base
) -> list[FileEntry]:
    """Decides as the committer does: takes the file over if it is the parent's, else writes it."""
    source = ImageSource(memoryview(plan.header + bytes(plan.size - len(plan.header))))
    if base.parent is not None:
        manifest, _ = Catalog(storage).read_manifest(base.parent)
        reusable = reusable_files(base.parent, manifest.files, rewrite_every=10)
        sums = checksum_source(source, lambda _: None, POOL)
        found = reusable.find(source.size, sums.digest, plan.file)
        assert found is not None, "the base is always the same"
        place = Place(transaction.attempt_dir, attempt, 0, plan.file)
        may_refer = reusable.places if base.has_looked else find_referable(storage, reusable.places)
        taken = take_over(storage, found, sums, place, may_refer=may_refer)
        if taken is not None:
            return taken
    return write_shard_file(storage, transaction.attempt_dir, attempt, 0, plan.file, source, lambda _: None, POOL)


def commit(
    storage: Storage,
    step: int,
    generation: int,
    as_rank: Callable[[int], None] = lambda _: None,
    base: Base | None = None,
) -> str:
    """The whole of a save; after an error the attempt is abandoned, as the saver does."""
    transaction = stage_step(storage, step, generation, as_rank, base)
    try:
        transaction.publish()
    except Exception:
        transaction.abandon()
        raise
    return checkpoint_name(step, generation)


def start_generation(storage: Storage) -> int:
    """The next generation, which descends from the latest checkpoint."""
    catalog = Catalog(storage)
    newest, line = catalog.newest_generation(), catalog.line()
    record = make_record(newest + 1, parent=line[0] if line else None)
    create_generation(storage, record, expected_newest=newest)
    return record.number


def ensure_whole(storage: Any, name: str) -> None:
    """The manifest, the layout index and every byte of every file verify."""
    manifest, _ = Catalog(storage).read_manifest(name)
    Catalog(storage).read_index(name, manifest)
    for entry in manifest.files:
        data = storage.read_bytes(entry.key_in(name), limit=entry.size)
        if len(data) != entry.size or digest_bytes(data) != entry.digest:
            raise CorruptCheckpointError(f"{name}: {entry.path} is damaged")


class LinklessPosix(RecordingPosix):
    """A file system on which finished files get no second name; small files are still created by one."""

    def link(self, source: str, target: str) -> None:
        if ".new-" not in source:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        super().link(source, target)


def record(base: Path, kind: type[RecordingPosix] = RecordingPosix) -> tuple[RecordingPosix, LocalStorage]:
    base.mkdir()
    posix = kind(str(base))
    return posix, LocalStorage(base / RUN, posix)


def as_client(posix: RecordingPosix) -> Callable[[int], None]:
    def switch(rank: int) -> None:
        posix.client = rank

    return switch


def promise_commit(posix: RecordingPosix, name: str, step: int) -> None:
    posix.acknowledge("checkpoint", name)
    posix.acknowledge("latest at least", step)
    posix.acknowledge("some checkpoint")


def life_of_a_run(base: Path) -> RecordingPosix:
    """From nothing: two commits by two ranks, a pin, and the older checkpoint expires."""
    posix, storage = record(base)
    storage.ensure_root()
    posix.acknowledge("root")
    generation = start_generation(storage)
    posix.acknowledge("generation", generation)
    first = commit(storage, 100, generation, as_client(posix))
    promise_commit(posix, first, 100)
    second = commit(storage, 200, generation, as_client(posix))
    promise_commit(posix, second, 200)
    Catalog(storage).pin(second)
    posix.acknowledge("pin", second)
    Catalog(storage).pin(first)
    posix.acknowledge("pin", first)
    posix.withdraw("pin", first)
    Catalog(storage).unpin(first)
    posix.acknowledge("no pin", first)
    posix.withdraw("checkpoint", first)
    expire(storage, [first], generation=generation)
    return posix


def life_of_a_fine_tuning(base: Path) -> RecordingPosix:
    """The second of two commits takes a file over by a link; then the first checkpoint expires."""
    posix, storage = record(base)
    storage.ensure_root()
    generation = start_generation(storage)
    first = commit(storage, 100, generation, as_client(posix), Base())
    promise_commit(posix, first, 100)
    second = commit(storage, 200, generation, as_client(posix), Base(first))
    promise_commit(posix, second, 200)
    posix.withdraw("checkpoint", first)
    assert expire(storage, [first], generation=generation) == [first]
    return posix


def life_of_a_fine_tuning_without_links(base: Path) -> RecordingPosix:
    """The second of two commits refers to the first, which therefore stays."""
    posix, storage = record(base, LinklessPosix)
    storage.ensure_root()
    generation = start_generation(storage)
    first = commit(storage, 100, generation, as_client(posix), Base())
    promise_commit(posix, first, 100)
    second = commit(storage, 200, generation, as_client(posix), Base(first))
    promise_commit(posix, second, 200)
    assert expire(storage, [first], generation=generation) == []
    return posix
