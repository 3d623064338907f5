"""Facts about the run that a checkpoint carries, so that a resume can be compared with it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from dckpt.format.values import encode_value
from dckpt.state.train_state import TrainState
from dckpt.version import __version__


def writer_versions() -> dict[str, str]:
    """Versions of what wrote the checkpoint."""
    return {
        "dckpt": __version__,
        "torch": str(torch.__version__),
        "numpy": str(np.__version__),
        "python": platform.python_version(),
    }


def global_batch(facts: Mapping[str, Any]) -> int | None:
    """Samples of one optimizer step when the checkpoint was written, if it says so."""
    batch = facts.get("batch")
    if not isinstance(batch, dict):
        return None
    return int(batch["micro"] * batch["accumulation"] * batch["data_parallel"])


def collect_facts(state: TrainState) -> dict[str, Any]:
    """What the validator compares; JSON. `user` holds the caller's own facts."""
    facts: dict[str, Any] = {}
    if state.facts:
        facts["user"] = encode_value(dict(state.facts), path="facts")
    progress = state.progress
    if progress is not None:
        facts["max_steps"] = progress.max_steps
        if progress.batch is not None:
            batch = progress.batch
            facts["batch"] = {
                "micro": batch.micro,
                "accumulation": batch.accumulation,
                "data_parallel": batch.data_parallel,
            }
    return facts
