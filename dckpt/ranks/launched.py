"""Sessions of an offline command: of one process alone, without torch, or of those that a launcher started together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta

from dckpt.errors import ConfigError
from dckpt.ranks.client import LocalLink
from dckpt.ranks.messages import sentence
from dckpt.ranks.session import Session
from dckpt.ranks.topology import Topology

LINGER_S = 10.0  # how long rank 0 stays reachable at the end, so that every process learns the outcome
LINGER_AFTER_ERROR_S = 2.0  # others may have ended without goodbye


@contextlib.contextmanager
def launched_session(topology: Topology, *, what: str, call: str, deadline_s: float) -> Iterator[Session]:
    """One agreement between the processes of `topology`; every one of them opens it with the same arguments.

    Several processes find each other by the launcher's environment (MASTER_ADDR, MASTER_PORT; torchrun sets them).
    """
    consequence = f"The {what.split(' ', 1)[0]} is abandoned."
    if topology.world_size == 1:
        yield Session(
            LocalLink(),
            topology,
            prefix="session/alone",
            what=what,
            call=call,
            deadline_s=deadline_s,
            total_s=None,
            consequence=consequence,
        )
        return
    # Imported here: a process alone needs no torch.
    import torch.distributed as dist

    from dckpt.ranks.coordination import Coordination

    try:
        dist.init_process_group(
            "gloo", rank=topology.rank, world_size=topology.world_size, timeout=timedelta(seconds=deadline_s)
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{what}: {topology.world_size} processes were started, and they do not find each other: {sentence(error)}. Start "
            "them with torchrun."
        ) from error
    try:
        coordination = Coordination.connect(topology, scope=what, deadline_s=deadline_s)
        linger_s = LINGER_AFTER_ERROR_S
        try:
            yield coordination.session("command", what=what, call=call, consequence=consequence)
            linger_s = LINGER_S
        finally:
            coordination.close(linger_s)
    finally:
        dist.destroy_process_group()
