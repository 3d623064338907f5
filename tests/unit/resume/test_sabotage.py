"""What can be wrong with a resume is caught, at the right severity, by a message that names it: on one process."""

from __future__ import annotations

import pytest
import torch

from tests.support.sabotage import Case, Outcome, judge, outcome
from tests.support.sabotage_programs import PROGRAMS, SAVED
from tests.support.sabotage_values import VALUES

CASES = [*VALUES, *PROGRAMS]

CAUGHT_MIN, CASES_MIN = 0.95, 60
MISSED: dict[str, str] = {}
"""Name of a case that is not caught -> why."""


class Cases:
    """Runs each case once; runs that cases load are saved once."""

    def __init__(self, directory) -> None:
        self._directory = directory
        self._saved: dict[str, object] = {}
        self._outcomes: dict[str, Outcome] = {}

    def outcome(self, case: Case) -> Outcome:
        if case.name not in self._outcomes:
            self._outcomes[case.name] = outcome(lambda: self._report(case))
        return self._outcomes[case.name]

    def _report(self, case: Case):
        if case.act is not None:
            return case.act(self._directory / f"act-{len(self._outcomes)}")
        if case.saved not in self._saved:
            root = self._directory / f"saved-{len(self._saved)}"
            SAVED[case.saved](root)
            self._saved[case.saved] = root
        return judge(self._saved[case.saved], case.spoil, **case.build)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return Cases(tmp_path_factory.mktemp("sabotage"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_it_is_caught_at_the_right_severity_and_named(cases, case):
    misses = cases.outcome(case).misses(case)

    assert bool(misses) == (case.name in MISSED), misses


@pytest.mark.parametrize("saved", ["plain", "generator", "extra", "long"])
def test_the_same_run_unspoiled_is_silent(tmp_path, saved):
    options = {
        "generator": {"generators": {"augment": torch.Generator()}},
        "extra": {"extra": {"notes": torch.ones(3)}},
    }
    SAVED[saved](tmp_path / "run")
    report = judge(tmp_path / "run", **options.get(saved, {}))

    assert not report.warnings, report.text()
    assert not report.critical, report.text()


def test_nearly_all_of_the_cases_are_caught(cases):
    caught = [case for case in CASES if not cases.outcome(case).misses(case)]
    print(f"{len(caught)} of {len(CASES)} cases caught")

    assert len({case.name for case in CASES}) == len(CASES) >= CASES_MIN
    assert len(caught) >= CAUGHT_MIN * len(CASES)
