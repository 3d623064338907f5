"""Short questions that all ranks must answer alike before one of them saves."""

from __future__ import annotations

import logging

from dckpt.errors import DckptError
from dckpt.ranks.coordination import Coordination

log = logging.getLogger(__name__)


def is_anywhere(coordination: Coordination, what: str, here: bool, where: str) -> bool:
    """Whether it holds on any rank, the same answer on all; yes if they cannot agree, which leaves the save out."""
    session = coordination.session(
        f"{what}-{where}".replace(" ", ""), what=f"check before saving {where}", call=f"step(state) at {where}"
    )
    try:
        return session.exchange(what, b"1" if here else b"0", _any) == b"1"
    except DckptError as error:
        # All ranks hear it, so all of them skip; a save that cannot be agreed on must not end training.
        log.error("no save at %s: %s", where, error)  # noqa: TRY400
        return True
    finally:
        session.close()


def _any(payloads: list[bytes]) -> bytes:
    return b"1" if b"1" in payloads else b"0"
