"""One committed checkpoint as this rank sees it: per-rank records resolved to plain names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dckpt.dcp.read import CheckpointFiles
from dckpt.errors import CorruptCheckpointError
from dckpt.format.accumulation import GRADIENTS
from dckpt.format.index import LayoutIndex
from dckpt.format.manifest import Manifest
from dckpt.format.values import load_json
from dckpt.planning.carry import carried_tensors, part_of, refused_records
from dckpt.planning.records import RECORD_BYTES_MAX, RNG, record_name, values_record_name


def _ensure_streams(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CorruptCheckpointError(
            f"Record {name}: expected random streams by name, found {type(value).__name__}. Use an older step.",
            key=name,
            field=RNG,
            expected="an object",
            found=type(value).__name__,
        )
    return value


class SavedState:
    """The view that `TrainState.plan_restore` takes. Reads this rank's records when made, tensors never.

    source_rank: which saving rank stood where this one stands; None if the mesh is another one.
    """

    def __init__(
        self,
        manifest: Manifest,
        index: LayoutIndex,
        files: CheckpointFiles,
        *,
        source_rank: int | None,
    ) -> None:
        self.manifest = manifest
        self.index = index
        self.is_same_mesh = source_rank is not None
        self.world_size = manifest.world_size
        self.step = manifest.step
        self.generation = manifest.generation
        self.aliases: Mapping[str, str] = manifest.aliases
        self.parts = manifest.parts
        self._source_rank = source_rank or 0
        self._rank_tensors = frozenset(manifest.rank_tensors)
        self._values = dict(manifest.values)
        self.rng: dict[str, Any] = {}
        for component in manifest.rank_values:
            name = values_record_name(self._source_rank, component)
            if name not in index:
                continue
            value = load_json(files.read_bytes(name, limit=RECORD_BYTES_MAX), key=name, limit=RECORD_BYTES_MAX)
            if component == RNG:
                self.rng = _ensure_streams(value, name)
            else:
                self._values[component] = value

    def stored_name(self, name: str) -> str:
        """Under which name the shard files hold the tensor `name` for this rank."""
        return record_name(self._source_rank, name) if name in self._rank_tensors else name

    def tensors(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Plain name -> (safetensors dtype, global shape) of everything that this rank may load."""
        found = {}
        for name in self.index.names():
            if not name.startswith("rank."):
                meta = self.index.meta(name)
                found[name] = (meta.dtype, meta.shape)
        for name in self._rank_tensors:
            stored = self.stored_name(name)
            if stored in self.index:
                meta = self.index.meta(stored)
                found[name] = (meta.dtype, meta.shape)
        return found

    def values(self) -> Mapping[str, Any]:
        """Component -> tagged JSON."""
        return self._values

    def carried_tensors(self) -> tuple[str, ...]:
        """Tensors that differed by rank and are taken from rank 0 because the mesh changed."""
        return () if self.is_same_mesh else carried_tensors(self._rank_tensors, self.parts)

    def refusals(self, wanted_parts: frozenset[str]) -> list[str]:
        """What differed by rank and cannot be carried over to another mesh, among the parts that are wanted."""
        if self.is_same_mesh:
            return []
        refused = refused_records(self._rank_tensors, self.manifest.rank_values, self.parts, world_size=self.world_size)
        return [
            text if name == GRADIENTS else f"{text}; make it equal on every rank, or load without it (parts=...)"
            for name, text in refused.items()
            if part_of(name, self.parts) in wanted_parts
        ]
