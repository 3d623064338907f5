"""The package torch_checkpointing (0.1.1), where it is installed: saves, asynchronous saves, loads."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import torch

from benchmarks.states import State
from benchmarks.system import files_of, sync_file
from benchmarks.world import World

NAME = "torch_checkpointing"
MISSING = "torch_checkpointing is not installed (it is in the extra `bench`)"
NOTE = "atomic rename, no checksum; without its O_DIRECT, which fails on ext4, and on CPU without resharding metadata"


def is_installed() -> bool:
    """Whether this peer can take part."""
    return importlib.util.find_spec(NAME) is not None


def _sync_own_files(rank: int, arguments: Any) -> None:
    """Its hook before the rename, on every rank: fsyncs what this rank wrote. Runs in its writer process, hence up here."""
    for path in files_of(Path(arguments.path)):
        if path.stem.endswith(f"_{rank}"):
            sync_file(path)


class Manager:
    """Its `CheckpointManager` over one state. Resharding is declared where it works: its metadata needs a GPU."""

    def __init__(self, world: World, state: State, *, is_async: bool) -> None:
        from torch_checkpointing import CheckpointManager, ItemSpec
        from torch_checkpointing.config import AsyncCheckpointSaverConfig, SyncCheckpointSaverConfig
        from torch_checkpointing.default_resharder import DefaultResharder
        from torch_checkpointing.staging import CheckpointStagerConfig
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        has_gpu = torch.cuda.is_available()
        staging = CheckpointStagerConfig(
            use_pinned_memory=has_gpu, use_non_blocking_copy=has_gpu, use_async_staging=False
        )
        spec = ItemSpec(resharder=DefaultResharder() if has_gpu else None)
        self._state = state.state_dict()
        self._manager = CheckpointManager(
            CheckpointManager.Config(
                items=dict.fromkeys(self._state, spec),
                save=AsyncCheckpointSaverConfig(staging_config=staging) if is_async else SyncCheckpointSaverConfig(),
                # Its direct I/O is not aligned: ext4 and xfs refuse it with EINVAL.
                storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
                pre_finalize_callback=functools.partial(_sync_own_files, world.rank),
            )
        )

    def save(self, path: Path) -> Any:
        """Saves; asynchronous managers return the future of the write when the state is staged."""
        return self._manager.save(str(path), self._state)

    def load(self, path: Path) -> None:
        """Loads into the live tensors."""
        self._manager.load(str(path), into=self._state, strict=True)

    def close(self) -> None:
        """Ends its threads and processes."""
        self._manager.close()
