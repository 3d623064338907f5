"""Loading on another number of ranks reads little more from storage than the bytes that the ranks hold."""

from __future__ import annotations

import pytest

from tests.support.reading_jobs import read_large, save_large

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    ("saved_by", "dim", "loaded_by"),
    [(2, None, 2), (2, None, 3), (4, None, 2), (2, 1, 1)],
)
def test_all_ranks_together_read_little_more_than_they_hold(ranks, tmp_path, saved_by, dim, loaded_by):
    root = str(tmp_path / "run")
    ranks.run(save_large, saved_by, root, dim)

    results = ranks.run(read_large, loaded_by, root, dim)

    read, held = (sum(column) for column in zip(*results, strict=True))
    assert held == 2 * 4 * 1024 * 3000
    assert held <= read <= 1.05 * held, read / held
