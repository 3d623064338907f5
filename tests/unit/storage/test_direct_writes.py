"""Large files go around the page cache where the file system takes it, and arrive whole where it does not."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from dckpt.blocks.buffer import ImageBuffer
from dckpt.blocks.source import ImageSource
from dckpt.blocks.write import WriterPool, write_shard_file
from dckpt.errors import StorageError, StorageFullError
from dckpt.format.checksum import digest_bytes, parse_sums
from dckpt.storage.local import LocalStorage
from dckpt.storage.posix import Posix

SIZE = 40 * 2**20 + 12_345


class CountingPosix(Posix):
    """Counts the bytes written on descriptors with O_DIRECT and on others; can refuse direct calls."""

    def __init__(self, *, refuse_open: int = 0, refuse_write: int = 0) -> None:
        self.direct: set[int] = set()
        self.direct_bytes = self.plain_bytes = 0
        self.refused = 0
        self._refuse_open, self._refuse_write = refuse_open, refuse_write

    def open(self, path, flags, *, dir_fd=None):
        is_direct = bool(flags & os.O_DIRECT)
        if is_direct and self._refuse_open:
            self.refused += 1
            raise OSError(self._refuse_open, os.strerror(self._refuse_open))
        fd = super().open(path, flags, dir_fd=dir_fd)
        (self.direct.add if is_direct else self.direct.discard)(fd)
        return fd

    def pwrite(self, fd, data, offset):
        if fd not in self.direct:
            self.plain_bytes += len(data)
            return super().pwrite(fd, data, offset)
        if self._refuse_write:
            self.refused += 1
            raise OSError(self._refuse_write, os.strerror(self._refuse_write))
        self.direct_bytes += len(data)
        return super().pwrite(fd, data, offset)


def _image(size: int = SIZE) -> memoryview:
    (image,) = ImageBuffer().take([size])
    np.frombuffer(image, dtype=np.uint8)[:] = np.random.default_rng(3).integers(0, 256, size, dtype=np.uint8)
    return image


def _write(root, posix: Posix, image: memoryview):
    storage = LocalStorage(str(root), posix)
    storage.ensure_root()
    storage.make_dirs("a")
    done: list[int] = []
    source = ImageSource(image)
    entries = write_shard_file(storage, "a", "attempt", 0, "rank00000.safetensors", source, done.append, WriterPool(3))
    assert sum(done) == len(image)
    return entries


def _ensure_whole(root, entries, image: memoryview) -> None:
    data = (root / "a" / "rank00000.safetensors").read_bytes()
    assert data == bytes(image)
    assert entries[0].digest == digest_bytes(data)
    sums = parse_sums((root / "a" / "rank00000.sums").read_bytes(), key="sums")
    assert (sums.file_bytes, sums.digest) == (len(image), entries[0].digest)


def _takes_direct(root) -> bool:
    try:
        os.close(os.open(root / "probe", os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def test_whole_blocks_go_around_the_page_cache_and_only_the_tail_through_it(tmp_path):
    if not _takes_direct(tmp_path):
        pytest.skip("this file system has no O_DIRECT")
    posix, image = CountingPosix(), _image()

    entries = _write(tmp_path, posix, image)

    _ensure_whole(tmp_path, entries, image)
    assert posix.direct_bytes == SIZE // 4096 * 4096


@pytest.mark.parametrize("refusal", [{"refuse_open": errno.EINVAL}, {"refuse_write": errno.EINVAL}])
def test_a_file_system_that_refuses_direct_writes_gets_plain_ones(tmp_path, refusal):
    posix, image = CountingPosix(**refusal), _image()

    entries = _write(tmp_path, posix, image)

    _ensure_whole(tmp_path, entries, image)
    assert posix.refused
    assert posix.direct_bytes == 0


@pytest.mark.parametrize(("code", "kind"), [(errno.EIO, StorageError), (errno.ENOSPC, StorageFullError)])
def test_any_other_error_of_a_direct_write_condemns_the_file(tmp_path, code, kind):
    posix = CountingPosix(refuse_write=code)

    with pytest.raises(kind) as caught:
        _write(tmp_path, posix, _image())

    assert caught.value.code == code
    assert posix.refused


def test_a_small_file_is_written_plainly(tmp_path):
    posix, image = CountingPosix(), _image(100_000)

    entries = _write(tmp_path, posix, image)

    _ensure_whole(tmp_path, entries, image)
    assert not posix.direct


def test_unaligned_memory_is_written_plainly_and_whole(tmp_path):
    image = _image(SIZE + 1)[1:]
    posix = CountingPosix()

    entries = _write(tmp_path, posix, image)

    _ensure_whole(tmp_path, entries, image)
    assert posix.direct_bytes == 0


def test_a_file_system_in_memory_gets_plain_writes(tmp_path):
    """It takes O_DIRECT and copies all the same."""

    class InMemory(CountingPosix):
        def file_system(self, path):
            assert CountingPosix.file_system(self, path)
            return "tmpfs"

    posix, image = InMemory(), _image()
    entries = _write(tmp_path, posix, image)

    _ensure_whole(tmp_path, entries, image)
    assert not posix.direct
