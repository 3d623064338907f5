"""Copies this rank's part of the state into images of its shard files: each tensor straight to its final place.

Tensors of a GPU are copied on a stream of their own, behind what the training stream has queued so far. What the caller
allows to come later is copied by a thread (`DeferredCopies`), or by that stream, while training goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from dckpt import failpoint
from dckpt.blocks.buffer import ImageBuffer
from dckpt.blocks.source import ImageSource
from dckpt.dcp.chunks import bytes_as_tensor, copy_to_bytes
from dckpt.engine.deferred import DeferredCopies, DeviceCopies
from dckpt.engine.local_state import LocalState
from dckpt.format.shard_file import ShardFilePlan
from dckpt.planning.files import WriteItem

DEFER_BYTES_MIN = 64 * 1024  # below it the copy costs less than keeping account of it


def stage(
    local: LocalState,
    files: Sequence[tuple[ShardFilePlan, list[WriteItem]]],
    buffer: ImageBuffer,
    may_wait: Callable[[str, torch.Tensor], bool] | None = None,
) -> tuple[list[ImageSource], DeferredCopies | None]:
    """The images of `files` in `buffer`, and what is still being copied: None if the whole state may change again.

    may_wait: whether a tensor (checkpoint name, this rank's part) stays unchanged until the deferred copies are waited for.
    """
    failpoint.reach("before_stage")
    images = buffer.take([plan.size for plan, _ in files])
    on_device = DeviceCopies()
    later: list[tuple[str, torch.Tensor, memoryview]] = []
    for (plan, items), image in zip(files, images, strict=True):
        image[: len(plan.header)] = plan.header
        for item, begin in zip(items, plan.begins, strict=True):
            target = image[begin : begin + item.shard_tensor.nbytes]
            if isinstance(item.source, str):
                # Spaces fill the place that is kept for a longer text; JSON ignores them.
                target[:] = local.records[item.source].ljust(len(target))
                continue
            tensor = local.chunks[item.source[0]][item.source[1]].tensor
            name = item.shard_tensor.name
            if may_wait is not None and len(target) >= DEFER_BYTES_MIN and may_wait(name, tensor):
                later.append((name, tensor, target))
            elif tensor.is_cuda:
                on_device.copy(tensor, bytes_as_tensor(target, tensor))
            else:
                copy_to_bytes(tensor, target)
    # Issued before the wait for the others, so that the device is never idle in between.
    deferred = DeferredCopies(later) if later else None
    on_device.wait()
    failpoint.reach("after_stage")
    return [ImageSource(image, plan) for (plan, _), image in zip(files, images, strict=True)], deferred
