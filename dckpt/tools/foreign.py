"""Checkpoints of the usual home-made kind: which files are there, what they hold, what is missing. Never changes one of them.

Two layouts: a directory with weights (`model.safetensors` or `pytorch_model.bin`, also in shards), `optimizer.pt`,
`scheduler.pt`, `trainer_state.json` and `rng_state*.pth`; or one `training_state.pt` (or any `.pt` file) that holds them in a
dict.
"""

from __future__ import annotations

import json
import math
import mmap
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dckpt.errors import CheckpointNotFoundError, CorruptCheckpointError, DckptError
from dckpt.format.sealed_json import JsonValue
from dckpt.format.shard_file import header_bytes_needed, parse_shard_header
from dckpt.format.streams import TORCH_CPU_BYTES, encode_stream, python_record
from dckpt.tools.foreign_torch import ForeignTensor, read_pickled

JSON_BYTES_MAX = 256 * 2**20
RNG_BYTES_MAX = 64 * 2**20

WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model.pt", "model.bin")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer.pth")
SCHEDULERS = ("scheduler.pt", "scheduler.bin", "scheduler.pth", "lr_scheduler.pt")
SCALERS = ("scaler.pt",)
STATES = ("training_state.pt", "training_state.pth", "checkpoint.pt", "checkpoint.pth")
TRAINER = "trainer_state.json"
_RNG = re.compile(r"rng_state(?:_([0-9]{1,6}))?\.pth")
_RANK = re.compile(r"[0-9]{1,6}")
_MARKS = {*WEIGHTS, *INDEXES, *OPTIMIZERS, *STATES}

# Under which keys programs put what, in one file.
KEYS: Mapping[str, tuple[str, ...]] = {
    "model": ("model_state_dict", "model", "state_dict", "model_state"),
    "optim": ("optimizer_state_dict", "optimizer", "optimizer_state", "optim"),
    "scheduler": ("scheduler_state_dict", "lr_scheduler_state_dict", "scheduler", "lr_scheduler", "scheduler_state"),
    "scaler": ("scaler_state_dict", "scaler", "grad_scaler"),
    "rng": ("rng_states", "rng_state", "rng"),
    "step": ("global_step", "step", "iteration", "steps"),
    "epoch": ("epoch",),
    "best": ("best_loss", "best_val_loss"),
    "samples": ("samples", "samples_seen", "consumed_samples"),
}
STREAM_KEYS: Mapping[str, tuple[str, ...]] = {
    "python": ("python", "python_rng_state", "python_state", "random", "py"),
    "numpy": ("numpy", "numpy_rng_state", "numpy_state", "np"),
    "torch": ("cpu", "torch", "torch_rng_state", "torch_cpu", "torch_state"),
    "cuda": ("cuda", "cuda_rng_state", "torch_cuda", "cuda_rng_state_all", "cuda_all", "cuda_state"),
}


@dataclass(slots=True)
class ForeignState:
    """What the files hold, free of torch. Absent: None or empty. troubles: files that cannot be read, a sentence each."""

    url: str
    files: tuple[Path, ...]
    weights: dict[str, ForeignTensor] = field(default_factory=dict)
    has_order: bool = False
    """Whether the weights stand in the order in which the model has them."""
    optim: Mapping[str, Any] | None = None
    scheduler: Mapping[str, Any] | None = None
    scaler: Mapping[str, Any] | None = None
    step: int | None = None
    epoch: float | None = None
    samples: int | None = None
    best_loss: float | None = None
    losses: list[tuple[int, float]] = field(default_factory=list)
    max_steps: int | None = None
    streams: dict[int, dict[str, JsonValue]] = field(default_factory=dict)
    ranks: int = 1
    troubles: list[str] = field(default_factory=list)


def is_foreign(text: str) -> bool:
    """Whether there is such a checkpoint at `text`: a local directory that holds one of its files, or one `.pt` file."""
    path = _local(text)
    if path is None:
        return False
    if path.is_file():
        return path.suffix in (".pt", ".pth", ".bin")
    return (
        path.is_dir()
        and bool(_MARKS & {item.name for item in path.iterdir()})
        and not (path / "manifest.json").exists()
    )


def _local(text: str) -> Path | None:
    if "://" in text and not text.startswith("file://"):
        return None
    path = Path(text.removeprefix("file://"))
    return path if path.exists() else None


def read_foreign(text: str) -> ForeignState:
    """Everything that the files hold. What cannot be read is in `troubles`, and the rest is there."""
    path = _local(text)
    if path is None or not is_foreign(text):
        raise CheckpointNotFoundError(
            f"{text}: expected a directory with {', '.join(sorted(_MARKS)[:6])}, ... or one .pt file, found none of them."
        )
    return _Reader(path.resolve()).read()


def files_of(text: str) -> tuple[Path, ...]:
    """All files of the checkpoint at `text`, sorted; none if there is none."""
    path = _local(text)
    if path is None:
        return ()
    found = path.resolve()
    return (found,) if found.is_file() else tuple(sorted(item for item in found.iterdir() if item.is_file()))


