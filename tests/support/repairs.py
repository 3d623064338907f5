"""A run of two ranks to damage and repair: weights, moments, a frozen embedding, valid random streams; without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dckpt.catalog.catalog import Catalog
from dckpt.format.manifest import Manifest
from dckpt.format.streams import rekey_stream
from dckpt.format.values import dump_json
from dckpt.storage.local import LocalStorage
from tests.support.runs import FULL_VALUES, training_tensors, write_checkpoint

WORLD = 2
STEP = "step-0000000020.g0001"
REPAIRED = "step-0000000020.g0002"

OPTIM: Mapping[str, Any] = {
    "is_mapping": False,
    "optimizers": {
        "": {
            "class": "AdamW",
            "groups": [{"names": ["weight", "bias"], "options": {"lr": 0.001, "initial_lr": 0.01}}],
            "shared": {},
            "states": [
                {
                    "params": ["weight", "bias"],
                    "tree": {
                        "exp_avg": {"$t": "tensor", "v": "exp_avg"},
                        "step": {"$t": "tensor", "v": "step"},
                    },
                    "layout": {"exp_avg": {}, "step": {}},
                }
            ],
        }
    },
}
VALUES = {**FULL_VALUES, "optim": OPTIM}


def streams_of(rank: int, *, step: int = 0) -> dict[str, Any]:
    """Python's stream equal on all ranks, numpy's and torch's of each rank its own."""
    places = {"python": {}, "numpy": {"rank": rank}, "torch": {"rank": rank}}
    return {
        stream: rekey_stream(stream, run_seed=7, generation=1, step=step, coordinates=place)
        for stream, place in places.items()
    }


AXES = {"python": (), "numpy": ("rank",), "torch": ("rank",)}


def tensors(seed: int = 0, *, has_rng: bool = True, size: int = 8192) -> dict[str, np.ndarray]:
    """Weights of 4 blocks a rank, their moments, a frozen embedding and valid random streams."""
    found = training_tensors(world_size=0, size=size, seed=seed)
    found["model.embedding"] = np.random.default_rng(99).standard_normal((size, 8)).astype(np.float32)
    for rank in range(WORLD if has_rng else 0):
        found[f"rank.{rank}.values.rng"] = np.frombuffer(dump_json(streams_of(rank)), np.uint8)
    return found


def save(storage: LocalStorage, step: int, seed: int, **options: Any) -> Manifest:
    options = {"values": VALUES, "rng": AXES, **options}
    return write_checkpoint(storage, step, 1, options.pop("tensors", tensors(seed)), world_size=WORLD, **options)


def read_tensor(root: Path, name: str, tensor: str) -> bytes:
    """Its bytes over all files in order of the files."""
    storage = LocalStorage(str(root))
    catalog = Catalog(storage)
    manifest, _ = catalog.read_manifest(name)
    index = catalog.read_index(name, manifest)
    files = {entry.name: entry for entry in manifest.shard_entries}
    found = b""
    for chunk in index.chunks(tensor):
        data = storage.read_bytes(files[index.files[chunk.file]].key_in(name), limit=2**30)
        found += data[chunk.begin : chunk.begin + index.meta(tensor).chunk_nbytes(chunk)]
    return found
