"""Loads shared by real ranks: storage is read once however many want it, whatever the layouts; and nobody waits for ever."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.damage_jobs import flip
from tests.support.ranks import RankLost, RankPool
from tests.support.sharing_jobs import Loaded, load_and_fall, load_tensors, save_tensors, state_bytes

pytestmark = pytest.mark.distributed

SURPLUS = 1.05
DEADLINE_S = 2.5
MARGIN_S = 2.0


@pytest.fixture(scope="module")
def saved(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(layout, world size) -> run directory, made when first asked for."""
    made: dict[tuple[str, int], str] = {}

    def get(layout: str, world_size: int) -> str:
        if (layout, world_size) not in made:
            root = str(tmp_path_factory.mktemp("run") / "gpt")
            ranks.run(save_tensors, world_size, root, layout)
            made[layout, world_size] = root
        return made[layout, world_size]

    return get


@pytest.mark.parametrize(
    ("saved_as", "loaded_as", "by_tcp"),
    [
        (("rows", 2), ("replicas", 4), False),
        (("rows", 2), ("replicas", 4), True),
        (("rows", 2), ("four replicas of rows", 8), False),
        (("columns", 4), ("columns", 2), False),
        (("columns", 4), ("rows", 3), False),
        (("columns", 4), ("rows", 3), True),
        (("rows", 2), ("columns", 4), False),
        (("rows", 2), ("rows and columns", 4), True),
        (("strided", 4), ("rows and columns", 4), False),
        (("rows", 2), ("strided", 4), False),
        (("strided", 4), ("rows", 3), False),
    ],
)
def test_every_bit_arrives_and_storage_is_read_once(ranks, saved, saved_as, loaded_as, by_tcp):
    found: list[Loaded] = ranks.run(load_tensors, loaded_as[1], saved(*saved_as), loaded_as[0], by_tcp)

    assert [one.error for one in found] == [""] * loaded_as[1]
    assert all(one.is_equal for one in found)
    # Beside the state: the first block of each file, read again for its header by whoever verifies it.
    headers = saved_as[1] * 2 * 2**16
    assert sum(one.bytes_read for one in found) <= SURPLUS * state_bytes() + headers
    if "replicas" in loaded_as[0]:
        assert max(one.bytes_read for one in found) < 0.6 * state_bytes(), "one rank read nearly all of it"


class Executioner:
    """Kills the stopped victim once every other rank has ended its wait, so that the pool gets its answer."""

    def __init__(self, signals: Path, victim: int, world_size: int) -> None:
        self._signals, self._victim = signals, victim
        self._others = [rank for rank in range(world_size) if rank != victim]

    def start(self, pids: list[int]) -> None:
        threading.Thread(target=self._run, args=(pids[self._victim],), daemon=True).start()

    def _run(self, pid: int) -> None:
        limit = time.monotonic() + 40
        while time.monotonic() < limit and not all((self._signals / str(rank)).exists() for rank in self._others):
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.crash
@pytest.mark.parametrize(
    ("victim", "signal_name", "by_tcp"),
    [(2, "SIGKILL", False), (2, "SIGKILL", True), (1, "SIGSTOP", False), (1, "SIGSTOP", True), (0, "SIGKILL", False)],
)
def test_a_rank_that_falls_in_the_middle_is_named_by_all_others_in_time(
    ranks, saved, tmp_path, victim, signal_name, by_tcp
):
    executioner = Executioner(tmp_path, victim, 4)
    args = (saved("rows", 2), victim, signal_name, str(tmp_path), DEADLINE_S, by_tcp)
    found = ranks.run(load_and_fall, 4, *args, allow_loss=True, on_started=executioner.start)

    assert isinstance(found.pop(victim), RankLost)
    # With rank 0 the store is gone: nobody hears from the others in which phase they lost it.
    errors = {re.sub(r"phase \S+", "phase", one.error) if victim == 0 else one.error for one in found}
    assert len(errors) == 1, found
    assert "the coordinator (rank 0) cannot be reached" in found[0].error or f"rank {victim} " in found[0].error, found
    assert found[0].error.startswith(("PeerFailedError", "CoordinationTimeoutError"))
    assert max(one.seconds for one in found) < DEADLINE_S + MARGIN_S, found


def test_damage_that_one_rank_reads_walks_all_ranks_back_together(ranks, tmp_path):
    root = tmp_path / "run"
    ranks.run(save_tensors, 2, str(root), "rows", 2)
    newest = max(root.glob("step-0000000002*/*/*.safetensors"), key=lambda path: path.stat().st_size)
    flip(str(newest), newest.stat().st_size // 2, 0x04)
    found: list[Loaded] = ranks.run(load_tensors, 4, str(root), "replicas")

    assert [(one.error, one.step, one.is_equal) for one in found] == [("", 1, True)] * 4


def test_an_error_of_the_storage_under_one_rank_is_raised_on_all(ranks, tmp_path):
    root = tmp_path / "run"
    ranks.run(save_tensors, 2, str(root), "rows")
    path = max(root.glob("step-*/*/*.safetensors"), key=lambda path: path.stat().st_size)
    path.unlink()
    path.symlink_to(path.name)  # a loop
    found: list[Loaded] = ranks.run(load_tensors, 4, str(root), "replicas")

    assert all(one.error for one in found)
    assert len({one.error for one in found}) == 1
