"""The commit path in every state that a power loss can leave, and each of its calls failed in turn.

The histories are recorded from the real code: `LocalStorage`, `Transaction`, `write_shard_file`,
`create_generation`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dckpt.catalog.catalog import Catalog
from dckpt.catalog.generations import create_generation, list_generations, read_generation
from dckpt.catalog.prune import expire, find_leftovers, sweep
from dckpt.errors import CorruptCheckpointError, DckptError, StorageMissingError
from dckpt.format.layout import PINS_DIR, checkpoint_name, pin_key
from dckpt.storage.base import Entry
from tests.support.commits import (
    RUN,
    commit,
    ensure_whole,
    life_of_a_fine_tuning,
    life_of_a_fine_tuning_without_links,
    life_of_a_run,
    make_record,
    promise_commit,
    record,
    stage_step,
    start_generation,
)
from tests.support.crash_states import MODELS, Explorer, Files, drop_syncs
from tests.support.recording import KilledError, NameChange, Operation, RecordingPosix, Sync

# --- what may be found afterwards


class StateStorage:
    """The reading half of a `Storage` over one state, so that the real catalog judges it."""

    def __init__(self, files: Files) -> None:
        self._files = {path.removeprefix(f"{RUN}/"): data for path, data in files.items() if path.startswith(f"{RUN}/")}
        self._has_root = f"{RUN}/" in files
        self.url = "state"

    def locate(self, key: str) -> str:
        return key

    def exists(self) -> bool:
        return self._has_root

    def list_dir(self, key: str = "") -> list[Entry]:
        prefix = f"{key}/" if key else ""
        if prefix and prefix not in self._files:
            raise StorageMissingError(key)
        found = []
        for path, data in self._files.items():
            name = path.removeprefix(prefix).removesuffix("/")
            if path.startswith(prefix) and name and "/" not in name:
                found.append(Entry(name, path.endswith("/"), len(data)))
        return sorted(found, key=lambda entry: entry.name)

    def read_bytes(self, key: str, *, limit: int, uncached: bool = False) -> bytes:
        if key not in self._files:
            raise StorageMissingError(key)
        if len(self._files[key]) > limit:
            raise CorruptCheckpointError(key)
        return self._files[key]


def examine(files: Files) -> tuple[frozenset[Hashable], tuple[str, ...]]:
    storage: Any = StateStorage(files)
    facts: set[Hashable] = set()
    problems = []
    if storage.exists():
        facts.add(("root",))
    try:
        for number in list_generations(storage):
            read_generation(storage, number)
            facts.add(("generation", number))
        catalog = Catalog(storage)
        for item in catalog.checkpoints():
            ensure_whole(storage, item.name)
            facts |= {("checkpoint", item.name), ("some checkpoint",)}
            if ("generation", item.generation) not in facts:
                problems.append(f"{item.name} without its generation")
        pins = catalog.pins()
        facts |= {("pin", name) for name in pins}
        facts |= {("no pin", name) for name in (checkpoint_name(100, 1), checkpoint_name(200, 1)) if name not in pins}
        problems += [f"pin of {name}" for name in pins if storage.read_bytes(pin_key(name), limit=3) != b"{}\n"]
        line = catalog.line()
        if line:
            facts |= {("latest at least", step) for step in (100, 200, 300) if line[0].step >= step}
    except DckptError as error:
        problems.append(str(error))
    return frozenset(facts), tuple(problems)


# --- the histories


@contextlib.contextmanager
def killed(posix: RecordingPosix, kind: str, path_end: str) -> Iterator[None]:
    """The process dies before the first such call; the next one goes on with what the kernel shows it."""
    posix.dies_before = lambda found, path: found == kind and path.endswith(path_end)
    with pytest.raises(KilledError):
        yield
    posix.revive()


def killed_after_making_the_root(base: Path) -> RecordingPosix:
    posix, storage = record(base)
    with killed(posix, "fsync", "deep"):
        storage.ensure_root()
    storage.ensure_root()
    posix.acknowledge("root")
    return posix


def killed_after_making_the_root_then_a_generation(base: Path) -> RecordingPosix:
    posix, storage = record(base)
    with killed(posix, "fsync", "deep"):
        storage.ensure_root()
    posix.acknowledge("generation", start_generation(storage))
    return posix


def killed_within_making_a_root_in_place(base: Path) -> RecordingPosix:
    posix, storage = record(base)
    with killed(posix, "mkdir", "run"):
        storage.ensure_root()
    posix.operations.pop()
    storage.ensure_root()
    posix.acknowledge("root")
    return posix


def killed_after_making_the_generations_directory(base: Path) -> RecordingPosix:
    posix, storage = record(base)
    storage.ensure_root()
    with killed(posix, "create", ""):
        start_generation(storage)
    # What the killed one had synced is taken back: it died between its mkdir and its fsync.
    assert isinstance(posix.operations[-1], Sync)
    posix.operations.pop()
    posix.acknowledge("generation", start_generation(storage))
    return posix


def killed_before_the_generation_was_synced(base: Path) -> RecordingPosix:
    posix, storage = record(base)
    storage.ensure_root()
    mine = make_record(1)
    with killed(posix, "fsync", "generations"):
        create_generation(storage, mine, expected_newest=0)
    create_generation(storage, mine, expected_newest=0)
    posix.acknowledge("generation", 1)
    return posix


def killed_between_rename_and_sync_then_expired(base: Path) -> RecordingPosix:
    posix, storage = record(base)
    storage.ensure_root()
    generation = start_generation(storage)
    first = commit(storage, 100, generation)
    posix.acknowledge("some checkpoint")
    transaction = stage_step(storage, 200, generation)
    with killed(posix, "fsync", "run"):
        transaction.publish()
    expire(storage, [first])
    return posix


def killed_between_rename_and_sync_then_read_back(base: Path) -> RecordingPosix:
    """The same attempt published again, as after an answer that was lost."""
    posix, storage = record(base)
    storage.ensure_root()
    generation = start_generation(storage)
    transaction = stage_step(storage, 100, generation)
    with killed(posix, "fsync", "run"):
        transaction.publish()
    transaction.publish()
    promise_commit(posix, checkpoint_name(100, generation), 100)
    return posix


def killed_between_pin_and_sync(base: Path) -> RecordingPosix:
    posix, storage = record(base)
    storage.ensure_root()
    name = commit(storage, 100, start_generation(storage))
    with killed(posix, "fsync", PINS_DIR):
        Catalog(storage).pin(name)
    Catalog(storage).pin(name)
    posix.acknowledge("pin", name)
    return posix


def killed_between_trash_and_sync_then_swept(base: Path) -> RecordingPosix:
    posix, storage = record(base)
    storage.ensure_root()
    generation = start_generation(storage)
    first = commit(storage, 100, generation)
    commit(storage, 200, generation)
    with killed(posix, "unlink", ""):
        storage.discard(first)
    assert isinstance(posix.operations[-1], Sync)
    posix.operations.pop()
    sweep(storage, [item.name for item in find_leftovers(storage, older_than_s=0, now_unix_s=1e12)])
    return posix


HISTORIES: tuple[Callable[[Path], RecordingPosix], ...] = (
    life_of_a_run,
    life_of_a_fine_tuning,
    life_of_a_fine_tuning_without_links,
    killed_after_making_the_root,
    killed_after_making_the_root_then_a_generation,
    killed_within_making_a_root_in_place,
    killed_after_making_the_generations_directory,
    killed_before_the_generation_was_synced,
    killed_between_rename_and_sync_then_expired,
    killed_between_rename_and_sync_then_read_back,
    killed_between_pin_and_sync,
    killed_between_trash_and_sync_then_swept,
)


@pytest.fixture(scope="module", name="recorded")
def _recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Operation]]:
    base = tmp_path_factory.mktemp("histories")
    return {history.__name__: history(base / history.__name__).operations for history in HISTORIES}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("history", [history.__name__ for history in HISTORIES])
def test_after_a_power_loss_visible_is_whole_and_acknowledged_is_present(
    recorded: dict[str, list[Operation]], history: str, model: Any
):
    explorer = Explorer(recorded[history], examine)

    found = list(explorer.violations(model))

    assert not found, found[:3]
    assert explorer.num_states >= len(recorded[history]), "at least one state of each prefix was examined"


def test_the_weak_model_tears_what_the_protocol_protects(recorded: dict[str, list[Operation]]):
    """The enumeration itself bites: without any fsync at all it finds both kinds of violation."""
    careless = [op for op in recorded["life_of_a_run"] if not isinstance(op, Sync)][:16]

    found = {violation.problem.split(":")[0] for violation in Explorer(careless, examine).violations("weak")}

    assert found == {"visible but not whole", "acknowledged but lost"}


def test_every_fsync_of_the_protocol_is_needed(recorded: dict[str, list[Operation]]):
    """Without any one of them some power loss tears or loses something; so a lost fsync is noticed."""
    sites = sorted({op.site for ops in recorded.values() for op in ops if isinstance(op, Sync)})
    unneeded = [site for site in sites if not is_noticed_without(recorded, site)]

    assert not unneeded
    assert len(sites) >= 15, sites


def test_the_directory_into_which_a_file_is_linked_must_be_synced(recorded: dict[str, list[Operation]]):
    """The linked file itself was synced by the save that wrote it; its new name was not."""
    operations = recorded["life_of_a_fine_tuning"]
    names = [op for op in operations if isinstance(op, NameChange) and op.changes[0][1] == "rank00000-1.safetensors"]
    written, linked = names[0], names[1]
    assert written.changes[0][2] == linked.changes[0][2], "one file, two names"
    (directory, _, _) = linked.changes[0]
    careless = [op for op in operations if not (isinstance(op, Sync) and op.inode == directory)]
    assert len(careless) < len(operations)

    found = (violation.problem for violation in Explorer(careless, examine).violations("weak"))
    torn = f"visible but not whole: step-0000000200.g0001/{'[0-9a-f]' * 32}/rank00000-1.safetensors"
    assert any(re.match(torn, problem) for problem in found)


def is_noticed_without(recorded: dict[str, list[Operation]], site: str) -> bool:
    for operations in recorded.values():
        if not any(isinstance(op, Sync) and op.site == site for op in operations):
            continue
        for model in MODELS:
            explorer = Explorer(drop_syncs(operations, site), examine)
            if next(explorer.violations(model), None) is not None:
                return True
    return False
