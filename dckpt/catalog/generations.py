"""Generation records: who may commit now. The newest number is the fence; no clock, no lock."""

from __future__ import annotations

import logging
from datetime import datetime, timezone

from dckpt.errors import (
    CommitConflictError,
    CorruptCheckpointError,
    DckptError,
    KeyExistsError,
)
from dckpt.format.generation import GENERATION_BYTES_MAX, Generation, encode_generation, parse_generation
from dckpt.format.layout import GENERATIONS_DIR, generation_key, parse_generation_file
from dckpt.storage.base import Storage

logger = logging.getLogger(__name__)


def list_generations(storage: Storage) -> list[int]:
    """The numbers of all generation records, ascending; reads names only. Temporary files are not records."""
    # The root is asked whether the directory exists: "not found" from the directory itself may also be a
    # stale handle, and a fence must not take that for an empty run.
    if not storage.exists() or GENERATIONS_DIR not in {e.name for e in storage.list_dir() if e.is_dir}:
        return []
    numbers = (parse_generation_file(entry.name) for entry in storage.list_dir(GENERATIONS_DIR))
    return sorted(number for number in numbers if number is not None)


def read_generation(storage: Storage, number: int) -> Generation:
    """The record `number`. `StorageMissingError` if absent.

    `CorruptCheckpointError` if it is damaged in a second, uncached read too: the line of the run hangs on it.
    """
    try:
        return _read_record(storage, number, uncached=False)
    except CorruptCheckpointError as error:
        record = _read_record(storage, number, uncached=True)
        logger.warning("%s A second, uncached read was right: memory or the page cache was not.", error)
        return record


def _read_record(storage: Storage, number: int, *, uncached: bool) -> Generation:
    key = generation_key(number)
    place = storage.locate(key)
    record = parse_generation(storage.read_bytes(key, limit=GENERATION_BYTES_MAX, uncached=uncached), key=place)
    if record.number != number:
        raise CorruptCheckpointError(
            f"{place}: expected generation {number}, found {record.number}. The file was renamed or copied; "
            "restore it.",
            key=place,
            field="number",
            expected=number,
            found=record.number,
        )
    return record


def create_generation(storage: Storage, generation: Generation, *, expected_newest: int) -> None:
    """Makes `generation` the newest, durably, if no record newer than `expected_newest` is there.

    `CommitConflictError` if another job was faster. `UnknownOutcomeError` if the record may be there: call
    again with the same record, whose nonce tells that it is ours. A *new* record after an unknown outcome
    would meet the old one as a stranger's.
    """
    assert generation.number > expected_newest, "a generation is newer than what its creator observed"
    newest = max(list_generations(storage), default=0)
    is_retry = newest == generation.number
    if newest > expected_newest and not is_retry:
        raise _conflict(storage, newest, expected_newest)
    key = generation_key(generation.number)
    try:
        storage.create(key, encode_generation(generation))
    except KeyExistsError as error:
        if read_generation(storage, generation.number).nonce != generation.nonce:
            raise _conflict(storage, generation.number, expected_newest) from error
        # Ours, from a call whose answer was lost. `create` has just made and synced a file in the same
        # directory, so the journal is not aborted, and syncing the directory once more covers the older
        # entry: this is a new operation, not a retried fsync.
        storage.sync_dir(GENERATIONS_DIR)


def ensure_not_fenced(storage: Storage, number: int) -> None:
    """Returns if generation `number` is there and the newest; otherwise this process may commit nothing."""
    numbers = list_generations(storage)
    newest = max(numbers, default=0)
    if newest > number:
        raise _conflict(storage, newest, number)
    if number not in numbers:
        raise CommitConflictError(
            f"{storage.locate(generation_key(number))}: expected the record that this job created, found "
            "none. Somebody deleted it or replaced the run; nothing is committed. Restart the job so that "
            "it resumes from what is there."
        )


def _conflict(storage: Storage, newest: int, observed: int) -> CommitConflictError:
    try:
        record = read_generation(storage, newest)
        created = datetime.fromtimestamp(record.created_unix_s, timezone.utc).isoformat(timespec="seconds")
        who = f"created {created} ({record.reason}) by a run with world size {record.world_size}"
    except DckptError as error:
        # The number alone proves the conflict; the record only tells more about the other job.
        who = f"whose record cannot be read ({error})"
    return CommitConflictError(
        f"Run {storage.url}: expected generation {observed} to be the newest, found generation {newest}, "
        f"{who}. Another job writes into this run: stop one of the two; the one that stays must resume "
        "first."
    )
