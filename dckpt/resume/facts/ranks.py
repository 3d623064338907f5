"""What one rank contributes after a load: a record of some kilobytes, compared over all ranks by the coordinator."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from dckpt.format.checksum import digest_bytes
from dckpt.format.streams import stream_digest
from dckpt.resume.facts.model import gradient_names, tied_names
from dckpt.resume.facts.tensors import NAMES_MAX, value_facts
from dckpt.resume.facts.training import optimizer_facts, scaler_facts, scheduler_facts, step_counters
from dckpt.resume.report import LoadResult
from dckpt.state.records import Captured
from dckpt.state.rng import capture_rng
from dckpt.state.train_state import TrainState


def rank_facts(state: TrainState, captured: Captured, loaded: LoadResult, current: dict[str, Any]) -> dict[str, Any]:
    """This rank's part of the evidence. Reads every tensor once, draws nothing, changes nothing.

    captured: `state.capture()`. current: `FactCollector.collect` of this rank. Waits for the device.
    """
    gradients = gradient_names(state.models())
    model_facts, data = current["model"], current.get("data") or {}
    progress = state.progress
    return {
        "checkpoint": loaded.manifest_sha256,
        "micro_step": loaded.micro_step,
        "coordinates": state.coordinates(),
        "step": getattr(progress, "step", None),
        "positions": {
            key: [facts["epoch"], facts["cursor"]]
            for key, facts in data.items()
            if isinstance(facts.get("epoch"), int) and isinstance(facts.get("cursor"), int)
        },
        "progress_micro_step": getattr(progress, "micro_step", 0),
        "rng": {stream: stream_digest(value) for stream, value in captured.rng.items()},
        "modes": model_facts["modes"],
        "modes_digest": digest_bytes(repr(model_facts["modes"]).encode()),
        "dropout_digest": model_facts["dropout"]["digest"],
        "trainable_digest": model_facts["trainable"]["digest"],
        "unsaved_buffers": model_facts["unsaved_buffers"],
        "tied": tied_names(state.models()),
        "gradients": {"count": len(gradients), "names": gradients[:NAMES_MAX]},
        "optim": optimizer_facts(state.optimizer_states()),
        "steps": {
            key: step_counters(found.optimizer, may_wait=True) for key, found in state.optimizer_states().items()
        },
        "scheduler": scheduler_facts(state),
        "scaler": scaler_facts(state),
        "values": value_facts(state, captured.tensors),
    }


def stream_digests(state: TrainState, names: Collection[str]) -> dict[str, str]:
    """Random stream of this rank -> digest of its state now; of `names` those that are there."""
    streams = capture_rng(state.generators)
    return {name: stream_digest(value) for name, value in streams.items() if name in names}


def moved_streams(state: TrainState, loaded: LoadResult) -> list[str]:
    """Streams that are not where the load left them: something drew from them, or seeded them."""
    now = stream_digests(state, loaded.streams)
    return sorted(name for name, digest in loaded.streams.items() if now.get(name) != digest)
