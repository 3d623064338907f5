"""What this rank has to save: live chunks, the JSON of its values, and the plan that says so to the others."""

from __future__ import annotations

from dckpt.dcp.chunks import LocalChunk, local_chunks, tensor_digest
from dckpt.engine.plan import RECORD_BYTES_MAX, RNG, LocalTensor, RankPlan
from dckpt.format.checksum import digest_bytes
from dckpt.format.values import dump_json
from dckpt.state.naming import DTYPE_NAMES
from dckpt.state.records import Captured, NamedTensor
from dckpt.state.rng import stream_digest


class LocalState:
    """What this rank has to save, in the order of its plan: live chunks and the JSON of its values."""

    def __init__(
        self, captured: Captured, step: int, micro_step: int, coordinates: dict[str, int], world_size: int
    ) -> None:
        self.captured = captured
        self.chunks: list[list[LocalChunk]] = [local_chunks(item.name, item.tensor) for item in captured.tensors]
        self.records: dict[str, bytes] = {
            name: dump_json(value, limit=RECORD_BYTES_MAX) for name, value in captured.values.items()
        }
        self.records[RNG] = dump_json(captured.rng, limit=RECORD_BYTES_MAX)
        self.plan = RankPlan(
            step=step,
            micro_step=micro_step,
            tensors=tuple(
                _describe(item, chunks, is_alone=world_size == 1)
                for item, chunks in zip(captured.tensors, self.chunks, strict=True)
            ),
            values={name: (digest_bytes(data), len(data)) for name, data in self.records.items()},
            rng={stream: stream_digest(value) for stream, value in captured.rng.items()},
            coordinates=coordinates,
        )


def _describe(item: NamedTensor, chunks: list[LocalChunk], *, is_alone: bool) -> LocalTensor:
    shape = tuple(item.tensor.shape)
    dtype = DTYPE_NAMES[item.tensor.dtype]
    # Shape and dtype go into the digest: equal bytes of another shape are another value. One rank has nobody to differ from.
    is_compared = item.replication == "checked" and not is_alone
    digest = f"{dtype}{list(shape)}{tensor_digest(item.tensor)}" if is_compared else None
    return LocalTensor(item.name, dtype, shape, tuple((c.offsets, c.sizes) for c in chunks), digest, item.is_frozen)
