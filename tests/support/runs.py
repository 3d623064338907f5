"""Genuine checkpoints without torch: real shard files, sums, index, manifest, generations, commits."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dckpt.catalog.catalog import Catalog
from dckpt.catalog.generations import create_generation, list_generations
from dckpt.catalog.transaction import Transaction
from dckpt.format.checksum import FileHasher, Sums, digest_bytes, encode_sums
from dckpt.format.generation import Generation, Parent
from dckpt.format.index import Chunk, build_index
from dckpt.format.layout import checkpoint_name, sums_file_name
from dckpt.format.manifest import FileEntry, Manifest, Mesh
from dckpt.format.shard_file import ShardFilePlan, ShardTensor, plan_shard_files
from dckpt.storage.base import Storage

RUN_ID = "f" * 32
FULL_PARTS = ("model", "optim", "scheduler", "progress", "data", "rng")
FULL_VALUES: Mapping[str, Any] = {
    "optim": {"param_groups": [{"lr": 0.001, "betas": {"$t": "tuple", "v": [0.9, 0.95]}}]},
    "scheduler": {"last_epoch": 10},
    "progress": {"step": 10, "samples": 320},
    "data": {"epoch": 0, "consumed": 320},
}

_DTYPES = {"f8": "F64", "f4": "F32", "f2": "F16", "i8": "I64", "i4": "I32", "u1": "U8", "b1": "BOOL"}

Piece = tuple[ShardTensor, np.ndarray]


def training_tensors(*, world_size: int = 2, size: int = 64, seed: int = 0) -> dict[str, np.ndarray]:
    """A small model with moments, and the random streams of every rank."""
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((size, 8)).astype(np.float32)
    tensors: dict[str, np.ndarray] = {"model.weight": weight, "model.bias": weight[:, 0].copy()}
    for name in ("weight", "bias"):
        tensors[f"optim.{name}.exp_avg"] = tensors[f"model.{name}"] * np.float32(0.1)
        tensors[f"optim.{name}.step"] = np.float32(10.0)
    for rank in range(world_size):
        tensors[f"rank.{rank}.values.rng"] = np.frombuffer(b'{"rng":{"python":[%d]}}' % rank, np.uint8)
    return tensors


def write_generation(
    storage: Storage,
    number: int,
    *,
    parent: Manifest | None = None,
    reason: str = "start",
    world_size: int = 2,
) -> None:
    """The generation record `number`, descending from the checkpoint of `parent`."""
    link = None
    if parent is not None and parent.id is not None:
        _, digest = Catalog(storage).read_manifest(parent.id.name)
        link = Parent(parent.id.name, parent.id.step, parent.id.micro_step, parent.id.generation, digest)
    record = Generation(
        number=number,
        run_id=RUN_ID,
        parent=link,
        reason=reason,  # type: ignore[arg-type]
        world_size=world_size,
        created_unix_s=1_700_000_000.0,
        nonce=uuid.uuid4().hex,
    )
    create_generation(storage, record, expected_newest=max(list_generations(storage), default=0))


def write_checkpoint(
    storage: Storage,
    step: int | None,
    generation: int,
    tensors: Mapping[str, np.ndarray],
    *,
    world_size: int = 2,
    micro_step: int = 0,
    values: Mapping[str, Any] | None = None,
    parts: Sequence[str] = FULL_PARTS,
    rng: Mapping[str, tuple[str, ...]] | None = None,
    rank_values: Sequence[str] | None = None,
    metrics: Mapping[str, float] | None = None,
    facts: Mapping[str, Any] | None = None,
    planner_data: Any = None,
    mesh: Mesh | None = None,
    parent: Manifest | None = None,
    name: str | None = None,
    created_unix_s: float = 1_700_000_000.0,
) -> Manifest:
    """Commits one checkpoint through `Transaction`; the generation's record too, if it has none yet.

    Each tensor is cut along its first dimension over the ranks; a tensor `rank.<r>.*` belongs to rank r, and
    one with fewer rows than ranks to rank 0. `generation` 0 makes a stand-alone checkpoint in the directory
    `name`.
    """
    storage.ensure_root()
    if generation and generation not in list_generations(storage):
        reason = "start" if parent is None else "resume"
        write_generation(storage, generation, parent=parent, reason=reason, world_size=world_size)
    checkpoint = name if generation == 0 else checkpoint_name(int(step or 0), generation, micro_step)
    assert checkpoint is not None, "a stand-alone checkpoint needs a name"
    attempt = uuid.uuid4().hex
    transaction = Transaction(storage, checkpoint=checkpoint, attempt=attempt, generation=generation)
    transaction.begin()
    pieces = _cut(tensors, world_size)
    entries: list[FileEntry] = []
    files: list[str] = []
    chunks: dict[str, list[Chunk]] = {tensor: [] for tensor in tensors}
    for rank in range(world_size):
        for plan in plan_shard_files(rank, [piece for piece, _ in pieces[rank]]):
            arrays = {piece.name: array for piece, array in pieces[rank]}
            entries += _write_shard(storage, transaction.attempt_dir, attempt, plan, arrays, rank)
            for tensor, begin in zip(plan.tensors, plan.begins, strict=True):
                chunks[tensor.name].append(Chunk(tensor.offsets, tensor.shape, len(files), begin))
            files.append(plan.file)
    storage.sync_dir(transaction.attempt_dir)
    transaction.ensure_files(entries)
    shapes = {tensor: (_dtype(array), array.shape, chunks[tensor]) for tensor, array in tensors.items()}
    entries.append(transaction.write_index(build_index(tuple(files), shapes)))
    has_rng = any(tensor.endswith(".values.rng") for tensor in tensors)
    manifest = Manifest(
        run_id=RUN_ID if generation else None,
        step=step,
        micro_step=micro_step,
        generation=generation,
        attempt=attempt,
        created_unix_s=created_unix_s,
        world_size=world_size,
        mesh=mesh,
        parts=tuple(parts),
        planner_data=planner_data,
        values=dict(FULL_VALUES if values is None else values),
        rank_values=tuple(rank_values) if rank_values is not None else (("rng",) if has_rng else ()),
        rng=({"python": ()} if has_rng else {}) if rng is None else dict(rng),
        metrics=dict(metrics or {}),
        facts=dict(facts or {}),
        writer={"dckpt": "0.0.0"},
        files=tuple(entries),
    )
    transaction.stage_manifest(manifest)
    transaction.publish()
    return manifest


def _dtype(array: np.ndarray) -> str:
    return _DTYPES[np.asarray(array).dtype.str[1:]]


def _cut(tensors: Mapping[str, np.ndarray], world_size: int) -> list[list[Piece]]:
    pieces: list[list[Piece]] = [[] for _ in range(world_size)]
    for name, found in tensors.items():
        array = np.asarray(found)
        dtype = _dtype(array)
        if not array.size:
            continue  # Tensors without elements are in the index only.
        if name.startswith("rank."):
            rank = int(name.split(".")[1])
            pieces[rank].append((ShardTensor(name, dtype, array.shape, (0,) * array.ndim), array))
        elif array.ndim == 0 or array.shape[0] < world_size:
            pieces[0].append((ShardTensor(name, dtype, array.shape, (0,) * array.ndim), array))
        else:
            begin = 0
            for rank, part in enumerate(np.array_split(array, world_size)):
                offsets = (begin, *([0] * (array.ndim - 1)))
                pieces[rank].append((ShardTensor(name, dtype, part.shape, offsets), part))
                begin += part.shape[0]
    return pieces


def _write_shard(
    storage: Storage,
    attempt_dir: str,
    attempt: str,
    plan: ShardFilePlan,
    arrays: Mapping[str, np.ndarray],
    rank: int,
) -> list[FileEntry]:
    data = plan.header + b"".join(np.ascontiguousarray(arrays[tensor.name]).tobytes() for tensor in plan.tensors)
    assert len(data) == plan.size, (len(data), plan.size)
    hasher = FileHasher()
    hasher.update(memoryview(data))
    digest = hasher.digest()
    sums = encode_sums(Sums(file_bytes=len(data), digest=digest, blocks=hasher.checksums()))
    sums_name = sums_file_name(plan.file)
    _write_file(storage, f"{attempt_dir}/{plan.file}", data)
    _write_file(storage, f"{attempt_dir}/{sums_name}", sums)
    return [
        FileEntry(f"{attempt}/{plan.file}", len(data), digest, "shard", rank),
        FileEntry(f"{attempt}/{sums_name}", len(sums), digest_bytes(sums), "sums", rank),
    ]


def _write_file(storage: Storage, key: str, data: bytes) -> None:
    writer = storage.create_file(key)
    writer.write_at(0, memoryview(data))
    writer.finish(len(data))
