"""dckpt: durable, verified, resumable checkpoints for distributed PyTorch training.

Names are resolved on first use, so that `import dckpt` (and the command line) does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dckpt.version import __version__

if TYPE_CHECKING:
    from dckpt.catalog.retention import Best, Retention
    from dckpt.checkpointer import Checkpointer
    from dckpt.data.fingerprint import fingerprint_files
    from dckpt.data.sampler import ElasticDistributedSampler
    from dckpt.data.seeding import SampleIndex, SampleRandom, SeededDataset, seeded_sample
    from dckpt.data.split import Split, split_indices
    from dckpt.data.stateful import adapt_loader
    from dckpt.dcp.planner import DckptLoadPlanner, DckptSavePlanner
    from dckpt.dcp.reader import DckptReader
    from dckpt.dcp.writer import DckptWriter
    from dckpt.engine.cadence import Every, StepAction
    from dckpt.engine.pending import PendingSave
    from dckpt.engine.resume_policy import ResumePolicy
    from dckpt.errors import (
        CheckpointNotFoundError,
        CommitConflictError,
        ConfigError,
        CoordinationTimeoutError,
        CorruptCheckpointError,
        DckptError,
        FormatVersionError,
        IncompatibleStateError,
        KeyExistsError,
        PeerFailedError,
        PoisonedStateError,
        ResumeRejectedError,
        SaveNotFinishedError,
        StorageError,
        StorageFullError,
        StorageMissingError,
        StorageReadOnlyError,
        TransientStorageError,
        UnknownOutcomeError,
    )
    from dckpt.findings import Finding
    from dckpt.resume.probe import Probe
    from dckpt.resume.report import LoadResult, ResumeReport
    from dckpt.state.evaluating import evaluating
    from dckpt.state.progress import Batch, TrainProgress
    from dckpt.state.rng_state import RngState, rng_slot
    from dckpt.state.train_state import TrainState

    Stop = StepAction.STOP
    Continue = StepAction.CONTINUE

_HOMES = {
    "Batch": "dckpt.state.progress",
    "Best": "dckpt.catalog.retention",
    "Checkpointer": "dckpt.checkpointer",
    "DckptLoadPlanner": "dckpt.dcp.planner",
    "DckptReader": "dckpt.dcp.reader",
    "DckptSavePlanner": "dckpt.dcp.planner",
    "DckptWriter": "dckpt.dcp.writer",
    "ElasticDistributedSampler": "dckpt.data.sampler",
    "Every": "dckpt.engine.cadence",
    "Finding": "dckpt.findings",
    "LoadResult": "dckpt.resume.report",
    "PendingSave": "dckpt.engine.pending",
    "Probe": "dckpt.resume.probe",
    "ResumePolicy": "dckpt.engine.resume_policy",
    "ResumeReport": "dckpt.resume.report",
    "Retention": "dckpt.catalog.retention",
    "RngState": "dckpt.state.rng_state",
    "SampleIndex": "dckpt.data.seeding",
    "SampleRandom": "dckpt.data.seeding",
    "SeededDataset": "dckpt.data.seeding",
    "Split": "dckpt.data.split",
    "StepAction": "dckpt.engine.cadence",
    "TrainProgress": "dckpt.state.progress",
    "TrainState": "dckpt.state.train_state",
    "evaluating": "dckpt.state.evaluating",
    "adapt_loader": "dckpt.data.stateful",
    "fingerprint_files": "dckpt.data.fingerprint",
    "rng_slot": "dckpt.state.rng_state",
    "seeded_sample": "dckpt.data.seeding",
    "split_indices": "dckpt.data.split",
    "CheckpointNotFoundError": "dckpt.errors",
    "CommitConflictError": "dckpt.errors",
    "ConfigError": "dckpt.errors",
    "CoordinationTimeoutError": "dckpt.errors",
    "CorruptCheckpointError": "dckpt.errors",
    "DckptError": "dckpt.errors",
    "FormatVersionError": "dckpt.errors",
    "IncompatibleStateError": "dckpt.errors",
    "KeyExistsError": "dckpt.errors",
    "PeerFailedError": "dckpt.errors",
    "PoisonedStateError": "dckpt.errors",
    "ResumeRejectedError": "dckpt.errors",
    "SaveNotFinishedError": "dckpt.errors",
    "StorageError": "dckpt.errors",
    "StorageFullError": "dckpt.errors",
    "StorageMissingError": "dckpt.errors",
    "StorageReadOnlyError": "dckpt.errors",
    "TransientStorageError": "dckpt.errors",
    "UnknownOutcomeError": "dckpt.errors",
}

EXIT_STOPPED = 75
"""Exit code for "stopped on request, saved": start the same command again (EX_TEMPFAIL of sysexits.h)."""

EXIT_REJECTED = 78
"""Exit code for "the resume was refused": the same command would be refused again (EX_CONFIG of sysexits.h)."""

__all__ = [
    "EXIT_REJECTED",
    "EXIT_STOPPED",
    "Batch",
    "Best",
    "CheckpointNotFoundError",
    "Checkpointer",
    "CommitConflictError",
    "ConfigError",
    "Continue",
    "CoordinationTimeoutError",
    "CorruptCheckpointError",
    "DckptError",
    "DckptLoadPlanner",
    "DckptReader",
    "DckptSavePlanner",
    "DckptWriter",
    "ElasticDistributedSampler",
    "Every",
    "Finding",
    "FormatVersionError",
    "IncompatibleStateError",
    "KeyExistsError",
    "LoadResult",
    "PeerFailedError",
    "PendingSave",
    "PoisonedStateError",
    "Probe",
    "ResumePolicy",
    "ResumeRejectedError",
    "ResumeReport",
    "Retention",
    "RngState",
    "SampleIndex",
    "SampleRandom",
    "SaveNotFinishedError",
    "SeededDataset",
    "Split",
    "StepAction",
    "Stop",
    "StorageError",
    "StorageFullError",
    "StorageMissingError",
    "StorageReadOnlyError",
    "TrainProgress",
    "TrainState",
    "TransientStorageError",
    "UnknownOutcomeError",
    "__version__",
    "adapt_loader",
    "evaluating",
    "fingerprint_files",
    "rng_slot",
    "seeded_sample",
    "split_indices",
]


def __getattr__(name: str) -> Any:
    if name in ("Stop", "Continue"):
        action = importlib.import_module("dckpt.engine.cadence").StepAction
        return action.STOP if name == "Stop" else action.CONTINUE
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'dckpt' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
