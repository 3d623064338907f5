"""Copies this rank's part of the state into images of its shard files: each tensor straight to its final place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dckpt import failpoint
from dckpt.blocks.buffer import ImageBuffer
from dckpt.dcp.chunks import LocalChunk, copy_to_bytes, local_chunks, tensor_digest
from dckpt.engine.plan import RECORD_BYTES_MAX, RNG, LocalTensor, RankPlan, WriteItem
from dckpt.format.checksum import digest_bytes
from dckpt.format.shard_file import ShardFilePlan
from dckpt.format.values import dump_json
from dckpt.state.naming import DTYPE_NAMES
from dckpt.state.records import Captured, NamedTensor
from dckpt.state.rng import stream_digest


class LocalState:
    """What this rank has to save, in the order of its plan: live chunks and the JSON of its values."""

    def __init__(
        self, captured: Captured, step: int, micro_step: int, coordinates: dict[str, int], world_size: int
    ) -> None:
        self.captured = captured
        self.chunks: list[list[LocalChunk]] = [local_chunks(item.name, item.tensor) for item in captured.tensors]
        self.records: dict[str, bytes] = {
            name: dump_json(value, limit=RECORD_BYTES_MAX) for name, value in captured.values.items()
        }
        self.records[RNG] = dump_json(captured.rng, limit=RECORD_BYTES_MAX)
        self.plan = RankPlan(
            step=step,
            micro_step=micro_step,
            tensors=tuple(
                _describe(item, chunks, is_alone=world_size == 1)
                for item, chunks in zip(captured.tensors, self.chunks, strict=True)
            ),
            values={name: (digest_bytes(data), len(data)) for name, data in self.records.items()},
            rng={stream: stream_digest(value) for stream, value in captured.rng.items()},
            coordinates=coordinates,
        )


def _describe(item: NamedTensor, chunks: list[LocalChunk], *, is_alone: bool) -> LocalTensor:
    shape = tuple(item.tensor.shape)
    dtype = DTYPE_NAMES[item.tensor.dtype]
    # Shape and dtype go into the digest: equal bytes of another shape are another value. One rank has nobody to differ from.
    is_compared = item.replication == "checked" and not is_alone
    digest = f"{dtype}{list(shape)}{tensor_digest(item.tensor)}" if is_compared else None
    return LocalTensor(item.name, dtype, shape, tuple((c.offsets, c.sizes) for c in chunks), digest)


def stage(
    local: LocalState, files: Sequence[tuple[ShardFilePlan, list[WriteItem]]], buffer: ImageBuffer
) -> list[memoryview]:
    """The complete images of `files`, in `buffer`; when this returns, the state may change again."""
    failpoint.reach("before_stage")
    images = buffer.take([plan.size for plan, _ in files])
    for (plan, items), image in zip(files, images, strict=True):
        image[: len(plan.header)] = plan.header
        for item, begin in zip(items, plan.begins, strict=True):
            target = image[begin : begin + item.shard_tensor.nbytes]
            _copy(item.source, local.chunks, local.records, target)
    if torch.cuda.is_available():
        # Copies from the device into pageable memory are synchronous today; this holds the promise if that changes.
        torch.cuda.current_stream().synchronize()
    failpoint.reach("after_stage")
    return images


def _copy(
    source: tuple[int, int] | str,
    chunks: Sequence[Sequence[LocalChunk]],
    records: Mapping[str, bytes],
    target: memoryview,
) -> None:
    if isinstance(source, str):
        target[:] = records[source]
    else:
        tensor, box = source
        copy_to_bytes(chunks[tensor][box].tensor, target)
