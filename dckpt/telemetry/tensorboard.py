"""Loss, learning rate and resumes as TensorBoard events, where TensorBoard is installed. Without torch."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterable
from typing import Any

from dckpt.errors import ConfigError

FLUSH_S = 30


def ensure_installed() -> None:
    """`ConfigError` with what to install."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "tensorboard=: expected the package tensorboard, found none. Install it, or leave the argument out."
        )


class EventLog:
    """Appends to one event file in `directory`. Each step is written once, also by a run that trains it again after a resume."""

    def __init__(self, directory: str) -> None:
        ensure_installed()
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer: Any = EventFileWriter(directory, flush_secs=FLUSH_S)
        self._rates: list[tuple[int, float]] = []
        self._last_loss = -1

    def note_rate(self, step: int, rate: float) -> None:
        """The learning rate that step `step` was trained with; written with the next losses."""
        self._rates.append((step, rate))

    def write_losses(self, losses: Iterable[tuple[int, float]]) -> None:
        """(step, loss) of the history; those that were written before are left out."""
        for step, loss in losses:
            if step > self._last_loss:
                self._add(step, _scalar("train/loss", loss))
                self._last_loss = step
        for step, rate in self._rates:
            self._add(step, _scalar("train/lr", rate))
        self._rates.clear()
        self._writer.flush()

    def write_resume(self, step: int, text: str, *, critical: int, warnings: int) -> None:
        """The report as text, and a marker at the step from which the run goes on."""
        self._last_loss = step
        # A line of Markdown each: TensorBoard renders text so.
        self._add(step, _text("dckpt/resume", "\n\n".join(line.strip() for line in text.splitlines())))
        self._add(step, _scalar("dckpt/resumed_at", float(step)))
        self._add(step, _scalar("dckpt/resume_warnings", float(warnings)))
        self._add(step, _scalar("dckpt/resume_critical", float(critical)))
        self._writer.flush()

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()

    def _add(self, step: int, summary: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))


def _scalar(tag: str, value: float) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary(value=[Summary.Value(tag=tag, simple_value=value)])


def _text(tag: str, text: str) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    tensor = TensorProto(dtype="DT_STRING", string_val=[text.encode()], tensor_shape=shape)
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    return Summary(value=[Summary.Value(tag=tag, metadata=metadata, tensor=tensor)])
