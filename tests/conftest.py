"""Fixtures that several test packages share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.support.ranks import RankPool

# torch's TCPStore asks for the peer's host name at each connect; where no name server answers, one in 25 takes 5 s.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """A pool of real processes that have imported torch; jobs run in fresh gloo groups."""
    pool = RankPool()
    yield pool
    pool.close()
