"""Copies this rank's part of the state into images of its shard files: each tensor straight to its final place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dckpt import failpoint
from dckpt.blocks.buffer import ImageBuffer
from dckpt.dcp.chunks import LocalChunk, copy_to_bytes
from dckpt.engine.local_state import LocalState
from dckpt.format.shard_file import ShardFilePlan
from dckpt.planning.files import WriteItem


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
        # Spaces fill the place that is kept for a longer text; JSON ignores them.
        target[:] = records[source].ljust(len(target))
    else:
        tensor, box = source
        copy_to_bytes(chunks[tensor][box].tensor, target)
