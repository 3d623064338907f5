"""How long one of thousands of ranks takes until it knows its byte ranges, on the ranks that saved or on others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.simulation.stopwatch import Stopwatch
from dckpt.blocks.read import read_checked
from dckpt.catalog.catalog import Catalog
from dckpt.dcp.read import CheckpointFiles
from dckpt.dcp.spans import plan_reads, plan_spans
from dckpt.engine.saved_state import SavedState
from dckpt.format.index import parse_index
from dckpt.state.train_state import TrainState
from dckpt.storage.base import Storage


@dataclass(frozen=True)
class Opening:
    """Processor seconds by part, seconds by the clock, and what the rank found."""

    parts: dict[str, float]
    clock_s: float
    num_reads: int
    num_files: int
    bytes_read: int
    manifest_bytes: int
    index_bytes: int


def open_on_one_rank(
    storage: Storage, state: TrainState, *, source_rank: int | None, others: Sequence[str] = ()
) -> Opening:
    """From the newest checkpoint's name to the spans that this rank would read. No tensor is read.

    others: patterns of names that only other ranks of the job have (pipeline stages).
    """
    watch = Stopwatch()
    name = Catalog(storage).line()[0].name
    with watch.timed("read the manifest"):
        manifest, _ = Catalog(storage).read_manifest(name)
    entry = manifest.index_entry
    with watch.timed("read the index"):
        index = parse_index(read_checked(storage, name, entry), key=entry.path)
    with watch.timed("open the checkpoint"):
        files = CheckpointFiles(storage, name, manifest, index)
        saved = SavedState(manifest, index, files, source_rank=source_rank)
    with watch.timed("fit the state"):
        plan = state.plan_restore(saved, allow_unexpected=others)
    assert not plan.differences, plan.differences[:3]
    with watch.timed("find the chunks"):
        targets = [(saved.stored_name(tensor), target) for tensor, target in plan.reads]
        reads = plan_reads(targets, index)
    with watch.timed("plan the spans"):
        spans = plan_spans(reads)
    files.close()
    clock, cpu = watch.take()
    return Opening(
        parts=cpu,
        clock_s=sum(clock.values()),
        num_reads=len(reads),
        num_files=len({span.file for span in spans}),
        bytes_read=sum(span.max_bytes for span in spans),
        manifest_bytes=storage.size(f"{name}/manifest.json"),
        index_bytes=entry.size,
    )
