"""Functions whose values are part of the format: computed once, compared for ever."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from dckpt.format.checksum import block_checksums, digest_bytes
from dckpt.format.streams import rekey_stream, stream_digest, stream_key
from dckpt.state.rng import capture_rng


def pattern(size: int) -> bytes:
    numbers = np.arange(size, dtype=np.uint64) * np.uint64(2654435761)
    return (numbers >> np.uint64(7)).astype(np.uint8).tobytes()


@pytest.mark.parametrize(
    ("size", "digest", "blocks"),
    [
        (0, "99aa06d3014798d86001c324468d497f", "e3b0c44298fc1c149afbf4c8996fb924"),
        (1, "de68429b8afe28ce97cda390d38d6d2b", "851bd216fe6c1df74188531db7a0e68d"),
        (1000, "285a79d0067dbd26901a600a51cdd146", "8f0313ce0f836f45de07db1cc9fc1137"),
        (65536, "e703fb99bb6f7b728df251ebe1e7f531", "fff362da0e8d8946013b327d004d9571"),
        (65537, "aebf8a2556e025714ae4a4100ff3cbca", "76ac85da59b88f2ea0e6fda18d249e57"),
        (2**24, "3b8ae115198a43b50fd0ca36060a1db6", "9e896a1088d8380474b45d08c2d604bd"),
        (2**24 + 1, "ea8e07195a9f5425bdae012585b09243", "01de6dad4bcc34e8986fdae78585e5ba"),
        (40_000_000, "2144e10bd2af3179e4d3fff0c652957a", "62c4c541d3588b61b9626f63039a8d03"),
    ],
)
def test_a_files_digest_and_its_block_checksums_never_change(size, digest, blocks):
    data = pattern(size)
    assert digest_bytes(data) == digest
    assert hashlib.sha256(block_checksums(data).astype("<u8").tobytes()).hexdigest()[:32] == blocks


PLACE = {"run_seed": 1234567890123, "generation": 3, "step": 1200, "coordinates": {"tp": 0, "dp": 2}}


def test_the_key_of_a_derived_stream_never_changes():
    text = b"dckpt-rng-v1|1234567890123|torch|3|1200|dp=2,tp=0"
    assert stream_key("torch", **PLACE) == hashlib.blake2b(text, digest_size=32).digest()
    assert stream_key("torch", **PLACE).hex() == "0dc68d3f5d706a9940fe7cebcb3f51675c1b9bfbd9311eca27b7d7bd6da0159d"


@pytest.mark.parametrize(
    ("stream", "digest"),
    [
        ("python", "eefb6ac20d3e01b2504b5880c72a68cc"),
        ("numpy", "eeb3cc9b9fe5c6bcd9c67510928bf8f7"),
        ("torch", "e376494779a4a2e27418e2ba57f7437c"),
        ("cuda", "e21c6eef5daa2aa5f40c88bb42c41602"),
        ("generator:noise", "3d31ffdbd1e309705cf3cdc0cf65e77b"),
        ("generator:t", "a1ed6410ff4217802d9cd2a0ab1bf9ae"),
    ],
)
def test_a_derived_stream_never_changes(stream, digest):
    streams = capture_rng({"noise": np.random.default_rng(0), "t": torch.Generator()})
    assert stream_digest(rekey_stream(stream, like=streams.get(stream), **PLACE)) == digest
