"""What a run remembers of its random streams: where they stood when the epoch began, and how they ever changed by a resume."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dckpt.format.streams import EPOCH_PREFIX
from dckpt.format.values import JsonValue
from dckpt.state.rng import capture_rng, restore_rng

REMAPS_MAX = 64
"""The newest that are kept in a manifest."""


class RunStreams:
    """`generators`: those of the run, beside the global streams. `remaps`: one record a resume that changed streams.

    `shared`: the streams that were equal on all ranks when more than one rank saved the run last.
    """

    def __init__(self, generators: Mapping[str, Any]) -> None:
        self._generators = generators
        self._epoch_start: tuple[int, Mapping[str, JsonValue]] | None = None
        self.remaps: list[dict[str, Any]] = []
        self.shared: tuple[str, ...] = ()

    def epoch_start(self, epoch: int) -> dict[str, JsonValue]:
        """The streams at the start of the epoch under their names in a checkpoint; nothing if they were not kept."""
        if self._epoch_start is None or self._epoch_start[0] != epoch:
            return {}
        return {f"{EPOCH_PREFIX}{stream}": state for stream, state in self._epoch_start[1].items()}

    @contextmanager
    def at_epoch_start(self, epoch: int) -> Iterator[bool]:
        """See `TrainState.epoch_start_rng`."""
        now = capture_rng(self._generators)
        if self._epoch_start is None or self._epoch_start[0] != epoch:
            self._epoch_start = (epoch, now)
            yield False
            return
        restore_rng(self._epoch_start[1], self._generators)
        try:
            yield True
        finally:
            restore_rng(now, self._generators)

    def restore(self, streams: Mapping[str, JsonValue], epoch: int) -> None:
        """Sets streams that were found to fit; those of the epoch's start are kept for `at_epoch_start`."""
        if not streams:
            return
        start = {
            stream.removeprefix(EPOCH_PREFIX): state
            for stream, state in streams.items()
            if stream.startswith(EPOCH_PREFIX)
        }
        restore_rng(
            {name: state for name, state in streams.items() if not name.startswith(EPOCH_PREFIX)}, self._generators
        )
        self._epoch_start = (epoch, start) if start else None

    def note(self, earlier: Any, remap: dict[str, Any] | None, shared: tuple[str, ...]) -> None:
        """Takes over what a checkpoint says of earlier resumes, and adds this one if it changed streams."""
        self.shared = shared
        known = [item for item in earlier if isinstance(item, dict)] if isinstance(earlier, list) else []
        self.remaps = [*known, *([] if remap is None else [remap])][-REMAPS_MAX:]
