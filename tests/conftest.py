"""Fixtures that several test packages share."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

from tests.support import object_server as servers
from tests.support.ranks import RankPool

# torch's TCPStore asks for the peer's host name at each connect; where no name server answers, one in 25 takes 5 s.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")

# No test ever meets a real account: ranks that are started later inherit this too.
for name in [name for name in os.environ if name.startswith("AWS_")]:
    del os.environ[name]
os.environ.update(servers.ENVIRONMENT)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """A pool of real processes that have imported torch; jobs run in fresh gloo groups."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def object_server() -> Iterator[servers.ObjectServer]:
    """A real S3 server with an empty bucket; skips with what to install if there is none."""
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(servers.running())
        except servers.UnavailableError as error:
            pytest.skip(str(error))
        yield server
