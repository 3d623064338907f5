"""What a small training job does to its run, without torch: commits by two ranks, a whole life of a run."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dckpt.blocks.source import ImageSource
from dckpt.blocks.write import WriterPool, write_shard_file
from dckpt.catalog.catalog import Catalog, file_key
from dckpt.catalog.generations import create_generation
from dckpt.catalog.prune import expire
from dckpt.catalog.transaction import Transaction
from dckpt.errors import CorruptCheckpointError
from dckpt.format.checksum import digest_bytes
from dckpt.format.generation import Generation, Parent
from dckpt.format.index import Chunk, build_index
from dckpt.format.layout import CheckpointId, checkpoint_name, shard_file_name
from dckpt.format.manifest import Manifest
from dckpt.format.shard_file import ShardTensor, plan_shard_file
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


def stage_step(
    storage: Storage, step: int, generation: int, as_rank: Callable[[int], None] = lambda _: None
) -> Transaction:
    """Everything of a save but the commit. After an error the attempt is abandoned, as the saver does."""
    attempt = uuid.uuid4().hex
    name = checkpoint_name(step, generation)
    transaction = Transaction(storage, checkpoint=name, attempt=attempt, generation=generation)
    try:
        transaction.begin()
        _fill(storage, transaction, attempt, step, generation, as_rank)
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
) -> None:
    entries, chunks, files = [], [], []
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
        storage.sync_dir(transaction.attempt_dir)
        chunks.append(Chunk((8 * rank,), (8,), rank, plan.begins[0]))
        files.append(plan.file)
    as_rank(0)
    transaction.ensure_files(entries, patience_s=0)
    entries.append(transaction.write_index(build_index(files, {"model.w": ("I64", (16,), chunks)})))
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


def commit(storage: Storage, step: int, generation: int, as_rank: Callable[[int], None] = lambda _: None) -> str:
    """The whole of a save; after an error the attempt is abandoned, as the saver does."""
    transaction = stage_step(storage, step, generation, as_rank)
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
        data = storage.read_bytes(file_key(name, entry), limit=entry.size)
        if len(data) != entry.size or digest_bytes(data) != entry.digest:
            raise CorruptCheckpointError(f"{name}: {entry.path} is damaged")


def record(base: Path) -> tuple[RecordingPosix, LocalStorage]:
    base.mkdir()
    posix = RecordingPosix(str(base))
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
