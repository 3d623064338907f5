"""`dckpt pin` and `dckpt unpin`: which checkpoint of a run no policy may expire."""

from __future__ import annotations

from dataclasses import dataclass

from dckpt.catalog.catalog import Catalog
from dckpt.errors import ConfigError
from dckpt.tools.target import Target, open_run, open_target, split_step


@dataclass(frozen=True, slots=True)
class PinChange:
    """What was asked for, and whether anything had to be done for it."""

    url: str
    checkpoint: str
    is_pinned: bool
    is_changed: bool


def pin(text: str) -> PinChange:
    """The checkpoint that `RUN@STEP` or its directory names is pinned, durably."""
    target = _open_in_run(text)
    assert target.checkpoint is not None
    catalog = Catalog(target.storage)
    was_pinned = target.checkpoint in catalog.pins()
    # Also where it is there: its maker may have died before the name was durable.
    catalog.pin(target.checkpoint)
    return PinChange(target.storage.url, target.checkpoint, is_pinned=True, is_changed=not was_pinned)


def unpin(text: str) -> PinChange:
    """Takes the pin away; by its full name also one whose checkpoint is gone."""
    place, step = split_step(text)
    if step is not None and step.startswith("step-"):
        storage = open_run(place)
        if step in Catalog(storage).pins():
            Catalog(storage).unpin(step)
            return PinChange(storage.url, step, is_pinned=False, is_changed=True)
    target = _open_in_run(text)
    assert target.checkpoint is not None
    catalog = Catalog(target.storage)
    was_pinned = target.checkpoint in catalog.pins()
    catalog.unpin(target.checkpoint)
    return PinChange(target.storage.url, target.checkpoint, is_pinned=False, is_changed=was_pinned)


def _open_in_run(text: str) -> Target:
    target = open_target(text)
    if target.checkpoint is None:
        raise ConfigError(f"{text}: expected RUN@STEP or a checkpoint's directory, found a run. Say which step.")
    if not target.is_run:
        raise ConfigError(
            f"{text}: expected a checkpoint of a run, found a stand-alone one. Nothing ever expires that; no pin is needed."
        )
    return target
