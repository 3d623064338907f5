"""Every storage keeps every promise of `dckpt.storage.base`. A new backend is one line in `STORAGES`."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from dckpt.errors import (
    ConfigError,
    CorruptCheckpointError,
    KeyExistsError,
    StorageError,
    StorageMissingError,
)
from dckpt.storage.base import Storage
from dckpt.storage.local import LocalStorage
from dckpt.storage.opening import open_storage

STORAGES: dict[str, Callable[[Path], Storage]] = {
    "local": lambda place: LocalStorage(place / "deep" / "run"),
    "memory": lambda place: open_storage(f"memory://{place.name}-{uuid.uuid4().hex}/deep/run"),
}

ATTEMPT = "0123456789abcdef" * 2
NAME = "step-0000000100.g0001"


# Fixtures that start a server, and what makes a storage there from a name of its own.
SERVED: dict[str, str] = {"s3": "object_server"}


@pytest.fixture(params=[*STORAGES, *SERVED])
def unmade(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A storage whose root was never made."""
    if request.param in STORAGES:
        return STORAGES[request.param](tmp_path)
    return open_storage(request.getfixturevalue(SERVED[request.param]).url(f"{uuid.uuid4().hex}/deep/run"))


@pytest.fixture(name="storage")
def _storage(unmade: Storage) -> Storage:
    unmade.ensure_root()
    return unmade


def write_file(storage: Storage, key: str, data: bytes) -> None:
    writer = storage.create_file(key)
    writer.write_at(0, memoryview(data))
    writer.finish(len(data))


def stage(storage: Storage, manifest: bytes = b"manifest", attempt: str = ATTEMPT, name: str = NAME) -> str:
    staging = storage.staging_key(name, attempt)
    storage.make_dirs(f"{staging}/{attempt}")
    write_file(storage, f"{staging}/{attempt}/rank00000.safetensors", b"tensors")
    storage.sync_dir(f"{staging}/{attempt}")
    storage.stage_manifest(staging, manifest)
    return staging


def test_a_root_that_was_never_made_does_not_exist(unmade: Storage):
    assert not unmade.exists()
    with pytest.raises(StorageMissingError):
        unmade.list_dir()


def test_ensure_root_makes_the_root_with_its_ancestors_and_may_be_repeated(storage: Storage):
    storage.ensure_root()

    assert storage.exists()
    assert storage.list_dir() == []


def test_the_url_opens_the_same_place_again(storage: Storage):
    storage.create("note", b"here")

    assert open_storage(storage.url).read_bytes("note", limit=10) == b"here"


@pytest.mark.parametrize("key", ["/etc/passwd", "../out", "a/../b", "a//b", ".", "a/.", "a/", "nul\0"])
def test_keys_that_could_leave_the_root_are_refused(storage: Storage, key: str):
    for call in (storage.locate, storage.size, storage.list_dir, storage.discard, storage.create_file):
        with pytest.raises(ConfigError):
            call(key)
    with pytest.raises(ConfigError):
        storage.create(key, b"")


def test_create_makes_the_directories_and_reads_back(storage: Storage):
    storage.create("generations/000001.json", b"{}")

    assert storage.read_bytes("generations/000001.json", limit=2) == b"{}"
    assert [(e.name, e.is_dir, e.size) for e in storage.list_dir("generations")] == [("000001.json", False, 2)]


def test_create_refuses_a_taken_key_and_keeps_the_first_bytes(storage: Storage):
    storage.create("generations/000001.json", b"first")

    with pytest.raises(KeyExistsError) as caught:
        storage.create("generations/000001.json", b"second")

    assert "000001.json" in str(caught.value)
    assert storage.read_bytes("generations/000001.json", limit=100) == b"first"
    assert len(storage.list_dir("generations")) == 1


def test_of_many_creators_exactly_one_wins_and_its_bytes_stay(storage: Storage):
    winners, start = [], threading.Barrier(8)

    def create(number: int) -> None:
        start.wait(10)
        try:
            storage.create("generations/000001.json", b"%d" % number * 1000)
        except KeyExistsError:
            return
        winners.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert len(winners) == 1
    assert storage.read_bytes("generations/000001.json", limit=1000) == b"%d" % winners[0] * 1000


def test_read_bytes_refuses_more_than_its_limit(storage: Storage):
    storage.create("big", b"12345")

    with pytest.raises(CorruptCheckpointError) as caught:
        storage.read_bytes("big", limit=4)

    assert (caught.value.expected, caught.value.found) == (4, 5)


