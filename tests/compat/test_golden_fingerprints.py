"""The fingerprints of every golden checkpoint are those of its tensors, whoever wrote it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from dckpt.format.checksum import parse_sums
from dckpt.format.fingerprint import box_runs, fold_box
from dckpt.format.index import parse_index
from dckpt.format.manifest import parse_manifest
from dckpt.format.shard_file import DTYPES
from tests.support import golden

CHECKPOINTS = sorted(path.parent for path in golden.DATA.rglob("manifest.json"))


def test_there_are_some_of_each_kind():
    assert {path.parent.name for path in CHECKPOINTS} == {"single", "fsdp", "alone"}


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda path: "-".join(path.parts[-3:-1]))
def test_each_chunk_has_the_fingerprint_of_its_bytes(checkpoint: Path):
    manifest = parse_manifest((checkpoint / "manifest.json").read_bytes(), key="manifest")
    index = parse_index((checkpoint / manifest.index_entry.path).read_bytes(), key="index")
    seen = 0
    for shard in manifest.shard_entries:
        data = memoryview((checkpoint / shard.path).read_bytes())
        sums = parse_sums((checkpoint / manifest.sums_entry(shard).path).read_bytes(), key="sums")
        chunks = index.located_chunks(index.files.index(shard.name))
        for (name, item, chunk), value in zip(chunks, sums.fingerprints, strict=True):
            size = item * math.prod(chunk.sizes)
            meta = index.meta(name)
            assert item == DTYPES[meta.dtype]
            runs = box_runs(meta.shape, chunk.offsets, chunk.sizes, item)
            assert value == fold_box(data[chunk.begin : chunk.begin + size], 0, runs), name
            seen += 1
    assert seen
