"""`DckptWriter`: stock `dcp.save` and `dcp.async_save` commit a whole, durable checkpoint with it, or nothing."""

from __future__ import annotations

import io
import logging
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from dckpt.blocks.buffer import ImageBuffer
from dckpt.blocks.source import ImageSource
from dckpt.blocks.write import WriterPool, write_shard_file
from dckpt.catalog.transaction import Transaction
from dckpt.dcp.chunks import copy_to_bytes
from dckpt.dcp.location import is_storage_url, split_checkpoint_url
from dckpt.errors import ConfigError
from dckpt.format.index import Chunk, build_index
from dckpt.format.manifest import FileEntry, Manifest
from dckpt.format.shard_file import ShardTensor, plan_shard_files
from dckpt.format.values import encode_value
from dckpt.ranks.notice import post_notice, read_notice, remove_notice
from dckpt.ranks.topology import detect_topology
from dckpt.state.naming import dtype_name
from dckpt.state.tree import flatten
from dckpt.storage.opening import open_storage
from dckpt.version import __version__

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoredItem:
    """What a rank tells the coordinator of one write item; travels in `WriteResult.storage_data`.

    A tensor: `file` (empty for an empty chunk), `begin`, `dtype`, `offsets`, `sizes`, `shape` (global). A value: `value`
    as tagged JSON. `files` holds the rank's file entries, on its first item only.
    """

    name: str
    file: str = ""
    begin: int = 0
    dtype: str = ""
    offsets: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    value: Any = None
    files: tuple[FileEntry, ...] = ()