@pytest.mark.parametrize("key", ["none", "none/deeper"])
def test_what_is_missing_is_a_missing_error_that_names_it(storage: Storage, key: str):
    for call in (
        storage.size,
        storage.list_dir,
        storage.open_reader,
        storage.modified_unix_s,
        lambda name: storage.read_bytes(name, limit=1),
    ):
        with pytest.raises(StorageMissingError, match="none"):
            call(key)


def test_a_directory_is_not_a_file_and_a_file_not_a_directory(storage: Storage):
    storage.make_dirs("directory")
    storage.create("file", b"x")

    with pytest.raises(CorruptCheckpointError):
        storage.read_bytes("directory", limit=1)
    with pytest.raises(CorruptCheckpointError):
        storage.size("directory")
    with pytest.raises(StorageMissingError):
        storage.list_dir("file")


@pytest.mark.parametrize("uncached", [False, True])
def test_a_reader_fills_any_range_also_from_several_threads(storage: Storage, uncached: bool):
    data = bytes(range(256)) * 1021  # Neither its size nor the ranges fit any block.
    write_file(storage, "file", data)
    ranges = [(0, len(data)), (4095, 2), (4096, 4096), (len(data) - 1, 1), (77, 200_000), (len(data), 0)]
    problems: list[object] = []

    with storage.open_reader("file", uncached=uncached) as reader:

        def read(offset: int, size: int) -> None:
            target = bytearray(size)
            reader.read_into(offset, memoryview(target))
            if bytes(target) != data[offset : offset + size]:
                problems.append((offset, size))

        threads = [threading.Thread(target=read, args=item) for item in ranges * 3]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)

    assert reader.size == len(data)
    assert not problems


@pytest.mark.parametrize("uncached", [False, True])
def test_a_read_beyond_the_end_is_corruption_with_both_sizes(storage: Storage, uncached: bool):
    write_file(storage, "file", b"x" * 5000)

    with storage.open_reader("file", uncached=uncached) as reader, pytest.raises(CorruptCheckpointError) as caught:
        reader.read_into(4000, memoryview(bytearray(1001)))

    assert (caught.value.expected, caught.value.found) == (5001, 5000)


def test_a_closed_reader_says_so(storage: Storage):
    write_file(storage, "file", b"x")
    reader = storage.open_reader("file")
    reader.close()
    reader.close()

    with pytest.raises(StorageError, match="closed"):
        reader.read_into(0, memoryview(bytearray(1)))


def test_a_writer_writes_out_of_order_and_cuts_the_padding(storage: Storage):
    writer = storage.create_file("file")
    writer.write_at(4, memoryview(b"5678padding"))
    writer.write_at(0, memoryview(b"1234"))
    writer.finish(8)

    assert storage.read_bytes("file", limit=100) == b"12345678"
    assert storage.size("file") == 8


def test_a_writer_takes_typed_and_empty_views(storage: Storage):
    writer = storage.create_file("file")
    writer.write_at(0, memoryview(b"12345678").cast("Q"))
    writer.write_at(8, memoryview(b""))
    writer.finish(8)

    assert storage.read_bytes("file", limit=8) == b"12345678"


def test_finish_refuses_a_file_of_which_a_part_was_never_written(storage: Storage):
    writer = storage.create_file("file")
    writer.write_at(0, memoryview(b"1234"))

    with pytest.raises(StorageError, match="expected 8 bytes, found 4"):
        writer.finish(8)

    with pytest.raises(StorageError):
        writer.finish(4)
    with pytest.raises(StorageError):
        writer.write_at(4, memoryview(b"5678"))


def test_abandon_never_raises_and_forbids_the_rest(storage: Storage):
    writer = storage.create_file("file")
    writer.abandon()
    writer.abandon()

    with pytest.raises(StorageError):
        writer.write_at(0, memoryview(b"x"))


def test_create_file_refuses_a_taken_name_and_a_missing_directory(storage: Storage):
    write_file(storage, "file", b"first")

    with pytest.raises(KeyExistsError):
        storage.create_file("file")
    with pytest.raises(StorageMissingError):
        storage.create_file("none/file")

    assert storage.read_bytes("file", limit=5) == b"first"


