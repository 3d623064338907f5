"""What passes between two ranks that exchange pieces: a greeting with the job's token, then frames; acknowledgements back."""

from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass
from typing import Any

TOKEN_BYTES = 32
BLOB_BYTES_MAX = 2**31

BLOB, SLOT, PAYLOAD, VOID = 1, 2, 3, 4
"""Kinds of frames. BLOB: bytes for whoever waits for number `begin`. SLOT: bytes `begin` to `begin + length` of a file lie in a
slot of the sender's arena, from byte `offset` of it on. PAYLOAD: the receiver's elements of the stripe at `begin` follow,
`length` bytes. VOID: the sender failed; nothing more comes from it in this round."""

_HELLO = struct.Struct("<8s32sIIQ")
_FRAME = struct.Struct("<BxxxIIIIxxxxQQQ")
_ACK = struct.Struct("<I")
_MAGIC = b"dckptX1\n"
HELLO_BYTES, FRAME_BYTES, ACK_BYTES = _HELLO.size, _FRAME.size, _ACK.size


class StrangerError(Exception):
    """Whoever connected is not of this job, or does not speak as its ranks do. Never leaves this package."""


@dataclass(frozen=True, slots=True)
class Frame:
    """The head of what is sent. `round`: which attempt of the load; `check`: xxh3-64 of the payload."""

    kind: int
    round: int
    file: int = 0
    begin: int = 0
    length: int = 0
    slot: int = 0
    offset: int = 0
    check: int = 0

    def encode(self) -> bytes:
        """As it travels."""
        numbers = (self.round, self.file, self.slot, self.offset, self.begin, self.length, self.check)
        return _FRAME.pack(self.kind, *numbers)

    @classmethod
    def decode(cls, data: bytes | bytearray) -> Frame:
        """What a rank of this job sent. Raises `StrangerError` for a kind that there is not."""
        kind, number, file, slot, offset, begin, length, check = _FRAME.unpack(data)
        if kind not in (BLOB, SLOT, PAYLOAD, VOID) or (kind == BLOB and length > BLOB_BYTES_MAX):
            raise StrangerError(f"frame of kind {kind} and {length} bytes")
        return cls(kind, number, file, begin, length, slot, offset, check)


def encode_hello(token: bytes, source: int, target: int, arena_bytes: int) -> bytes:
    """The greeting of rank `source` to rank `target`; with `arena_bytes` a descriptor follows."""
    assert len(token) == TOKEN_BYTES
    return _HELLO.pack(_MAGIC, token, source, target, arena_bytes)


def decode_hello(data: bytes | bytearray, token: bytes, target: int) -> tuple[int, int]:
    """(rank, bytes of its arena) of a greeting with this token, meant for `target`; else raises `StrangerError`."""
    magic, found, source, meant, arena_bytes = _HELLO.unpack(data)
    if not hmac.compare_digest(found, token) or magic != _MAGIC or meant != target:
        raise StrangerError("no greeting of this job")
    return source, arena_bytes


def encode_ack(slot: int) -> bytes:
    """The receiver needs the slot no more."""
    return _ACK.pack(slot)


def decode_acks(data: bytes) -> list[int]:
    """Slots of whole acknowledgements, one after the other."""
    found: list[Any] = [slot for (slot,) in _ACK.iter_unpack(data)]
    return found
