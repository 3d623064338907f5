"""A short word from rank 0 to the other ranks, over the default process group's own store: no server, nothing to close.

For callers that order the two sides by other means: whoever reads must know that the notice was posted before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from dckpt.errors import PeerFailedError
from dckpt.ranks.client import ContactLostError, NoAnswerError, RawStore, StoreLink
from dckpt.ranks.coordination import default_store

T = TypeVar("T")


def post_notice(key: str, value: bytes, *, within_s: float) -> None:
    """Sets the notice `key`; a later one replaces it. On return every rank can read it."""

    def post(store: RawStore) -> None:
        store.set(_place(key), value)
        # A store's `set` does not wait for the server; a question on the same connection does.
        store.check([_place(key)])

    _ask(f"posting {key}", post, within_s)


def read_notice(key: str, *, within_s: float) -> bytes | None:
    """The notice `key`, None if it is not there. Does not wait for it."""

    def read(store: RawStore) -> bytes | None:
        return store.get(_place(key)) if store.check([_place(key)]) else None

    return _ask(f"reading {key}", read, within_s)


def remove_notice(key: str, *, within_s: float) -> None:
    """Takes the notice away; nothing happens if it is not there."""
    _ask(f"removing {key}", lambda store: store.delete_key(_place(key)), within_s)


def _place(key: str) -> str:
    return f"dckpt/notice/{key}"


def _ask(doing: str, operation: Callable[[RawStore], T], within_s: float) -> T:
    store = default_store()
    link = StoreLink(lambda: store)
    try:
        return link.call(operation, within_s)
    except (ContactLostError, NoAnswerError) as error:
        raise PeerFailedError(
            f"{doing}: the process group's store does not answer: {error}. Its process (rank 0 or the launcher) ended, or "
            "the network failed.",
            rank=0,
            phase=doing,
            cause="ConnectionLost",
        ) from None
    finally:
        link.close()
