"""What a rank says while a resume is validated stays small, however many tensors there are."""

from __future__ import annotations

import pytest

from tests.support import exchange_jobs as jobs

pytestmark = pytest.mark.distributed


def test_a_validation_says_kilobytes_for_any_number_of_tensors(ranks, tmp_path):
    few, many = (ranks.run(jobs.bytes_said, 2, str(tmp_path / f"run-{layers}"), layers)[1] for layers in (20, 200))

    assert many[1] == 10 * few[1] == 1600
    assert few[2] == many[2] == {}
    assert few[0] < 4096
    assert many[0] - few[0] < 256
