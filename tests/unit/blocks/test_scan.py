"""`scan` reads whole files in pieces and names every range of blocks that differs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dckpt.blocks.scan import PIECE_BYTES, FileScan, ScanItem, scan_file, scan_files
from dckpt.errors import StorageMissingError
from dckpt.format.checksum import BLOCK_BYTES, Sums, block_checksums, digest_bytes
from dckpt.storage.local import LocalStorage


def item_of(data: bytes, key: str = "file", *, with_sums: bool = True) -> ScanItem:
    digest = digest_bytes(data)
    return ScanItem(key, digest, Sums(len(data), digest, block_checksums(data)) if with_sums else None)


@pytest.fixture(scope="module")
def content() -> bytes:
    """More than two pieces, ending in the middle of a block."""
    return np.random.default_rng(1).bytes(2 * PIECE_BYTES + 3 * BLOCK_BYTES + 17)


def test_a_good_file_of_several_pieces_gives_its_digest_and_no_ranges(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    read: list[int] = []

    scan = scan_file(LocalStorage(str(tmp_path)), item_of(content), on_bytes=read.append)

    assert scan == FileScan("file", len(content), digest_bytes(content), ())
    assert sum(read) == len(content)


def test_bad_blocks_are_ranges_and_neighbours_are_one(tmp_path: Path, content: bytes) -> None:
    data = bytearray(content)
    boundary = PIECE_BYTES // BLOCK_BYTES
    for block in (0, boundary - 1, boundary, len(content) // BLOCK_BYTES):
        data[block * BLOCK_BYTES + 5] ^= 1
    (tmp_path / "file").write_bytes(data)

    scan = scan_file(LocalStorage(str(tmp_path)), item_of(content))

    last = len(content) // BLOCK_BYTES * BLOCK_BYTES
    assert scan.bad_ranges == (
        (0, BLOCK_BYTES),
        (PIECE_BYTES - BLOCK_BYTES, PIECE_BYTES + BLOCK_BYTES),
        (last, len(content)),
    )
    assert not scan.is_unstable


def test_without_sums_only_the_digest_tells(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"other")

    scan = scan_file(LocalStorage(str(tmp_path)), item_of(b"bytes", with_sums=False))

    assert scan.bad_ranges is None
    assert scan.digest != digest_bytes(b"bytes")


def test_an_empty_file_and_a_longer_one_are_judged_without_a_crash(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "longer").write_bytes(bytes(BLOCK_BYTES + 1))
    storage = LocalStorage(str(tmp_path))

    assert scan_file(storage, item_of(b"", "empty")).bad_ranges == ()
    assert scan_file(storage, item_of(bytes(BLOCK_BYTES), "longer")).bad_ranges == ((BLOCK_BYTES, BLOCK_BYTES + 1),)


def test_many_files_are_all_scanned_and_an_error_belongs_to_its_file(tmp_path: Path) -> None:
    items = [item_of(b"%d" % number, f"file{number}") for number in range(20)]
    for number in range(20):
        if number != 7:
            (tmp_path / f"file{number}").write_bytes(b"%d" % number)

    results = {item.key: result for item, result in scan_files(LocalStorage(str(tmp_path)), items, threads=3)}

    assert isinstance(results.pop("file7"), StorageMissingError)
    assert len(results) == 19
    assert all(isinstance(result, FileScan) and result.bad_ranges == () for result in results.values())
