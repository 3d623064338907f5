"""Which box of the global tensor this rank holds, and its bytes."""

from __future__ import annotations

import ctypes
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor, Partial

from dckpt.errors import ConfigError
from dckpt.format.checksum import digest_bytes
from dckpt.state.naming import local_part

SMALL_BYTES = 256 * 1024  # above it a tensor operation costs nothing beside the copy, and may use several threads
KNOWN_BOXES_MAX = 65_536

_known_boxes: dict[Hashable, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}


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
    local = local_part(tensor)
    if local.numel() == 0:
        return []
    found = _boxes(tensor)
    if len(found) != 1 or found[0][1] != tuple(local.shape):
        raise ConfigError(
            f"Tensor {name}: expected one box of shape {tuple(local.shape)} on this rank, found {found} for placements "
            f"{tensor.placements}. This order of sharding cannot be stored; shard with FSDP after tensor parallelism."
        )
    return [LocalChunk(*found[0], local)]


def _boxes(tensor: DTensor) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, sizes) of what torch says lies here; a function of how the tensor is laid out, so it is asked once."""
    mesh = tensor.device_mesh
    # The place too: an equal mesh of a later process group may put this process elsewhere.
    key = (tensor.shape, mesh, tuple(mesh.get_coordinate() or ()), tensor.placements)
    found = _known_boxes.get(key)
    if found is None:
        if len(_known_boxes) >= KNOWN_BOXES_MAX:
            _known_boxes.clear()
        boxes = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
        found = _known_boxes[key] = [(tuple(box.offsets), tuple(box.sizes)) for box in boxes]
    return found


def copy_to_bytes(tensor: torch.Tensor, target: memoryview) -> None:
    """Copies a plain tensor, on any device and of any strides, row-major into `target` (exactly as many bytes)."""
    assert len(target) == tensor.numel() * tensor.element_size()
    if not len(target):
        return
    if len(target) < SMALL_BYTES and _is_plain_memory(tensor):
        # A fifth of the time that tensor operations take for as few bytes.
        ctypes.memmove(_address(target), tensor.data_ptr(), len(target))
        return
    image = bytes_as_tensor(target, tensor)
    with torch.no_grad():
        image.copy_(tensor.detach())


def bytes_as_tensor(target: memoryview, like: torch.Tensor) -> torch.Tensor:
    """A CPU tensor over `target`, of the dtype and shape of `like`."""
    return torch.frombuffer(target, dtype=torch.uint8).view(like.dtype).view(like.shape)


def _is_plain_memory(tensor: torch.Tensor) -> bool:
    is_lazy = tensor.is_conj() or tensor.is_neg()  # their values differ from their memory
    return tensor.device.type == "cpu" and tensor.is_contiguous() and not is_lazy


def _address(target: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(target))


def copy_range_to_bytes(tensor: torch.Tensor, begin: int, target: memoryview) -> None:
    """Copies `len(target)` bytes of the tensor's row-major image, from byte `begin` on; both on element boundaries."""
    item = tensor.element_size()
    assert begin % item == 0, (begin, item)
    assert len(target) % item == 0, (len(target), item)
    if not len(target):
        return
    if len(target) < SMALL_BYTES and _is_plain_memory(tensor):
        ctypes.memmove(_address(target), tensor.data_ptr() + begin, len(target))
        return
    image = torch.frombuffer(target, dtype=torch.uint8).view(tensor.dtype)
    with torch.no_grad():
        _copy_elements(tensor.detach(), begin // item, image)


def view_of_bytes(tensor: torch.Tensor, begin: int, nbytes: int) -> memoryview | None:
    """The tensor's own memory from byte `begin` of its row-major image on; None if that image is nowhere in host memory.

    The view does not keep the tensor alive.
    """
    if not _is_plain_memory(tensor):
        return None
    memory = (ctypes.c_ubyte * nbytes).from_address(tensor.data_ptr() + begin)
    return memoryview(memory).cast("B")


def _copy_elements(tensor: torch.Tensor, begin: int, image: torch.Tensor) -> None:
    """Elements from `begin` on in row-major order, as many as `image` has; no more than a row is taken apart at a time."""
    if tensor.is_contiguous():
        image.copy_(tensor.view(-1)[begin : begin + len(image)])
        return
    row_items = tensor[0].numel()
    done = 0
    while done < len(image):
        row, inside = divmod(begin + done, row_items)
        left = len(image) - done
        if inside or left < row_items:
            count = min(row_items - inside, left)
            _copy_elements(tensor[row], inside, image[done : done + count])
        else:
            rows = left // row_items
            count = rows * row_items
            image[done : done + count].view(rows, *tensor.shape[1:]).copy_(tensor[row : row + rows])
        done += count


def tensor_from_bytes(data: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A plain CPU tensor over `data` (writable memory, shared, not copied)."""
    if len(data) == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).view(shape)


def tensor_digest(tensor: torch.Tensor) -> str:
    """Digest of a tensor's values on this rank (for a DTensor: of its local part); equal bits give equal digests."""
    local = local_part(tensor).detach()
    data = bytearray(local.numel() * local.element_size())
    copy_to_bytes(local, memoryview(data))
    return digest_bytes(data)
