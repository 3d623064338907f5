"""A progress bar on standard error, for whoever sits at a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

OnCheckpoint = Callable[[str, int], None]
OnBytes = Callable[[int], None]


@contextmanager
def reading_progress(*, is_shown: bool) -> Iterator[tuple[OnCheckpoint | None, OnBytes | None]]:
    """Callbacks that move the bar: a checkpoint of so many bytes begins; so many were read (any thread)."""
    if not is_shown:
        yield None, None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as Speed

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        Speed(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        current: list[TaskID] = []

        def on_checkpoint(name: str, total: int) -> None:
            for task in current:
                progress.remove_task(task)
            current[:] = [progress.add_task(name, total=total)]

        def on_bytes(count: int) -> None:
            progress.advance(current[0], count)

        yield on_checkpoint, on_bytes