def test_a_link_is_one_more_name_and_each_outlives_the_other(storage: Storage):
    storage.make_dirs("old")
    storage.make_dirs("new")
    write_file(storage, "old/file", b"bytes")

    if not storage.link("old/file", "new/other name"):
        assert storage.list_dir("new") == [], "refused: nothing was made"
        pytest.skip("this storage has no second names")
    storage.sync_dir("new")
    assert storage.read_bytes("new/other name", limit=5) == b"bytes"
    storage.discard("old")
    assert storage.read_bytes("new/other name", limit=5) == b"bytes"
    assert storage.link("new/other name", "again")
    storage.discard("new")

    assert storage.read_bytes("again", limit=5) == b"bytes"


def test_a_link_replaces_nothing_and_needs_a_source_and_a_directory(storage: Storage):
    write_file(storage, "file", b"first")
    write_file(storage, "taken", b"other")
    storage.make_dirs("directory")

    if not storage.link("file", "second"):
        pytest.skip("this storage has no second names")
    for source, target, kind in (
        ("file", "taken", KeyExistsError),
        ("none", "new", StorageMissingError),
        ("file", "none/new", StorageMissingError),
        ("directory", "new", CorruptCheckpointError),
    ):
        with pytest.raises(kind):
            storage.link(source, target)

    assert storage.read_bytes("taken", limit=5) == b"other"
    assert [entry.name for entry in storage.list_dir()] == ["directory", "file", "second", "taken"]


@pytest.mark.parametrize("writer", ["create", "create_file", "create_file large", "stage_manifest", "link"])
def test_every_writer_refuses_a_name_that_is_taken_and_leaves_the_bytes_of_all_its_names(storage: Storage, writer: str):
    """A name may be one of several of a file that other checkpoints share: nothing is ever written through it."""
    storage.make_dirs("old")
    storage.make_dirs("new")
    write_file(storage, "old/file", b"shared")
    name = "new/manifest.json"
    if not storage.link("old/file", name):
        pytest.skip("this storage has no second names")
    write_file(storage, "other", b"x" * 6)

    with pytest.raises(KeyExistsError):
        {
            "create": lambda: storage.create(name, b"y" * 6),
            "create_file": lambda: storage.create_file(name),
            "create_file large": lambda: storage.create_file(name, is_large=True),
            "stage_manifest": lambda: storage.stage_manifest("new", b"y" * 6),
            "link": lambda: storage.link("other", name),
        }[writer]()

    assert storage.read_bytes("old/file", limit=6) == b"shared"
    assert storage.read_bytes(name, limit=6) == b"shared"


def test_list_dir_is_sorted_and_tells_directories_from_files(storage: Storage):
    storage.create("b", b"22")
    storage.make_dirs("a/inner")
    storage.create("c", b"")

    assert [(e.name, e.is_dir, e.size) for e in storage.list_dir()] == [
        ("a", True, 0),
        ("b", False, 2),
        ("c", False, 0),
    ]


def test_publish_makes_the_staged_attempt_the_checkpoint(storage: Storage):
    staging = stage(storage)

    storage.publish(staging, NAME, b"manifest")

    assert storage.read_bytes(f"{NAME}/manifest.json", limit=100) == b"manifest"
    assert storage.read_bytes(f"{NAME}/{ATTEMPT}/rank00000.safetensors", limit=100) == b"tensors"
    assert [entry.name for entry in storage.list_dir()] == [NAME]


def test_publish_refuses_a_taken_name_and_changes_nothing(storage: Storage):
    storage.publish(stage(storage), NAME, b"manifest")
    other = stage(storage, b"other manifest", attempt="f" * 32)

    with pytest.raises(KeyExistsError):
        storage.publish(other, NAME, b"other manifest")

    assert storage.read_bytes(f"{NAME}/manifest.json", limit=100) == b"manifest"
    assert storage.read_bytes(f"{other}/manifest.json", limit=100) == b"other manifest"


def test_publish_does_not_replace_an_empty_directory_or_a_file(storage: Storage):
    staging = stage(storage)
    storage.make_dirs(NAME)
    with pytest.raises(KeyExistsError, match="empty directory"):
        storage.publish(staging, NAME, b"manifest")
    assert [entry for entry in storage.list_dir(NAME) if not entry.is_dir] == []

    storage.discard(NAME)
    storage.create(NAME, b"a file")
    with pytest.raises(KeyExistsError):
        storage.publish(staging, NAME, b"manifest")
    assert storage.read_bytes(NAME, limit=10) == b"a file"


def test_publish_of_a_swept_attempt_is_a_missing_error(storage: Storage):
    staging = stage(storage)
    storage.discard(staging)

    with pytest.raises(StorageMissingError, match="swept"):
        storage.publish(staging, NAME, b"manifest")

    assert storage.list_dir() == []


