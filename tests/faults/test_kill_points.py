"""SIGKILL at every named point of a save: on one process, and on either of two ranks.

The points come from `dckpt.failpoint.POINTS` in the order in which a save passes them, so a new one is covered at once.
"""

from __future__ import annotations

import itertools
import shutil
import signal
from pathlib import Path

import pytest

from dckpt.failpoint import POINTS
from tests.support.crash_runs import (
    PointPlan,
    commit_steps,
    count_points,
    examine,
    save_until_point,
    start_again,
)
from tests.support.fork_server import Fate, ForkServer

pytestmark = pytest.mark.crash

COORDINATORS_POINTS = {
    *("before_generation", "after_generation", "before_listing", "before_index", "before_manifest", "after_manifest"),
    *("before_commit", "before_rename", "after_rename", "after_commit", "before_prune", "mid_prune", "after_prune"),
}
"""Points that only the coordinator passes."""

RANK_DEADLINE_S = 2.0
"""How long the coordinator waits for a rank that died without a word."""

LAST_BEFORE_COMMIT = POINTS.index("before_rename")
LAST_BEFORE_VERDICT = POINTS.index("before_commit")


def is_committed_at(point: str) -> bool:
    return POINTS.index(point) > LAST_BEFORE_COMMIT


class Base:
    """A run with the checkpoints of steps 1 and 2, to be copied for each trial."""

    def __init__(self, server: ForkServer, directory: Path, world_size: int) -> None:
        self._directory = directory / f"base-{world_size}"
        self._count = 0
        fates = server.run_ranks(commit_steps, world_size, str(self._directory), 2)
        assert [fate.exit_code for fate in fates] == [0] * world_size, [fate.describe() for fate in fates]
        self.facts = fates[0].all("committed")
        assert [fact["step"] for fact in self.facts] == [1, 2]

    def copy(self) -> str:
        self._count += 1
        target = self._directory.with_name(f"{self._directory.name}-{self._count}")
        shutil.copytree(self._directory, target)
        return str(target)


@pytest.fixture(scope="module", name="base")
def _base(server: ForkServer, module_path: Path) -> Base:
    return Base(server, module_path, 1)


@pytest.fixture(scope="module", name="base_of_two")
def _base_of_two(server: ForkServer, module_path: Path) -> Base:
    return Base(server, module_path, 2)


def assert_reached(fate: Fate, point: str, hit: int) -> None:
    assert fate.exit_code == -signal.SIGKILL, fate.describe()
    assert not fate.ended_by_us, fate.describe()
    reached = fate.one("reached")
    assert (reached["point"], reached["hit"]) == (point, hit)


def assert_found(fate: Fate, point: str) -> None:
    examined = fate.one("examined")
    assert examined["problems"] == []
    assert examined["latest"] == (3 if is_committed_at(point) else 2)


@pytest.mark.parametrize("point", POINTS)
def test_a_process_killed_at_any_point_leaves_the_old_or_the_new_checkpoint(
    server: ForkServer, base: Base, reference: str, point: str
):
    """Killed at the first, second, ... pass of the point, until the save passes it no more and ends untouched."""
    for hit in itertools.count(1):
        root = base.copy()
        fate = server.run(save_until_point, root, PointPlan(point, hit))
        if fate.exit_code == 0:
            break
        assert_reached(fate, point, hit)
        # With last=1 the older ones go after the commit; before it everything must still be there.
        facts = [*base.facts, *fate.all("committed")]
        after = server.finish(examine, root, reference, facts, not is_committed_at(point))
        assert_found(after, point)

    assert hit > 1, f"a save does not pass {point}"
    assert fate.has("committed")


@pytest.mark.distributed
@pytest.mark.parametrize("point", POINTS)
def test_a_coordinator_killed_at_any_point_leaves_the_old_or_the_new_checkpoint(
    server: ForkServer, base_of_two: Base, reference_of_two: str, point: str
):
    root = base_of_two.copy()

    victim, survivor = server.run_ranks(save_until_point, 2, root, PointPlan(point))

    assert_reached(victim, point, 1)
    assert_tells_the_truth(survivor, point, dead=0)
    facts = [*base_of_two.facts, *victim.all("committed"), *survivor.all("committed")]
    assert_two_go_on(server, root, reference_of_two, facts, point)


@pytest.mark.distributed
@pytest.mark.parametrize("point", [point for point in POINTS if point not in COORDINATORS_POINTS])
def test_a_rank_killed_at_any_point_leaves_the_old_checkpoint(
    server: ForkServer, base_of_two: Base, reference_of_two: str, point: str
):
    root = base_of_two.copy()

    plan = PointPlan(point, victim=1, deadline_s=RANK_DEADLINE_S)
    survivor, victim = server.run_ranks(save_until_point, 2, root, plan)

    assert_reached(victim, point, 1)
    assert not is_committed_at(point)
    assert_tells_the_truth(survivor, point, dead=1)
    assert_two_go_on(server, root, reference_of_two, base_of_two.facts, point)


@pytest.mark.distributed
def test_the_other_rank_passes_all_points_but_the_coordinators(server: ForkServer, base_of_two: Base):
    fates = server.run_ranks(count_points, 2, base_of_two.copy())

    passed = [{name for name, count in fate.one("points")["hits"].items() if count} for fate in fates]
    assert passed[0] == set(POINTS)
    assert passed[1] == set(POINTS) - COORDINATORS_POINTS


def assert_tells_the_truth(survivor: Fate, point: str, *, dead: int) -> None:
    """What the other rank says of the save is not more than what is so, and it says it in time."""
    assert survivor.exit_code == 0, survivor.describe()
    if survivor.has("committed"):
        assert is_committed_at(point), survivor.describe()
        return
    told = survivor.one("not committed")
    assert told["seconds"] < RANK_DEADLINE_S + 3, told
    if POINTS.index(point) > LAST_BEFORE_VERDICT:
        assert told["outcome"] == "unknown", told
    elif told["outcome"] == "failed":
        assert f"rank {dead}" in told["text"], told
    else:
        # It had handed in all that the coordinator needs for the commit, so it cannot know what followed.
        assert (told["outcome"], dead) == ("unknown", 0), told


def assert_two_go_on(server: ForkServer, root: str, reference: str, facts: list, point: str) -> None:
    fates = server.run_ranks(examine, 2, root, reference, facts, not is_committed_at(point))
    assert [fate.exit_code for fate in fates] == [0, 0], [fate.describe() for fate in fates]
    assert_found(fates[0], point)
    assert fates[1].one("examined")["problems"] == []


NOT_OF_A_FIRST_SAVE = {"before_link", "after_link", "before_prune", "mid_prune", "after_prune"}


@pytest.mark.parametrize("point", [point for point in POINTS if point not in NOT_OF_A_FIRST_SAVE])
def test_after_a_first_save_killed_at_any_point_the_same_command_starts_or_resumes(
    server: ForkServer, fast_path: Path, reference: str, point: str
):
    root = str(fast_path / "run")

    fate = server.run(save_until_point, root, PointPlan(point, is_first_save=True))
    assert_reached(fate, point, 1)

    program = examine if is_committed_at(point) else start_again
    examined = server.finish(program, root, reference, fate.all("committed"), True).one("examined")
    assert examined["problems"] == []
    assert examined["latest"] == (1 if is_committed_at(point) else None)
