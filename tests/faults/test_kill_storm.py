"""SIGKILL at random times: hundreds of processes, each resuming from what the one before it left when it was killed.

The named points of test_kill_points.py reach each stage; this reaches what lies between them. One chain of processes
works on one run until `CHAIN` of them are dead. `DCKPT_FAULT_SCALE=20` makes the campaign 20 times as long.
"""

from __future__ import annotations

import random
import signal
import statistics
from collections import Counter
from pathlib import Path

import pytest

from tests.support.crash_runs import commit_steps, storm_trial
from tests.support.fork_server import Ending, Fate, ForkServer

pytestmark = pytest.mark.crash

CHAIN = 15

PHASES = {"start": "found", "ready": "committed", "about to prune": "pruned", "pruning": "pruned"}
"""Where a random delay begins, and the report that marks the end of the window."""

WEIGHTS = (1, 4, 2, 3)


def measure_windows(server: ForkServer, root: str, reference: str) -> dict[str, float]:
    """How long each window lasts when nothing interrupts it."""
    spans: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for _ in range(3):
        fate = server.run(storm_trial, root, reference, [], ending=Ending(on="pruned"))
        for begin, end in PHASES.items():
            begin_s = fate.one(begin)["at"]
            spans[begin].append(min(report["at"] for report in fate.all(end) if report["at"] > begin_s) - begin_s)
    return {phase: statistics.median(found) for phase, found in spans.items()}


class Chain:
    """One run and what may be found in it; `tally` counts what the killed processes left.

    `at_least` is the last step acknowledged or seen, `at_most` the last one that a save was begun for.
    """

    def __init__(self, server: ForkServer, root: str, reference: str, tally: Counter[str]) -> None:
        self.server, self.root, self.reference, self.tally = server, root, reference, tally
        self.acknowledged = server.finish(commit_steps, root, 2).all("committed")[-1]
        self.at_least = self.at_most = self.acknowledged["step"]

    def run(self, ending: Ending) -> None:
        fate = self.server.run(storm_trial, self.root, self.reference, [self.acknowledged], ending=ending)
        assert fate.exit_code == -signal.SIGKILL, fate.describe()
        self.tally["killed"] += fate.ended_by_us
        if not fate.has("found"):
            return
        self._judge(fate)
        for report in fate.all("saving"):
            self.at_most = report["step"]
        for report in fate.all("committed"):
            self.acknowledged, self.at_least = report, report["step"]

    def _judge(self, fate: Fate) -> None:
        """What this process found is what the one before it left."""
        found = fate.one("found")
        assert found["problems"] == [], found
        assert self.at_least <= found["latest"] <= self.at_most, (found, self.at_least, self.at_most)
        if found["latest"] < self.at_most:
            self.tally["old"] += 1
        else:
            self.tally["new, acknowledged" if self.at_least == self.at_most else "new"] += 1
        self.at_least = self.at_most = found["latest"]
        for prefix in (".tmp-", ".trash-"):
            self.tally[f"left {prefix}"] += any(name.startswith(prefix) for name in found["remains"])
        for swept in fate.all("swept"):
            assert swept["left"] == [], swept


def storm(server: ForkServer, base: Path, reference: str, rng: random.Random, trials: int) -> Counter[str]:
    """Kills until so many processes died while they did something."""
    windows = measure_windows(server, _start(server, base, "calibration"), reference)
    tally: Counter[str] = Counter()
    chain: Chain | None = None
    for number in range(trials):
        if number % CHAIN == 0:
            chain = Chain(server, str(base / f"run{number}"), reference, tally)
        phase = rng.choices(list(PHASES), weights=WEIGHTS)[0]
        assert chain is not None
        chain.run(Ending(on=phase, delay_s=rng.uniform(0, 1.3 * windows[phase])))
    print(f"{trials} trials, windows {windows}: {dict(tally)}")
    return tally


def _start(server: ForkServer, base: Path, name: str) -> str:
    server.finish(commit_steps, str(base / name), 2)
    return str(base / name)


def assert_it_was_a_storm(tally: Counter[str], trials: int) -> None:
    assert tally["killed"] == trials
    for what in ("old", "new, acknowledged", "left .tmp-"):
        assert tally[what] >= trials // 33, (what, tally)
    assert tally["left .trash-"] > 0, "no deletion was caught half-way"


def test_a_hundred_random_kills_tear_nothing_and_lose_nothing_acknowledged(
    server: ForkServer, fast_path: Path, reference: str, rng: random.Random
):
    tally = storm(server, fast_path, reference, rng, 100)

    assert_it_was_a_storm(tally, 100)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_a_long_storm_of_random_kills_tears_nothing_and_loses_nothing_acknowledged(
    server: ForkServer, fast_path: Path, reference: str, rng: random.Random, scale: int
):
    tally = storm(server, fast_path, reference, rng, 200 * scale)

    assert_it_was_a_storm(tally, 200 * scale)
