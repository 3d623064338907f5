"""A file of an earlier checkpoint becomes one of a new attempt: linked, referred to, or written after all."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from dckpt.blocks.source import ImageSource
from dckpt.blocks.take_over import Place, Reusable, take_over
from dckpt.blocks.write import WriterPool, write_shard_file
from dckpt.engine.reuse import reusable_files
from dckpt.errors import KeyExistsError, StorageError
from dckpt.format.checksum import Sums, parse_sums
from dckpt.format.manifest import FileEntry
from dckpt.storage.local import LocalStorage
from dckpt.storage.posix import Posix
from tests.support.recording import FailingPosix

OLD, NEW = "step-0000000100.g0001", "step-0000000200.g0001"
ATTEMPT, STAGING = "a" * 32, f".tmp-{'b' * 32}"
NAME = "rank00000-1.safetensors"
DATA = bytes(range(256)) * 1000


class NoLinks(Posix):
    def link(self, source: str, target: str) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


@pytest.fixture(name="found")
def _found(tmp_path: Path) -> Reusable:
    """A file that an earlier checkpoint wrote, in the run at `tmp_path`."""
    storage = LocalStorage(tmp_path)
    storage.make_dirs(f"{OLD}/{ATTEMPT}")
    storage.make_dirs(STAGING)
    source = ImageSource(memoryview(DATA))
    shard, sums = write_shard_file(storage, f"{OLD}/{ATTEMPT}", ATTEMPT, 0, NAME, source, lambda _: None, WriterPool(1))
    return Reusable(OLD, shard, sums)


def sums_of(tmp_path: Path, found: Reusable) -> Sums:
    return parse_sums((tmp_path / found.sums_key).read_bytes(), key="sums")


def take(storage: LocalStorage, found: Reusable, sums: Sums, name: str = NAME, rank: int = 0) -> list[FileEntry] | None:
    return take_over(storage, found, sums, Place(STAGING, "b" * 32, rank, name), may_refer={OLD})


def staged(tmp_path: Path) -> list[str]:
    return sorted(os.listdir(tmp_path / STAGING))


def test_a_link_may_have_another_name_and_rank(tmp_path: Path, found: Reusable):
    entries = take(LocalStorage(tmp_path), found, sums_of(tmp_path, found), "rank00003-2.safetensors", rank=3)

    assert entries is not None
    shard, sums = entries
    assert (shard.path, shard.rank, shard.checkpoint, shard.reused) == (
        f"{'b' * 32}/rank00003-2.safetensors", 3, None, 1,
    )  # fmt: skip
    assert (sums.path, sums.rank, sums.digest) == (f"{'b' * 32}/rank00003-2.sums", 3, found.sums.digest)
    assert staged(tmp_path) == ["rank00003-2.safetensors", "rank00003-2.sums"]
    for entry, key in ((shard, found.shard_key), (sums, found.sums_key)):
        assert (tmp_path / STAGING / entry.name).samefile(tmp_path / key)


def test_without_links_it_is_referred_to_under_its_own_name_if_it_may(tmp_path: Path, found: Reusable):
    storage, sums = LocalStorage(tmp_path, NoLinks()), sums_of(tmp_path, found)

    entries = take(storage, found, sums)

    assert entries is not None
    assert [(e.path, e.checkpoint, e.reused) for e in entries] == [
        (found.shard.path, OLD, 1),
        (found.sums.path, OLD, 0),
    ]
    assert take(storage, found, sums, "rank00000-2.safetensors") is None
    assert take_over(storage, found, sums, Place(STAGING, "b" * 32, 0, NAME), may_refer=()) is None
    assert staged(tmp_path) == []


def test_a_file_whose_chunks_have_other_fingerprints_now_is_not_referred_to(tmp_path: Path, found: Reusable):
    """The same bytes as another cut of another tensor: a reference would take over the wrong fingerprints."""
    sums = replace(sums_of(tmp_path, found), fingerprints=(1,))

    assert take(LocalStorage(tmp_path, NoLinks()), found, sums) is None
    entries = take(LocalStorage(tmp_path), found, sums)
    assert entries is not None
    assert (tmp_path / STAGING / entries[0].name).samefile(tmp_path / found.shard_key)
    assert parse_sums((tmp_path / STAGING / entries[1].name).read_bytes(), key="sums") == sums


@pytest.mark.parametrize("damage", ["gone", "cut short", "a directory", "a symbolic link"])
@pytest.mark.parametrize("posix", [Posix, NoLinks])
def test_what_is_not_there_as_it_was_is_written_anew(tmp_path: Path, found: Reusable, damage: str, posix: type[Posix]):
    sums, path = sums_of(tmp_path, found), tmp_path / found.shard_key
    path.unlink()
    if damage == "cut short":
        path.write_bytes(DATA[:-1])
    elif damage == "a directory":
        path.mkdir()
    elif damage == "a symbolic link":
        path.symlink_to("/etc/hostname")

    assert take(LocalStorage(tmp_path, posix()), found, sums) is None
    assert staged(tmp_path) == []


@pytest.mark.parametrize("damage", ["gone", "cut short", "another digest"])
def test_sums_that_are_not_the_same_are_written_beside_the_link(tmp_path: Path, found: Reusable, damage: str):
    sums, path = sums_of(tmp_path, found), tmp_path / found.sums_key
    whole = path.read_bytes()
    if damage == "another digest":
        found = Reusable(OLD, found.shard, FileEntry(found.sums.path, found.sums.size, "0" * 32, "sums", 0))
    else:
        path.unlink()
        if damage == "cut short":
            path.write_bytes(whole[:-1])

    assert take(LocalStorage(tmp_path), found, sums) is not None

    written = tmp_path / STAGING / "rank00000-1.sums"
    assert written.read_bytes() == whole
    assert written.stat().st_nlink == 1


def test_a_link_that_fails_condemns_the_attempt(tmp_path: Path, found: Reusable):
    storage = LocalStorage(tmp_path, FailingPosix(kind="link", errno=errno.EIO, at=1))

    with pytest.raises(StorageError, match="link"):
        take(storage, found, sums_of(tmp_path, found))


def test_a_name_that_is_taken_is_refused(tmp_path: Path, found: Reusable):
    (tmp_path / STAGING / NAME).write_bytes(b"somebody's")

    with pytest.raises(KeyExistsError):
        take(LocalStorage(tmp_path), found, sums_of(tmp_path, found))
    assert (tmp_path / STAGING / NAME).read_bytes() == b"somebody's"


def test_what_is_due_to_be_written_anew_is_not_offered():
    def entries(reused: int, checkpoint: str | None = None) -> list[FileEntry]:
        path = f"{ATTEMPT}/rank0000{reused}-1"
        return [
            FileEntry(f"{path}.safetensors", 100, f"{reused:032x}", "shard", reused, checkpoint, reused),
            FileEntry(f"{path}.sums", 64, f"{reused:032x}", "sums", reused, checkpoint),
        ]

    offered = reusable_files(NEW, [*entries(0), *entries(1, OLD), *entries(2), *entries(3)], rewrite_every=3)

    assert {digest for _, digest in offered.files} == {f"{0:032x}", f"{1:032x}"}
    assert offered.places == {NEW, OLD}
    assert offered.sizes == {100}
    assert not reusable_files(NEW, entries(0), rewrite_every=1).files


def test_of_several_files_with_one_content_the_one_of_the_same_name_is_found():
    files = []
    for rank in range(3):
        path = f"{ATTEMPT}/rank0000{rank}-1"
        files.append(FileEntry(f"{path}.safetensors", 100, "c" * 32, "shard", rank))
        files.append(FileEntry(f"{path}.sums", 64, "d" * 32, "sums", rank))
    offered = reusable_files(OLD, files, rewrite_every=10)

    for name in ("rank00001-1.safetensors", "rank00002-1.safetensors"):
        found = offered.find(100, "c" * 32, name)
        assert found is not None
        assert found.shard.name == name
    other = offered.find(100, "c" * 32, "rank00007-1.safetensors")
    assert other is not None
    assert other.shard_key == f"{OLD}/{ATTEMPT}/rank00000-1.safetensors"
    assert offered.find(100, "e" * 32, "rank00001-1.safetensors") is None
    assert offered.find(101, "c" * 32, "rank00001-1.safetensors") is None
