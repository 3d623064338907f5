"""What can be wrong on one rank, between ranks or with their number is caught on all of them: FSDP2 and DDP."""

from __future__ import annotations

import pytest

from tests.support import sabotage_jobs as jobs
from tests.support.sabotage import Outcome

pytestmark = pytest.mark.distributed

CASES = [(kind, case) for kind in ("fsdp", "ddp") for case in jobs.RANK_CASES if kind in case.kinds]
CAUGHT_MIN, CASES_MIN = 0.95, 60
MISSED: dict[tuple[str, str], str] = {}
"""Kind and name of a case that is not caught -> why."""


@pytest.fixture(scope="module", name="saved")
def _saved(ranks, tmp_path_factory):
    made: dict[str, str] = {}

    def run(kind: str) -> str:
        if kind not in made:
            made[kind] = str(tmp_path_factory.mktemp("sabotage") / "run")
            ranks.run(jobs.save, 2, made[kind], kind, {})
        return made[kind]

    return run


@pytest.fixture(scope="module", name="outcomes")
def _outcomes(ranks, saved):
    """All cases of a kind are judged in one job, the first time that one of them is asked for."""
    found: dict[tuple[str, str], Outcome] = {}

    def of(kind: str, case: jobs.RankCase) -> Outcome:
        if (kind, case.name) not in found:
            names = [case.name for case in jobs.RANK_CASES if kind in case.kinds]
            told = ranks.run(jobs.judge_all, 2, saved(kind), kind, names, deadline_s=240)
            assert told[0] == told[1], "all ranks hear the same"
            found.update({(kind, name): one for name, one in zip(names, told[0], strict=True)})
        return found[kind, case.name]

    return of


@pytest.mark.parametrize(("kind", "case"), CASES, ids=lambda value: getattr(value, "name", value).replace(" ", "-"))
def test_it_is_caught_at_the_right_severity_and_named(outcomes, kind, case):
    found = outcomes(kind, case)
    if not case.expected:
        assert found == Outcome({}, {})
        return

    misses = found.misses(case)
    assert bool(misses) == ((kind, case.name) in MISSED), misses


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_fewer_ranks_with_the_same_global_batch_are_information(ranks, saved, kind):
    (found,) = ranks.run(jobs.elsewhere, 1, saved(kind), kind, 8)

    assert found.found == {"global_batch": "info", "world_size": "info", "rank_tensors": "warning"}
    assert "re-derived on every rank: torch" in found.said["world_size"]
    assert "model.norm.running_mean" in found.said["rank_tensors"]


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_fewer_ranks_with_another_global_batch_are_refused(ranks, saved, kind):
    (found,) = ranks.run(jobs.elsewhere, 1, saved(kind), kind, 16)

    assert found.found == {"global_batch": "critical", "world_size": "info", "rank_tensors": "warning"}
    assert "was 8 samples a step and is now 16" in found.said["global_batch"]


def test_an_optimizer_that_was_built_before_the_model_was_sharded_is_refused(ranks, saved):
    found = ranks.run(jobs.optimizer_before_wrapping, 2, saved("fsdp"))

    assert found[0] == found[1]
    assert found[0].found == {"load": "refused"}
    assert "build the optimizer after the model is wrapped" in found[0].said["load"]


def test_nearly_all_of_the_cases_are_caught(outcomes):
    spoiled = [(kind, case) for kind, case in CASES if case.expected]
    caught = [(kind, case) for kind, case in spoiled if not outcomes(kind, case).misses(case)]
    print(f"{len(caught)} of {len(spoiled)} cases caught")

    assert len(spoiled) >= CASES_MIN
    assert len(caught) >= CAUGHT_MIN * len(spoiled)
