"""Under which names the other hosts of a job can reach this one."""

from __future__ import annotations

import contextlib
import socket

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def own_hosts(towards: str | None, *, is_named: bool = False) -> tuple[str, ...]:
    """Names of this host, the best first: the address of the interface that leads to the host `towards`, and the host's name.

    is_named: `towards` is this host itself, under the name that the others use for it.
    """
    found = []
    if towards is not None and towards not in _LOOPBACK:
        if is_named:
            found.append(towards)
        else:
            with contextlib.suppress(OSError):
                found.append(_interface(towards))
    found.append(socket.gethostname())
    return tuple(dict.fromkeys(found))


def _interface(towards: str) -> str:
    """The address from which this host would send to that one; nothing is sent."""
    family, kind, protocol, _, address = socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as sock:
        sock.connect(address)
        return str(sock.getsockname()[0])