def test_writing_into_a_swept_attempt_is_a_missing_error(storage: Storage):
    staging = storage.staging_key(NAME, ATTEMPT)
    storage.make_dirs(f"{staging}/{ATTEMPT}")
    writer = storage.create_file(f"{staging}/{ATTEMPT}/rank00000.safetensors")
    storage.discard(staging)
    writer.write_at(0, memoryview(b"late"))
    writer.finish(4)

    with pytest.raises(StorageMissingError):
        storage.create_file(f"{staging}/{ATTEMPT}/rank00000.sums")
    with pytest.raises(StorageMissingError):
        storage.stage_manifest(staging, b"manifest")

    # What was written too late is in no directory, or still shows as the attempt that it belongs to.
    assert {entry.name for entry in storage.list_dir()} <= {staging}
    storage.discard(staging)
    assert storage.list_dir() == []


def test_files_of_an_attempt_are_listed_read_and_swept_by_another_storage_of_the_same_place(storage: Storage):
    staging = stage(storage)
    other = open_storage(storage.url)

    assert [(entry.name, entry.is_dir) for entry in other.list_dir()] == [(staging, True)]
    assert {entry.name for entry in other.list_dir(staging)} == {ATTEMPT, "manifest.json"}
    assert other.read_bytes(f"{staging}/{ATTEMPT}/rank00000.safetensors", limit=7) == b"tensors"
    assert other.modified_unix_s(f"{staging}/{ATTEMPT}/rank00000.safetensors") > 0
    with pytest.raises(StorageMissingError):
        other.list_dir(NAME)
    other.discard(staging)
    assert other.list_dir() == []
    with pytest.raises(StorageMissingError, match="swept"):
        storage.publish(staging, NAME, b"manifest")


def test_deleting_a_checkpoint_leaves_another_attempt_at_its_name_alone(storage: Storage):
    storage.publish(stage(storage), NAME, b"manifest")
    other = stage(storage, b"other manifest", attempt="f" * 32)

    storage.discard(NAME)

    assert storage.read_bytes(f"{other}/{'f' * 32}/rank00000.safetensors", limit=7) == b"tensors"
    storage.publish(other, NAME, b"other manifest")
    assert [entry.name for entry in storage.list_dir()] == [NAME]
    assert storage.read_bytes(f"{NAME}/manifest.json", limit=100) == b"other manifest"


def test_sweeping_another_attempt_at_its_name_leaves_a_checkpoint_alone(storage: Storage):
    other = stage(storage, b"other manifest", attempt="f" * 32)
    storage.publish(stage(storage), NAME, b"manifest")

    storage.discard(other)

    assert [entry.name for entry in storage.list_dir()] == [NAME]
    assert storage.read_bytes(f"{NAME}/{ATTEMPT}/rank00000.safetensors", limit=7) == b"tensors"


def test_discard_removes_trees_and_files_and_does_nothing_twice(storage: Storage):
    storage.publish(stage(storage), NAME, b"manifest")
    storage.create("pins/x", b"{}")

    storage.discard(NAME)
    storage.discard("pins/x")
    storage.discard(NAME)
    storage.discard("pins/x")
    storage.discard("none/deeper")

    # A directory may go with its last file, where directories are not things of their own.
    assert {entry.name for entry in storage.list_dir()} <= {"pins"}
    for entry in storage.list_dir():
        assert storage.list_dir(entry.name) == []


def test_discard_goes_over_an_announcement_and_not_at_all_without_it(storage: Storage):
    storage.publish(stage(storage), NAME, b"manifest")
    announced = f".trash-{'b' * 32}/{NAME}"

    with pytest.raises(StorageMissingError, match="trash"):
        storage.discard(NAME, onto=announced)
    assert storage.read_bytes(f"{NAME}/manifest.json", limit=100) == b"manifest"

    storage.make_dirs(announced)
    storage.discard(NAME, onto=announced)
    storage.discard(NAME, onto=announced)
    storage.discard(announced.partition("/")[0])
    assert storage.list_dir() == []


def test_free_bytes_is_a_number_or_unknown(storage: Storage):
    free = storage.free_bytes()

    assert free is None or free > 0


def test_a_root_that_cannot_be_made_is_known_before_anything_is_written(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigError, match="expected a directory"):
        open_storage(str(tmp_path / "file" / "run")).ensure_writable()
    LocalStorage(str(tmp_path / "new" / "run")).ensure_writable()

    assert sorted(os.listdir(tmp_path)) == ["file"]
