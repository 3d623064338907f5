"""What both halves of a save need when one of them fails: the shared error, and an attempt that is taken away."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from dckpt.catalog.transaction import Transaction
from dckpt.errors import CorruptCheckpointError, DckptError, StorageError, from_wire, to_wire
from dckpt.ranks.messages import format_ranks
from dckpt.ranks.session import Session
from dckpt.ranks.topology import Topology

MESSAGE_BYTES_MAX = 2**31


def as_dckpt_error(error: BaseException) -> DckptError:
    """`error` itself if it is ours, else a `DckptError` with its type and text."""
    return error if isinstance(error, DckptError) else from_wire(to_wire(error))


def abort_attempt(
    session: Session | None, transaction: Transaction | None, error: BaseException, *, phase: str
) -> BaseException:
    """Tells the other ranks and takes the attempt away; returns the error that all ranks raise."""
    is_aborted = session is None or session.is_closed or session.abort(error, phase=phase) == "abort"
    if transaction is not None and is_aborted:
        transaction.abandon()
    return error if session is None or session.error is None else session.error


@contextlib.contextmanager
def naming_rank(topology: Topology, session: Session, phase: str) -> Iterator[None]:
    """An error of the storage keeps its type and says which rank of which save met it."""
    try:
        yield
    except (StorageError, CorruptCheckpointError) as error:
        where = f"{session.what}: {format_ranks([topology.rank])} failed in phase {phase}: "
        raise type(error)(where + error.message, **error.fields()) from error
