"""Named points at which a test can stop, kill or fail the process. In production each costs one `None` check.

Names are listed in `POINTS`, so that one parametrized test covers a new point on the day it is added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

POINTS: tuple[str, ...] = (
    "before_plan",
    "before_generation",
    "after_generation",
    "plan_agreed",
    "before_stage",
    "after_stage",
    "before_shard_write",
    "mid_shard_write",
    "after_shard_write",
    "after_shard_sync",
    "before_link",
    "after_link",
    "after_directory_sync",
    "before_listing",
    "before_index",
    "before_manifest",
    "after_manifest",
    "before_commit",
    "before_rename",
    "after_rename",
    "after_commit",
    "before_prune",
    "mid_prune",
    "after_prune",
)

_armed: dict[str, Callable[[], None]] | None = None
_hits: dict[str, int] = {}


def arm(actions: Mapping[str, Callable[[], None]]) -> None:
    """Run `actions[name]` each time the point `name` is passed, and count the passes. Replaces what was armed."""
    global _armed
    unknown = set(actions) - set(POINTS)
    assert not unknown, f"no such failpoint: {sorted(unknown)}"
    _armed = dict(actions)
    _hits.clear()


def disarm() -> None:
    """Back to production: nothing runs, nothing is counted."""
    global _armed
    _armed = None


def hits(name: str) -> int:
    """How often the point was passed since `arm`."""
    return _hits.get(name, 0)


def reach(name: str) -> None:
    """Pass the point `name`; production code calls this."""
    if _armed is None:
        return
    _hits[name] = _hits.get(name, 0) + 1
    action = _armed.get(name)
    if action is not None:
        action()
