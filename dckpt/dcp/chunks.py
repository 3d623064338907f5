"""Which box of the global tensor this rank holds, and its bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor, Partial

from dckpt.errors import ConfigError
from dckpt.format.checksum import digest_bytes


@dataclass(frozen=True, slots=True)
class LocalChunk:
    """A box of a global tensor and the local, plain tensor (shape `sizes`) that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    tensor: torch.Tensor


def local_chunks(name: str, tensor: torch.Tensor) -> list[LocalChunk]:
    """The boxes of `tensor` that live on this rank: one for a plain tensor or an evenly laid out DTensor, none if empty.

    Raises `ConfigError` for placements whose box cannot be said exactly: Partial, and shards that are not one
    contiguous box (torch keeps only the first index of a strided shard, torch/distributed/tensor/_utils.py).
    """
    if not isinstance(tensor, DTensor):
        whole = LocalChunk((0,) * tensor.dim(), tuple(tensor.shape), tensor.detach())
        return [whole] if tensor.numel() else []
    return _dtensor_chunks(name, tensor)


def _dtensor_chunks(name: str, tensor: DTensor) -> list[LocalChunk]:
    if any(isinstance(placement, Partial) for placement in tensor.placements):
        raise ConfigError(
            f"Tensor {name}: expected sharded or replicated placements, found {tensor.placements}. A partial sum has no "
            "single value; redistribute it to Replicate() or Shard() before saving."
        )
    with torch.no_grad():
        local = tensor.to_local()
    boxes = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    if local.numel() == 0:
        return []
    if len(boxes) != 1 or tuple(boxes[0].sizes) != tuple(local.shape):
        found = [(tuple(box.offsets), tuple(box.sizes)) for box in boxes]
        raise ConfigError(
            f"Tensor {name}: expected one box of shape {tuple(local.shape)} on this rank, found {found} for placements "
            f"{tensor.placements}. This order of sharding cannot be stored; shard with FSDP after tensor parallelism."
        )
    return [LocalChunk(tuple(boxes[0].offsets), tuple(boxes[0].sizes), local)]


def copy_to_bytes(tensor: torch.Tensor, target: memoryview) -> None:
    """Copies a plain tensor, on any device and of any strides, row-major into `target` (exactly as many bytes)."""
    assert len(target) == tensor.numel() * tensor.element_size()
    if tensor.numel() == 0:
        return
    image = torch.frombuffer(target, dtype=torch.uint8)
    with torch.no_grad():
        image.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())


def tensor_from_bytes(data: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A plain CPU tensor over `data` (writable memory, shared, not copied)."""
    if len(data) == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).view(shape)


def tensor_digest(tensor: torch.Tensor) -> str:
    """Digest of a tensor's values on this rank (for a DTensor: of its local part); equal bits give equal digests."""
    local = tensor.detach()
    if isinstance(local, DTensor):
        with torch.no_grad():
            local = local.to_local()
    data = bytearray(local.numel() * local.element_size())
    copy_to_bytes(local, memoryview(data))
    return digest_bytes(data)
