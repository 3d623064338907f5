"""Fixtures that several test packages share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.ranks import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """A pool of real processes that have imported torch; jobs run in fresh gloo groups."""
    pool = RankPool()
    yield pool
    pool.close()
