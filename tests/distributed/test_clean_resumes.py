"""A resume that is as it should be raises no warning: random runs on random layouts.

`DCKPT_FAULT_SCALE=8` makes the slow campaign one of more than 200 resumes.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from dckpt.cli.main import main
from tests.support import clean_jobs as jobs

pytestmark = pytest.mark.distributed

FEW, MANY = 10, 20 * int(os.environ.get("DCKPT_FAULT_SCALE") or 1)
"""Stories; each is resumed once or twice."""


def tell(ranks, root: Path, story: jobs.Story) -> list[tuple[dict[str, str], str]]:
    """Lives through a story; per resume what was found, and the report."""
    told = []
    for number, place in enumerate(story.places):
        found = ranks.run(jobs.live, place.ranks, str(root), story, number, deadline_s=120)
        assert all(one[0] == found[0][0] for one in found), "all ranks hear the same"
        if number:
            told.append(found[0])
        if place.reshard_to:
            done = CliRunner().invoke(main, ["reshard", str(root), str(root), "--world-size", str(place.reshard_to)])
            assert done.exit_code == 0, done.output
    return told


@pytest.mark.parametrize("seed", range(FEW))
def test_a_clean_resume_raises_no_warning(ranks, tmp_path, seed):
    story = jobs.draw_story(seed)

    for found, text in tell(ranks, tmp_path / "run", story):
        assert found == {}, f"{story}\n{text}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_clean_resumes_raise_no_warning(ranks, tmp_path):
    alarms = []
    resumes = 0
    for seed in range(1000, 1000 + MANY):
        story = jobs.draw_story(seed)
        told = tell(ranks, tmp_path / str(seed), story)
        resumes += len(told)
        alarms += [f"{story}\n{text}" for found, text in told if found]

    assert resumes >= MANY
    assert not alarms, f"{len(alarms)} of {resumes}:\n" + "\n".join(alarms)
