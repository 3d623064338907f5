"""A shard file's bytes gathered from the files of another checkpoint: verified as they are read, in bounded memory."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from dckpt.blocks.boxes import GAP_BYTES_MAX, SPAN_BYTES_MAX, Box, Copy, plan_copies, plan_spans
from dckpt.blocks.read import ReadMemory
from dckpt.blocks.source import PIECE_BYTES, PieceMemory, parts_of_piece
from dckpt.blocks.verified_files import SUMS_BYTES_MAX, VerifiedFiles
from dckpt.blocks.write import WRITER_THREADS
from dckpt.format.checksum import BLOCK_BYTES
from dckpt.format.index import Chunk
from dckpt.format.shard_file import DTYPES, ShardFilePlan

GATHER_BYTES_MAX = (
    WRITER_THREADS * (PIECE_BYTES + SPAN_BYTES_MAX + GAP_BYTES_MAX + 2 * BLOCK_BYTES) + SUMS_BYTES_MAX + 128 * 2**20
)
"""Memory of a process that gathers, however large the checkpoint is, beside its layout and the program itself: a piece and a
span for each writing thread, checksums of the files that are open, and 128 MiB for plans, headers and records."""


@dataclass(frozen=True, slots=True)
class Gathered:
    """A tensor of the file: the box of it that the file holds, and the saved chunks that share elements with the box."""

    box: Box
    chunks: tuple[Chunk, ...]


class SpanMemory(threading.local):
    """Memory for one span, of each thread its own; kept from file to file, because first touch is dear."""

    def __init__(self) -> None:
        self.memory = ReadMemory()


class GatheredSource:
    """A `FileSource`. `tensors`, in the order of the plan: where each comes from, or its bytes."""

    def __init__(
        self, plan: ShardFilePlan, tensors: Sequence[Gathered | bytes], files: VerifiedFiles, spans: SpanMemory
    ) -> None:
        self.plan = plan
        self._tensors = tensors
        self._files = files
        self._spans = spans

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.plan.size

    def piece(self, begin: int, end: int, memory: PieceMemory) -> memoryview:
        """Reads what lies in the range from the other checkpoint, neighbouring ranges together.

        Raises `CorruptCheckpointError` if a byte of it does not match its checksum in two reads.
        """
        piece = memory.take(end - begin)
        copies: list[Copy] = []
        for number, offset, target in parts_of_piece(self.plan, begin, piece):
            at = self.plan.begins[number] + offset - begin
            found = self._tensors[number]
            if isinstance(found, bytes):
                target[:] = found[offset : offset + len(target)]
            else:
                item = DTYPES[self.plan.tensors[number].dtype]
                copies += plan_copies(found.chunks, found.box, item, offset, len(target), at)
        self._run(copies, piece)
        return piece

    def in_place(self, begin: int, end: int) -> None:
        """Nothing lies in memory yet."""
        del begin, end

    def _run(self, copies: list[Copy], piece: memoryview) -> None:
        memory = self._spans.memory
        for span in plan_spans(copies):
            with self._files.borrow(span.file) as file:
                data = file.read(span.begin, span.end, memory)
                for copy in span.copies:
                    copy.run(data[copy.begin - span.begin : copy.end - span.begin], piece)
