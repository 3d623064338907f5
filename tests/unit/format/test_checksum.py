"""Block checksums, file digests and sums files."""

import random
import struct
from dataclasses import replace

import numpy as np
import pytest
import xxhash

from dckpt.errors import CorruptCheckpointError, FormatVersionError
from dckpt.format.checksum import (
    BLOCK_BYTES,
    SEGMENT_BYTES,
    FileHasher,
    Sums,
    block_checksums,
    combine_digests,
    digest_bytes,
    encode_sums,
    parse_sums,
    segment_digests,
    sums_file_bytes,
)
from tests.unit.format.builders import a_sums, forge_trailer


@pytest.fixture(scope="module")
def content() -> bytes:
    """Two segments and a bit."""
    return random.Random(1).randbytes(2 * SEGMENT_BYTES + 3 * BLOCK_BYTES + 17)


def test_known_values_of_the_format():
    """These values are the format: another implementation must get the same."""
    data = bytes(range(256)) * 300

    assert digest_bytes(b"") == "99aa06d3014798d86001c324468d497f"
    assert digest_bytes(data) == xxhash.xxh3_128(xxhash.xxh3_128(data).digest()).hexdigest()
    assert block_checksums(data).tolist() == [
        xxhash.xxh3_64(data[:65536]).intdigest(),
        xxhash.xxh3_64(data[65536:]).intdigest(),
    ]
    assert block_checksums(b"").tolist() == []


def test_segments_hashed_apart_give_the_digest_of_the_whole(content):
    first = segment_digests(memoryview(content)[:SEGMENT_BYTES])
    rest = segment_digests(memoryview(content)[SEGMENT_BYTES:])

    assert combine_digests(first + rest) == digest_bytes(content)


@pytest.mark.parametrize("seed", range(3))
def test_a_stream_in_pieces_of_any_size_gives_the_same_digest_and_checksums(content, seed):
    rng = random.Random(seed)
    sizes = [0, 1, 100, BLOCK_BYTES - 1, BLOCK_BYTES, 3 * BLOCK_BYTES, SEGMENT_BYTES, SEGMENT_BYTES + 5, 10**6]
    hasher = FileHasher()
    begin = 0
    while begin < len(content):
        size = rng.choice(sizes)
        hasher.update(memoryview(content)[begin : begin + size])
        begin += size

    assert hasher.file_bytes == len(content)
    assert hasher.digest() == digest_bytes(content)
    assert np.array_equal(hasher.checksums(), block_checksums(content))


def test_asking_for_the_digest_does_not_disturb_the_stream():
    hasher = FileHasher()
    assert hasher.digest() == digest_bytes(b"")
    assert hasher.checksums().tolist() == []
    for piece in (b"a" * 10, b"b" * BLOCK_BYTES, b"c"):
        hasher.update(piece)
        hasher.digest()
        hasher.checksums()
    whole = b"a" * 10 + b"b" * BLOCK_BYTES + b"c"

    assert hasher.digest() == digest_bytes(whole)
    assert np.array_equal(hasher.checksums(), block_checksums(whole))


def test_arrays_of_any_item_size_are_hashed_by_their_bytes():
    array = np.arange(50_000, dtype=np.float64)

    assert digest_bytes(memoryview(array)) == digest_bytes(array.tobytes())
    assert np.array_equal(block_checksums(memoryview(array)), block_checksums(array.tobytes()))


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 200_000])
def test_sums_round_trip(size):
    sums = a_sums(size)
    data = encode_sums(sums)

    assert len(data) == sums_file_bytes(size, 3)
    assert parse_sums(data, key="rank00000.sums") == sums
    assert parse_sums(memoryview(bytearray(data)), key="rank00000.sums") == sums


def test_a_stranger_reads_the_sums_file_by_the_table():
    sums = a_sums(200_000)
    data = encode_sums(sums)
    magic, major, minor, block, size, count = struct.unpack_from("<8sHHIQQ", data)

    assert (magic, major, minor, block, size, count) == (b"\x89dckSUM\n", 1, 0, 65536, 200_000, 4)
    assert data[32:48].hex() == sums.digest
    assert list(struct.unpack_from("<4Q", data, 48)) == sums.blocks.tolist()
    assert data[80:128] == b"\xff" * 16 + bytes(16) + bytes.fromhex("00000000efcdab896745230100000000")
    assert len(data) == 136


def test_sums_without_fingerprints_are_whole():
    sums = replace(a_sums(200_000), fingerprints=())

    assert parse_sums(encode_sums(sums), key="rank00000.sums") == sums
    assert sums != a_sums(200_000)


def test_half_a_fingerprint_is_refused():
    body = encode_sums(a_sums())[:-16]
    with pytest.raises(CorruptCheckpointError) as caught:
        parse_sums(forge_trailer(body), key="rank00000.sums")

    assert caught.value.field == "size"


@pytest.mark.parametrize(
    ("offset", "kind", "value", "field"),
    [
        (0, "8s", b"\x89dckIDX\n", "magic"),
        (8, "H", 0, "version"),
        (12, "I", 4096, "block size"),
        (16, "Q", 2**63, "file size"),
        (16, "Q", 10**6, "size"),
        (24, "Q", 5, "block count"),
        (24, "Q", 2**63, "block count"),
    ],
)
def test_a_forged_field_is_named(offset, kind, value, field):
    body = bytearray(encode_sums(a_sums())[:-8])
    struct.pack_into(f"<{kind}", body, offset, value)
    with pytest.raises(CorruptCheckpointError) as caught:
        parse_sums(forge_trailer(bytes(body)), key="rank00000.sums")

    assert (caught.value.key, caught.value.field) == ("rank00000.sums", field)


def test_a_newer_major_version_is_not_called_damage():
    body = bytearray(encode_sums(a_sums())[:-8])
    struct.pack_into("<H", body, 8, 2)
    with pytest.raises(FormatVersionError, match="Upgrade"):
        parse_sums(forge_trailer(bytes(body)), key="rank00000.sums")


def test_sums_compare_by_content():
    assert a_sums(100) != a_sums(101)
    assert a_sums(100) != "sums"
    assert hash(a_sums(100)) == hash(a_sums(100))
    assert Sums(0, digest_bytes(b""), block_checksums(b""), a_sums(0).fingerprints) == a_sums(0)
