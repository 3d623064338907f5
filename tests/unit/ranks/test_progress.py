"""Heartbeats and the watch over them, with the clock passed in."""

from __future__ import annotations

from dckpt.ranks.progress import Heartbeat, StallWatch


def test_a_beat_without_progress_is_not_posted() -> None:
    heartbeat = Heartbeat(deadline_s=60, world_size=2)

    assert heartbeat.due(0, now=0.0)
    assert not heartbeat.due(0, now=10.0)
    assert heartbeat.due(1, now=10.0)


def test_beats_are_throttled_and_none_is_forgotten() -> None:
    heartbeat = Heartbeat(deadline_s=60, world_size=2)
    assert heartbeat.due(1, now=0.0)

    assert not heartbeat.due(2, now=0.1)
    assert heartbeat.due(2, now=0.3)


def test_the_pause_shrinks_with_the_deadline_and_grows_with_the_world() -> None:
    tiny, wide = Heartbeat(deadline_s=1.2, world_size=2), Heartbeat(deadline_s=600, world_size=4096)
    assert tiny.due(1, now=0.0)
    assert wide.due(1, now=0.0)

    assert tiny.due(2, now=0.11)
    assert not wide.due(2, now=0.9)
    assert wide.due(2, now=1.1)


def test_waiting_counts_as_progress_of_the_coordinator() -> None:
    heartbeat = Heartbeat(deadline_s=60, world_size=2)

    assert heartbeat.tick(0.0)
    assert not heartbeat.tick(0.1)
    assert heartbeat.tick(0.3)


def test_a_rank_counts_from_its_last_change() -> None:
    watch = StallWatch([1, 2], now=0.0, deadline_s=10)
    watch.observe({1: 0, 2: 3}, now=6.0)
    assert watch.stalled([1, 2], now=9.9) == []

    watch.observe({1: 0, 2: 3}, now=10.0)

    assert watch.stalled([1, 2], now=10.0) == [1]
    assert watch.left_s(2, now=10.0) == 6.0
    assert watch.stalled([1, 2], now=16.0) == [1, 2]


def test_a_restarted_counter_is_a_change() -> None:
    watch = StallWatch([1], now=0.0, deadline_s=10)
    watch.observe({1: 5}, now=1.0)
    watch.observe({1: 0}, now=8.0)

    assert watch.stalled([1], now=17.0) == []