class _Reader:
    def __init__(self, path: Path) -> None:
        self._path = path
        names = files_of(str(path))
        self._names = {item.name: item for item in names}
        self.state = ForeignState(str(path), names)

    def read(self) -> ForeignState:
        state = self.state
        if self._path.is_file():
            self._take_bundle(self._path)
        else:
            for name in STATES:
                if name in self._names:
                    self._take_bundle(self._names[name])
            self._read_weights()
            state.optim = self._read_mapping(OPTIMIZERS) or state.optim
            state.scheduler = self._read_mapping(SCHEDULERS) or state.scheduler
            state.scaler = self._read_mapping(SCALERS) or state.scaler
            self._read_trainer()
            self._read_streams()
        return state

    def _trouble(self, error: DckptError) -> None:
        self.state.troubles.append(error.message)

    # -- one file ------------------------------------------------------------------------------------------------------

    def _take_bundle(self, path: Path) -> None:
        try:
            found = read_pickled(path)
        except DckptError as error:
            self._trouble(error)
            return
        if not isinstance(found, Mapping):
            self.state.troubles.append(f"{path}: expected a dict, found {type(found).__name__}.")
            return
        state = self.state
        if found and all(isinstance(value, ForeignTensor) for value in found.values()):
            self._take_weights(found, has_order=True)
            return
        part = {name: _first(found, keys) for name, keys in KEYS.items()}
        if isinstance(part["model"], Mapping):
            self._take_weights(part["model"], has_order=True)
        for name in ("optim", "scheduler", "scaler"):
            if isinstance(part[name], Mapping):
                setattr(state, name, part[name])
        state.step = _whole(part["step"])
        state.epoch = _number(part["epoch"])
        state.samples = _whole(part["samples"])
        state.best_loss = _number(part["best"])
        self._take_streams(part["rng"], path)

    def _take_weights(self, found: Mapping[Any, Any], *, has_order: bool) -> None:
        kept = {str(name): value for name, value in found.items() if isinstance(value, ForeignTensor)}
        prefix = "module." if kept and all(name.startswith("module.") for name in kept) else ""
        self.state.weights.update({name.removeprefix(prefix): value for name, value in kept.items()})
        self.state.has_order = has_order

    def _take_streams(self, found: Any, path: Path) -> None:
        """One dict of streams, or a list or dict of such by rank."""
        if found is None:
            return
        by_rank: dict[int, Any] = {0: found}
        if isinstance(found, (list, tuple)):
            by_rank = dict(enumerate(found))
        elif isinstance(found, Mapping) and found and all(_RANK.fullmatch(str(key)) for key in found):
            by_rank = {int(str(key)): value for key, value in found.items()}
            if sorted(by_rank) != list(range(len(found))):
                self.state.troubles.append(
                    f"{path}: random streams: expected ranks 0 to {len(found) - 1}, found others, up to {max(by_rank)}."
                )
                return
        self.state.ranks = max(self.state.ranks, len(by_rank))
        for rank, one in by_rank.items():
            streams = streams_from(one, rank)
            if isinstance(streams, str):
                self.state.troubles.append(f"{path}: random streams of rank {rank}: {streams}.")
                return
            self.state.streams[rank] = streams

    # -- files of a directory ------------------------------------------------------------------------------------------

    def _read_weights(self) -> None:
        for index in INDEXES:
            if index in self._names:
                self._read_sharded(self._names[index])
                return
        for name in WEIGHTS:
            if name in self._names and not self.state.weights:
                self._read_weights_file(self._names[name])

    def _read_sharded(self, index: Path) -> None:
        try:
            found = _read_json(index)
            files = found.get("weight_map") if isinstance(found, Mapping) else None
            if not isinstance(files, Mapping):
                raise CorruptCheckpointError(f"{index}: expected a weight_map, found none.", key=str(index))
        except DckptError as error:
            self._trouble(error)
            return
        for name in dict.fromkeys(str(value) for value in files.values()):
            if "/" in name or name not in self._names:
                self.state.troubles.append(f"{index.parent / name}: expected a shard of the weights, found none.")
            else:
                self._read_weights_file(self._names[name])
        missing = sorted(str(name) for name in files if str(name) not in self.state.weights)
        if missing:
            self.state.troubles.append(f"{index}: {len(missing)} weights are in no shard, first {missing[0]}.")
        # Shards of torch.save stand in the model's order; that of the map is not relied on.
        self.state.has_order = self.state.has_order and index.name.startswith("pytorch_model")

    def _read_weights_file(self, path: Path) -> None:
        try:
            if path.suffix == ".safetensors":
                self._take_weights(read_safetensors(path), has_order=False)
            else:
                found = read_pickled(path)
                if isinstance(found, Mapping):
                    self._take_weights(found, has_order=True)
        except DckptError as error:
            self._trouble(error)

    def _read_mapping(self, names: Sequence[str]) -> Mapping[str, Any] | None:
        for name in names:
            if name in self._names:
                try:
                    found = read_pickled(self._names[name])
                except DckptError as error:
                    self._trouble(error)
                    continue
                if isinstance(found, Mapping):
                    return found
        return None

    def _read_trainer(self) -> None:
        if TRAINER not in self._names:
            return
        try:
            found = _read_json(self._names[TRAINER])
        except DckptError as error:
            self._trouble(error)
            return
        if not isinstance(found, Mapping):
            return
        state = self.state
        state.step = _whole(found.get("global_step"))
        state.epoch = _number(found.get("epoch"))
        state.max_steps = _whole(found.get("max_steps"))
        history = found.get("log_history")
        for row in history if isinstance(history, list) else []:
            step, loss = (row.get("step"), row.get("loss")) if isinstance(row, Mapping) else (None, None)
            if type(step) is int and isinstance(loss, (int, float)) and math.isfinite(loss):
                state.losses.append((step, float(loss)))

    def _read_streams(self) -> None:
        found = {int(match[1] or 0): name for name in self._names if (match := _RNG.fullmatch(name)) is not None}
        if found:
            self.state.ranks = max(found) + 1
        for rank, name in sorted(found.items()):
            path = self._names[name]
            if path.stat().st_size > RNG_BYTES_MAX:
                self.state.troubles.append(f"{path}: expected at most {RNG_BYTES_MAX:,} bytes.")
                continue
            try:
                streams = streams_from(read_pickled(path), rank)
            except DckptError as error:
                self._trouble(error)
                continue
            if isinstance(streams, str):
                self.state.troubles.append(f"{path}: {streams}.")
            else:
                self.state.streams[rank] = streams


