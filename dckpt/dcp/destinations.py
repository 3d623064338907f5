"""The live tensors of a rank as places that pieces of stripes are copied into, on any device and of any strides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dckpt.planning.pieces import Piece
from dckpt.planning.wants import element_strides

_INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SCATTERED_BYTES_MIN = 16 * 1024
"""Pieces that are smaller on average are received together and copied out: a system call costs more than the copy."""


class Destinations:
    """`boxes[row][place]`: the plain local tensor that holds box `place` of row `row` of this rank's structure.

    Several threads may fill at once, each its own elements. Tensors on a GPU are filled on the calling thread's current
    stream: call `begin` before the first and `finish` after the last, in the thread that owns the load.
    """

    def __init__(self, boxes: Sequence[Sequence[torch.Tensor]]) -> None:
        self._boxes = [[tensor.detach() for tensor in row] for row in boxes]
        self._arrays: dict[tuple[int, int], npt.NDArray[Any] | None] = {}
        self._devices = {tensor.device for row in self._boxes for tensor in row if tensor.is_cuda}

    def begin(self) -> None:
        """What the GPU still does with the tensors is done when this returns: other threads use other streams."""
        for device in self._devices:
            torch.cuda.synchronize(device)

    def finish(self) -> None:
        """Every copy is done when this returns, whatever stream it was on."""
        self.begin()

    def fill(self, pieces: Iterable[Piece], data: memoryview) -> None:
        """Copies pieces of a stripe, whose bytes are `data`, to their places."""
        for piece in pieces:
            array = self._array(piece)
            if array is not None:
                np.copyto(array[_where(piece)], _source(piece, data))
                continue
            tensor = self._boxes[piece.row][piece.place]
            # Writable and contiguous, as torch wants it; the copy is done with it when it returns.
            packed = np.array(_source(piece, data), order="C")
            with torch.no_grad():
                tensor[_where(piece)].copy_(torch.from_numpy(packed).view(tensor.dtype))

    def landings(self, pieces: Sequence[Piece]) -> list[memoryview] | None:
        """Memory that takes the packed pieces one after the other, or None if they have to be copied out."""
        if sum(piece.nbytes for piece in pieces) < SCATTERED_BYTES_MIN * len(pieces):
            return None
        found = []
        for piece in pieces:
            array = self._array(piece)
            part = None if array is None else array[_where(piece)]
            if part is None or not part.flags.c_contiguous:
                return None
            found.append(part.reshape(-1).view(np.uint8).data)
        return found

    def _array(self, piece: Piece) -> npt.NDArray[Any] | None:
        """The box as numbers of the elements' size; None if its memory cannot be written by this processor as it is."""
        key = (piece.row, piece.place)
        if key not in self._arrays:
            tensor = self._boxes[piece.row][piece.place]
            is_plain = tensor.device.type == "cpu" and not tensor.is_conj() and not tensor.is_neg()
            self._arrays[key] = tensor.view(_INTS[tensor.element_size()]).numpy() if is_plain else None
        return self._arrays[key]


def pack(pieces: Iterable[Piece], data: memoryview) -> list[memoryview]:
    """The pieces' elements one after the other; those that lie so in `data` are not copied."""
    views: list[memoryview] = []
    run: tuple[int, int] | None = None
    for piece in pieces:
        if piece.strides == _packed_strides(piece) or piece.nbytes == piece.item_bytes:
            begin, end = piece.offset, piece.offset + piece.nbytes
            if run is not None and run[1] == begin:
                run = (run[0], end)
                continue
            if run is not None:
                views.append(data[run[0] : run[1]])
            run = (begin, end)
            continue
        if run is not None:
            views.append(data[run[0] : run[1]])
            run = None
        views.append(np.ascontiguousarray(_source(piece, data)).reshape(-1).view(np.uint8).data)
    if run is not None:
        views.append(data[run[0] : run[1]])
    return views


def packed(pieces: Iterable[Piece]) -> list[Piece]:
    """The same pieces as they lie in what `pack` gives."""
    found, offset = [], 0
    for piece in pieces:
        found.append(replace(piece, offset=offset, strides=_packed_strides(piece)))
        offset += piece.nbytes
    return found


def _packed_strides(piece: Piece) -> tuple[int, ...]:
    return tuple(stride * piece.item_bytes for stride in element_strides(piece.sizes))


def _source(piece: Piece, data: memoryview) -> npt.NDArray[Any]:
    kind = "u1" if piece.item_bytes == 1 else f"i{piece.item_bytes}"
    return np.ndarray(piece.sizes, kind, data, piece.offset, piece.strides)


def _where(piece: Piece) -> tuple[Any, ...]:
    return (*(slice(o, o + s) for o, s in zip(piece.origin, piece.sizes, strict=True)), ...)
