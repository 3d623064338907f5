"""What this rank wants to load, described for all ranks; and from all descriptions the classes of ranks, each told once."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dckpt.dcp.chunks import LocalChunk, local_chunks
from dckpt.engine.local_state import describe_tensors
from dckpt.engine.saved_state import SavedState
from dckpt.planning.structure import Meshes, RankClass, Structure
from dckpt.state.records import NamedTensor, RestorePlan

RECORD_PREFIX = "rank."


@dataclass(frozen=True)
class Wanted:
    """The tensors that this rank loads and others may load too, in the order of `structure`, under their stored names."""

    structure: Structure
    meshes: Meshes
    chunks: list[list[LocalChunk]]

    @property
    def keys(self) -> tuple[str, str]:
        """Digests of structure and meshes: equal on ranks that want alike."""
        return self.structure.key, self.meshes.key

    @property
    def boxes(self) -> list[list[torch.Tensor]]:
        """Of each row, the plain tensors that take its boxes."""
        return [[chunk.tensor for chunk in held] for held in self.chunks]


def describe_wanted(saved: SavedState, plan: RestorePlan) -> Wanted:
    """Of the plan's reads, all but this rank's own records: nobody else wants those."""
    items = [
        NamedTensor(stored, tensor.detach(), "sharded")
        for stored, tensor in ((saved.stored_name(name), tensor) for name, tensor in plan.reads)
        if not stored.startswith(RECORD_PREFIX)
    ]
    chunks = [local_chunks(item.name, item.tensor) for item in items]
    return Wanted(*describe_tensors(items, chunks), chunks)


# -- what travels ------------------------------------------------------------------------------------------------------


def group_ranks(keys: Sequence[Sequence[str]]) -> list[list[Any]]:
    """From each rank's keys the classes, in the order of their first ranks: [structure, meshes, ranges of ranks]."""
    classes: dict[tuple[str, ...], list[list[int]]] = {}
    for rank, key in enumerate(keys):
        ranges = classes.setdefault(tuple(key), [])
        if ranges and ranges[-1][1] == rank:
            ranges[-1][1] = rank + 1
        else:
            ranges.append([rank, rank + 1])
    return [[*key, ranges] for key, ranges in classes.items()]


def own_blobs(wanted: Wanted, classes: Sequence[Sequence[Any]], rank: int) -> dict[str, str]:
    """What this rank tells all others when they are not alike: each distinct blob comes from the first rank that has it."""
    senders: dict[str, int] = {}
    for structure, meshes, ranges in classes:
        for key in (structure, meshes):
            senders.setdefault(key, ranges[0][0])
    blobs = {wanted.structure.key: wanted.structure.blob, wanted.meshes.key: wanted.meshes.blob}
    return {key: _packed(blob) for key, blob in blobs.items() if senders[key] == rank}


def rank_classes(wanted: Wanted, classes: Sequence[Sequence[Any]], blobs: Mapping[str, str]) -> list[RankClass]:
    """The classes with what their ranks want. `blobs`: of the others; empty when all ranks are alike."""
    structures = {wanted.structure.key: wanted.structure}
    meshes = {wanted.meshes.key: wanted.meshes}
    found = []
    for structure_key, meshes_key, ranges in classes:
        if structure_key not in structures:
            structures[structure_key] = Structure.decode(_unpacked(blobs[structure_key]))
        if meshes_key not in meshes:
            meshes[meshes_key] = Meshes.decode(_unpacked(blobs[meshes_key]))
        ranks = tuple(rank for first, stop in ranges for rank in range(first, stop))
        found.append(RankClass(structures[structure_key], meshes[meshes_key], ranks))
    return found


def _packed(blob: bytes) -> str:
    return base64.b64encode(zlib.compress(blob, 1)).decode("ascii")


def _unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))
