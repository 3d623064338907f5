"""`DckptReader`: stock `dcp.load` reads a dckpt checkpoint, every byte verified, nothing unpickled from it."""

from __future__ import annotations

import io
import os
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from dckpt.blocks.read import read_checked
from dckpt.catalog.catalog import Catalog
from dckpt.dcp.location import is_storage_url, split_checkpoint_url
from dckpt.dcp.read import TORCH_DTYPES, CheckpointFiles
from dckpt.dcp.spans import BoxRead
from dckpt.errors import ConfigError, CorruptCheckpointError, StorageMissingError
from dckpt.format.index import Chunk, LayoutIndex, parse_index
from dckpt.format.manifest import Manifest
from dckpt.format.values import decode_value
from dckpt.state.tree import unflatten
from dckpt.storage.opening import open_storage


class DckptReader(StorageReader):
    """Loads the checkpoint at `url`: `dcp.load(state_dict, storage_reader=DckptReader("ckpt/step-100"))`.

    Takes checkpoints of `DckptWriter` and of `Checkpointer` (name the step's directory; names are then `model.<fqn>`,
    `optim.<fqn>.exp_avg`). Raises `CorruptCheckpointError` for any byte that does not match its checksum.
    Source of the contract: torch/distributed/checkpoint/storage.py.
    """

    def __init__(self, url: str | os.PathLike[str] | None = None) -> None:
        self._url = None if url is None else os.fspath(url)
        self._manifest: Manifest | None = None
        self._index: LayoutIndex | None = None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """True for local paths and `file://` URLs."""
        return is_storage_url(os.fspath(checkpoint_id))

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A new load begins, at `checkpoint_id` if given."""
        if checkpoint_id is not None:
            self._url = os.fspath(checkpoint_id)
        self._manifest = self._index = None

    def _location(self) -> tuple[str, str]:
        if self._url is None:
            raise ConfigError("DckptReader: expected a url, found none. Give DckptReader(url) or checkpoint_id=url.")
        return split_checkpoint_url(self._url)

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        """What the checkpoint holds, in DCP's terms; tied names appear under every name that they had.

        A catch-all called `kwargs` would tell torch that there is metadata by rank: after a failure on one rank alone, that
        rank would ask again with `rank=`, and go on without the collectives in which the others wait (sdl:226-247).
        """
        del args, options
        root, name = self._location()
        storage = open_storage(root)
        try:
            self._manifest, _ = Catalog(storage).read_manifest(name)
        except StorageMissingError as error:
            raise ConfigError(
                f"DckptReader({self._url}): expected a checkpoint's directory with a manifest.json, found none. For a run, "
                "name one of its checkpoints (`dckpt ls` lists them)."
            ) from error
        entry = self._manifest.index_entry
        self._index = parse_index(read_checked(storage, name, entry), key=entry.key_in(name))
        tensors = {tensor: self._tensor_metadata(tensor) for tensor in self._index.names()}
        for alias, canonical in self._manifest.aliases.items():
            tensors[alias] = tensors[canonical]
        values = {value: BytesStorageMetadata() for value in self._manifest.values}
        planner_data = self._manifest.planner_data
        return Metadata(
            state_dict_metadata={**tensors, **values},
            planner_data=decode_value(planner_data, key=name, path="planner_data") if planner_data else None,
            storage_data={},
        )

    def _tensor_metadata(self, name: str) -> TensorStorageMetadata:
        assert self._index is not None
        meta = self._index.meta(name)
        chunks = [
            ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
            for chunk in self._index.chunks(name)
        ]
        properties = TensorProperties(dtype=TORCH_DTYPES[meta.dtype])
        return TensorStorageMetadata(properties, torch.Size(meta.shape), chunks)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up: `read_metadata` ran on every rank."""
        del metadata, is_coordinator, args, kwargs

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Unchanged."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fills what the plan asks for and returns a finished future."""
        assert self._manifest is not None
        assert self._index is not None
        root, name = self._location()
        with CheckpointFiles(open_storage(root), name, self._manifest, self._index) as files:
            tensors = [item for item in plan.items if item.type != LoadItemType.BYTE_IO]
            targets = [planner.resolve_tensor(item) for item in tensors]
            boxes = [self._box(item, target) for item, target in zip(tensors, targets, strict=True)]
            files.read_boxes(boxes, on_bytes=lambda _: None)
            for item, target in zip(tensors, targets, strict=True):
                planner.commit_tensor(item, target)
            for item in plan.items:
                if item.type == LoadItemType.BYTE_IO:
                    planner.load_bytes(item, self._value(item))
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _value(self, item: ReadItem) -> io.BytesIO:
        """The form in which DCP hands over values; made here from checked JSON, never read from the checkpoint."""
        assert self._manifest is not None
        name = item.storage_index.fqn
        value = decode_value(self._manifest.values[name], key="manifest.json", path=f"values.{name}")
        data = io.BytesIO()
        torch.save(unflatten(value, self._fetch_refused), data)
        data.seek(0)
        return data

    def _fetch_refused(self, name: str) -> torch.Tensor:
        raise ConfigError(
            f"DckptReader({self._url}): value refers to tensor {name}, which dcp.load cannot place inside a value. Load this "
            "checkpoint with dckpt.Checkpointer."
        )

    def _box(self, item: ReadItem, target: torch.Tensor) -> BoxRead:
        assert self._manifest is not None
        assert self._index is not None
        name = self._manifest.aliases.get(item.storage_index.fqn, item.storage_index.fqn)
        chunk = self._chunk(name, item.storage_index)
        return BoxRead(chunk, self._index.meta(name).dtype, tuple(item.storage_offsets), tuple(item.lengths), target)

    def _chunk(self, name: str, index: MetadataIndex) -> Chunk:
        assert self._index is not None
        chunks = self._index.chunks(name)
        if index.index is not None and index.index < len(chunks):
            hinted = chunks[index.index]
            if index.offset is None or hinted.offsets == tuple(index.offset):
                return hinted
        for chunk in chunks:
            if index.offset is None or chunk.offsets == tuple(index.offset):
                return chunk
        raise CorruptCheckpointError(
            f"Checkpoint {self._url}: expected a chunk of {name} at {tuple(index.offset or ())}, found "
            f"{[chunk.offsets for chunk in chunks]}. The plan and the index disagree; load again.",
            key=name,
            field="chunks",
        )