# -- parts -------------------------------------------------------------------------------------------------------------


def read_safetensors(path: Path) -> dict[str, ForeignTensor]:
    """Every tensor of the file, mapped, not read. The order is that of the data."""
    size = path.stat().st_size
    with path.open("rb") as file:
        needed = header_bytes_needed(file.read(8), file_bytes=size, key=str(path))
        file.seek(0)
        header = parse_shard_header(file.read(needed), file_bytes=size, key=str(path))
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    return {
        tensor.name: ForeignTensor(tensor.dtype, tensor.shape, view[begin : begin + tensor.nbytes])
        for tensor, begin in zip(header.tensors, header.begins, strict=True)
    }


def streams_from(found: Any, rank: int) -> dict[str, JsonValue] | str:
    """A rank's streams as records; a sentence if one is there that is none."""
    if not isinstance(found, Mapping):
        return f"expected a dict of generator states, found {type(found).__name__}"
    streams: dict[str, JsonValue] = {}
    for stream, keys in STREAM_KEYS.items():
        state = _first(found, keys)
        if state is None or (isinstance(state, (list, tuple)) and not state):
            continue
        try:
            streams[stream] = _stream(stream, state, rank)
        except (TypeError, ValueError, KeyError, IndexError, OverflowError, struct.error, DckptError) as error:
            return f"the state of {stream} is none: {error}"
    return streams or "no generator state in it"


def _stream(stream: str, state: Any, rank: int) -> JsonValue:
    if stream == "python":
        version, words, gauss = state
        return encode_stream(python_record((int(version), tuple(int(word) for word in words), gauss)))
    if stream == "numpy":
        name, key, position, has_gauss, gauss = state
        legacy = {"key": key, "pos": int(position)}
        record = {"bit_generator": str(name), "state": legacy, "has_gauss": int(has_gauss), "gauss": float(gauss)}
        return encode_stream({"kind": "numpy-legacy", "state": record})
    if stream == "cuda" and isinstance(state, (list, tuple)):
        state = state[rank % len(state)]
    if not isinstance(state, ForeignTensor) or state.dtype != "U8":
        raise ValueError(f"expected bytes, found {type(state).__name__}")
    raw = bytes(state.data)
    if stream == "torch" and len(raw) != TORCH_CPU_BYTES:
        raise ValueError(f"expected {TORCH_CPU_BYTES} bytes, found {len(raw)}")
    return encode_stream({"kind": "torch", "device": "cpu" if stream == "torch" else "cuda", "state": raw})


def _read_json(path: Path) -> Any:
    if path.stat().st_size > JSON_BYTES_MAX:
        raise CorruptCheckpointError(f"{path}: expected at most {JSON_BYTES_MAX:,} bytes.", key=str(path))
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"{path}: expected JSON, found {error}.", key=str(path)) from error


def _first(found: Mapping[Any, Any], keys: Sequence[str]) -> Any:
    return next((found[key] for key in keys if key in found and found[key] is not None), None)


def _whole(value: Any) -> int | None:
    if isinstance(value, ForeignTensor):
        value = value.item()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and value >= 0 else None


def _number(value: Any) -> float | None:
    if isinstance(value, ForeignTensor):
        value = value.item()
    return float(value) if type(value) in (int, float) and math.isfinite(value) else None