class DckptWriter(StorageWriter):
    """Commits one checkpoint *at* `url`: `dcp.save(state_dict, storage_writer=DckptWriter("ckpt/step-100"))`.

    The directory `url` appears whole and durable, or not at all; shard files are plain safetensors; values are tagged
    JSON. Works with stock planners (plan caching on and off) and with `DckptSavePlanner`. An existing `url` is refused
    (`CommitConflictError`), and so is `use_collectives=False` (`ConfigError`): without a global plan nothing can be said
    to be complete.

    url: the checkpoint's directory; may instead come as `checkpoint_id`. step: recorded in the manifest.
    deadline_s: how long a rank waits for the answer of the process group's store.
    Source of the contract: torch/distributed/checkpoint/storage.py.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | None = None,
        *,
        step: int | None = None,
        deadline_s: float = 600.0,
    ) -> None:
        self._url = None if url is None else os.fspath(url)
        self._step = step
        self._deadline_s = deadline_s
        self._rank = 0
        self._transaction: Transaction | None = None
        self._attempt: str | None = None
        self._buffer = ImageBuffer()
        self._pool = WriterPool()

    def __getstate__(self) -> dict[str, Any]:
        """For a checkpointing process (`AsyncCheckpointerType.PROCESS`): settings travel, buffers do not."""
        return {"_url": self._url, "_step": self._step, "_deadline_s": self._deadline_s}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_url"], step=state["_step"], deadline_s=state["_deadline_s"])  # type: ignore[misc]

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """True for local paths and `file://` URLs."""
        return is_storage_url(os.fspath(checkpoint_id))

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A new save begins, at `checkpoint_id` if given."""
        if checkpoint_id is not None:
            self._url = os.fspath(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Called on every rank; `kwargs` carries `rank` and `use_collectives` (sds:459-469 looks for that name)."""
        del is_coordinator, args
        if kwargs.get("use_collectives", True) is False:
            raise ConfigError(
                "DckptWriter: expected use_collectives=True, found False. Without a global plan ranks cannot agree that a "
                "checkpoint is complete; call dcp.save without it."
            )
        if self._transaction is not None:
            # The save before this one failed between its start and its commit.
            self._transaction.abandon()
            self._transaction = None
        # The rank in the group that saves; 0 with no_dist=True, also inside a distributed job.
        self._rank = kwargs["rank"] if "rank" in kwargs else detect_topology().rank
        self._attempt = None
        self._location()

    def _location(self) -> tuple[str, str]:
        if self._url is None:
            raise ConfigError("DckptWriter: expected a url, found none. Give DckptWriter(url) or checkpoint_id=url.")
        return split_checkpoint_url(self._url)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Unchanged: the attempt is kept out of plans, because cached plans outlive it."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the coordinator: begins the attempt on storage and tells its id to the others outside the plan."""
        root, name = self._location()
        storage = open_storage(root, processes=len(plans))
        storage.ensure_root()
        self._attempt = uuid.uuid4().hex
        transaction = Transaction(storage, checkpoint=name, attempt=self._attempt, generation=0)
        transaction.begin()
        self._transaction = transaction
        if detect_topology().world_size > 1:
            post_notice(self._notice_key(), self._attempt.encode(), within_s=self._deadline_s)
        return plans

    def _notice_key(self) -> str:
        return "attempt/" + "/".join(self._location())

    def _find_attempt(self) -> str:
        """The coordinator posted it before it scattered the plans, so it is there, and it is this save's."""
        if self._attempt is None:
            found = read_notice(self._notice_key(), within_s=self._deadline_s)
            if found is None:
                raise ConfigError(
                    f"DckptWriter({self._url}) on rank {self._rank}: expected the url that rank 0 has, found another one. "
                    "Give the same absolute path on every rank."
                )
            self._attempt = found.decode()
        return self._attempt

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's shard files, fsynced with their directory, and returns a finished future."""
        try:
            return self._write_data(plan, planner)
        finally:
            # DCP never says that it is done with a writer, and most writers save once: threads must not pile up.
            self._pool.stop()

    def _write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        attempt = self._find_attempt()
        root, name = self._location()
        storage = open_storage(root)
        directory = f"{storage.staging_key(name, attempt)}/{attempt}"
        rank = self._rank
        values = [item for item in plan.items if item.type == WriteItemType.BYTE_IO]
        stored = {id(item): StoredItem(item.index.fqn, value=_encode(item, planner)) for item in values}
        entries: list[FileEntry] = []
        tensors = [item for item in plan.items if item.type != WriteItemType.BYTE_IO]
        resolved = [(item, _resolve(item, planner)) for item in tensors]
        chunks = {id(item): _describe(item, tensor) for item, tensor in resolved}
        present = [(item, tensor) for item, tensor in resolved if tensor.numel()]
        for item, tensor in resolved:
            if tensor.numel() == 0:
                stored[id(item)] = _stored(item, chunks[id(item)], "", 0)
        pending: dict[tuple[str, tuple[int, ...]], tuple[WriteItem, torch.Tensor]] = {
            (item.index.fqn, chunks[id(item)].offsets): (item, tensor) for item, tensor in present
        }
        for file in plan_shard_files(rank, [chunks[id(item)] for item, _ in present]):
            image = self._buffer.take([file.size])[0]
            image[: len(file.header)] = file.header
            for shard_tensor, begin in zip(file.tensors, file.begins, strict=True):
                item, tensor = pending[(shard_tensor.name, shard_tensor.offsets)]
                copy_to_bytes(tensor, image[begin : begin + shard_tensor.nbytes])
                stored[id(item)] = _stored(item, shard_tensor, file.file, begin)
            entries += write_shard_file(
                storage, directory, attempt, rank, file.file, ImageSource(image, file), lambda _: None, self._pool
            )
        storage.sync_dir(directory)
        future: Future[list[WriteResult]] = Future()
        future.set_result(_results(plan.items, stored, tuple(entries)))
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator: listing, index, manifest, and THE commit; see `Transaction`."""
        assert self._transaction is not None
        assert self._attempt is not None
        transaction, self._transaction = self._transaction, None
        try:
            if detect_topology().world_size > 1:
                remove_notice(self._notice_key(), within_s=self._deadline_s)
            stored = [result.storage_data for rank in results for result in rank]
            entries = [entry for item in stored for entry in item.files]
            transaction.ensure_files(entries)
            index_entry = transaction.write_index(_build_index(stored))
            manifest = self._manifest(metadata, stored, (*entries, index_entry), len(results))
            transaction.stage_manifest(manifest)
            transaction.publish()
        except BaseException:
            # Does nothing if the attempt is, or may be, committed.
            transaction.abandon()
            raise
        log.info("checkpoint committed at %s", self._url)

    def _manifest(
        self, metadata: Metadata, stored: Sequence[StoredItem], files: tuple[FileEntry, ...], world_size: int
    ) -> Manifest:
        assert self._attempt is not None
        paths = metadata.planner_data or {}
        parts = sorted({str(path[0]) for path in paths.values() if len(path) > 1})
        return Manifest(
            run_id=None,
            step=self._step,
            micro_step=0,
            generation=0,
            attempt=self._attempt,
            created_unix_s=time.time(),
            world_size=world_size,
            mesh=None,
            coordinates=None,
            parts=tuple(parts),
            values={item.name: item.value for item in stored if not item.shape and not item.dtype},
            planner_data=encode_value(dict(paths), path="planner_data") if paths else None,
            rank_tensors=(),
            rank_values=(),
            aliases={},
            rng={},
            facts={},
            metrics={},
            writer={"dckpt": __version__, "torch": str(torch.__version__)},
            files=files,
        )


def _resolve(item: WriteItem, planner: SavePlanner) -> torch.Tensor:
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, torch.Tensor), f"{item.index.fqn}: expected a tensor, found {type(tensor)}"
    return tensor.detach()


def _encode(item: WriteItem, planner: SavePlanner) -> Any:
    """The value as tagged JSON; from stock planners by its object, else from the bytes, decoded without any class."""
    name = item.index.fqn
    lookup = getattr(planner, "lookup_object", None)
    if lookup is not None:
        value = lookup(item.index)
    else:
        data = planner.resolve_data(item)
        assert isinstance(data, io.BytesIO), f"{name}: expected bytes, found {type(data)}"
        data.seek(0)
        value = torch.load(data, weights_only=True)
    flat = flatten(value, name=name, path=name)
    if flat.tensors:
        raise ConfigError(
            f"Value {name}: expected plain values, found tensors inside a {type(value).__name__} ({sorted(flat.tensors)[:3]}). "
            "The stock planner treats this container as one value; use a dict or a list, whose tensors are stored as tensors."
        )
    return encode_value(flat.tree, path=name)


def _describe(item: WriteItem, tensor: torch.Tensor) -> ShardTensor:
    assert item.tensor_data is not None
    offsets, shape = tuple(item.tensor_data.chunk.offsets), tuple(item.tensor_data.size)
    dtype = dtype_name(tensor.dtype, tensor=item.index.fqn)
    return ShardTensor(item.index.fqn, dtype, tuple(tensor.shape), offsets, shape)


def _stored(item: WriteItem, chunk: ShardTensor, file: str, begin: int) -> StoredItem:
    assert item.tensor_data is not None
    shape = tuple(item.tensor_data.size)
    return StoredItem(chunk.name, file, begin, chunk.dtype, chunk.offsets, chunk.shape, shape)


def _results(
    items: Sequence[WriteItem], stored: dict[int, StoredItem], entries: tuple[FileEntry, ...]
) -> list[WriteResult]:
    results = []
    for number, item in enumerate(items):
        row = stored[id(item)]
        if number == 0:
            row = StoredItem(
                row.name,
                row.file,
                row.begin,
                row.dtype,
                row.offsets,
                row.sizes,
                row.shape,
                row.value,
                entries,
            )
        results.append(WriteResult(index=item.index, size_in_bytes=0, storage_data=row))
    return results


def _build_index(stored: Sequence[StoredItem]) -> Any:
    files = sorted({item.file for item in stored if item.file})
    numbers = {name: number for number, name in enumerate(files)}
    tensors: dict[str, tuple[str, tuple[int, ...], list[Chunk]]] = {}
    for item in stored:
        if not item.dtype:
            continue
        _, _, chunks = tensors.setdefault(item.name, (item.dtype, item.shape, []))
        if item.file:
            chunks.append(Chunk(item.offsets, item.sizes, numbers[item.file], item.begin))
    return build_index(tuple(files), tensors)
