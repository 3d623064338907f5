"""Errors that are the caller's to fix keep their type on every rank, whichever rank noticed."""

from __future__ import annotations

from typing import Any

from dckpt.errors import (
    CommitConflictError,
    ConfigError,
    DckptError,
    FormatVersionError,
    IncompatibleStateError,
    from_wire,
    to_wire,
)
from dckpt.format.values import dump_json, load_json

REFUSALS = (CommitConflictError, ConfigError, FormatVersionError, IncompatibleStateError)


def encode_refusal(error: DckptError) -> bytes:
    """A message for the coordinator that stands in the place of this rank's payload."""
    return dump_json({"refused": to_wire(error)})


def raise_refusals(payloads: list[bytes]) -> None:
    """On the coordinator: raises the refusal of the lowest rank that sent one."""
    for payload in payloads:
        # A refusal is short; a plan of megabytes is not parsed twice for it.
        if payload.startswith(b'{"refused":'):
            record: dict[str, Any] = load_json(payload, key="message of a rank", limit=2**31)
            raise from_wire(record["refused"])
