"""Random streams over changing numbers of ranks: exact, copied or derived, never replayed, and always said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import RankPool
from tests.support.rng_jobs import SHARED, draw_save_draw, losses_in_slots

pytestmark = pytest.mark.distributed


def test_over_a_history_of_ranks_no_number_comes_twice_and_shared_streams_stay_shared(
    ranks: RankPool, tmp_path: Path
) -> None:
    root, seen, expected = str(tmp_path / "run"), [], None
    for seed, world_size in enumerate((2, 4, 2, 2, 3, 1, 2), start=1):
        found: list[Any] = ranks.run(draw_save_draw, world_size, root, seed)
        for drawn, after, *_ in found:
            for stream in SHARED:
                assert drawn[stream] == found[0][0][stream], "shared streams are equal on all ranks"
                assert after[stream] == found[0][1][stream]
        if expected is not None:
            for stream in SHARED:
                assert found[0][0][stream] == expected[stream], "a shared stream goes on where it was saved"
        expected = found[0][1]
        seen += [
            number
            for drawn, *_ in found
            for stream, values in drawn.items()
            if stream not in SHARED
            for number in values
        ]

    assert len(set(seen)) == len(seen)
    assert len(seen) == (2 + 4 + 2 + 2 + 3 + 1 + 2) * 3 * 4


def test_what_became_of_the_streams_is_in_the_next_manifests(ranks: RankPool, tmp_path: Path) -> None:
    root, last = str(tmp_path / "run"), None
    remaps: list[Any] = []
    for seed, world_size in enumerate((2, 4, 4, 2), start=1):
        ((_, _, told, name, remaps), *others) = ranks.run(draw_save_draw, world_size, root, seed)
        assert all(found[4] == remaps for found in others)
        shown = subprocess.run(
            [Path(sys.executable).with_name("dckpt"), "show", f"{root}@{seed}", "--json"],
            capture_output=True,
            check=True,
        )
        facts = json.loads(shown.stdout)["facts"]
        assert facts.get("rng_remaps", []) == remaps
        if world_size == 4 and seed == 3:
            assert set(told.values()) == {"exact"}
        last = name

    assert last is not None
    assert [(remap["saved_by"], remap["continued_by"]) for remap in remaps] == [(2, 4), (4, 2)]
    assert [remap["resumed_from"] for remap in remaps] == ["step-0000000001.g0001", "step-0000000003.g0003"]
    for remap in remaps:
        assert sorted(remap["streams"]["copied"]) == sorted(SHARED)
        assert sorted(remap["streams"]["re-derived"]) == ["generator:own", "python", "torch"]


@pytest.mark.parametrize(
    ("policy", "world_size", "is_refused"),
    [("refuse", 2, False), ("exact", 2, False), ("refuse", 3, True), ("exact", 3, True), ("fresh", 3, False)],
)
def test_streams_go_on_as_the_caller_chose(
    ranks: RankPool, tmp_path: Path, policy: str, world_size: int, is_refused: bool
) -> None:
    root = str(tmp_path / "run")
    saved = ranks.run(draw_save_draw, 2, root, 1)
    found = ranks.run(draw_save_draw, world_size, root, 2, policy)

    if is_refused:
        for kind, message in found:
            assert kind == "IncompatibleStateError"
            assert "random stream torch: re-derived" in message
            assert ("numpy: copied" in message) == (policy == "exact")
        return
    if policy == "fresh":
        fresh = ranks.run(draw_save_draw, world_size, str(tmp_path / "other"), 2)
        assert [result[0] for result in found] == [result[0] for result in fresh]
        assert set(found[0][2].values()) == {"left as seeded, by choice"}
        assert list(found[0][4][0]["streams"]) == ["left as seeded, by choice"]
        return
    assert [result[0] for result in found] == [result[1] for result in saved]


def test_dropout_in_slots_does_not_depend_on_the_number_of_ranks(ranks: RankPool) -> None:
    alone, *_ = ranks.run(losses_in_slots, 1, True, "single", has_group=False)
    assert len(alone) == 24
    for world_size in (1, 2, 4):
        merged: dict[Any, float] = {}
        for losses in ranks.run(losses_in_slots, world_size, True, "ddp"):
            merged |= losses
        assert merged.keys() == alone.keys()
        for place, loss in merged.items():
            # Before the first step nothing was reduced, so nothing may differ at all.
            assert loss == alone[place] if place[0] == 0 else loss == pytest.approx(alone[place], rel=1e-5), place
    without = {place: loss for found in ranks.run(losses_in_slots, 2, False, "ddp") for place, loss in found.items()}
    assert sum(without[0, number] == alone[0, number] for number in range(8)) < 4
