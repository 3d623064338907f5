"""Reads what other programs wrote with `torch.save`, with `weights_only=True` and never otherwise: nothing in it can execute.

The only module of the tools that imports torch, and only when such a file is there. What it gives is free of torch.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dckpt.errors import ConfigError, CorruptCheckpointError, DckptError

CONFIG_BYTES_MAX = 16 * 2**20


COUNT_MIN = 1024
"""How many layers config.json may tell of, however few weights there are."""

LABELS_MAX = 1_000_000

_COUNTS = re.compile(r"(layers?|experts|blocks|depths?|stages)$")

NODES_MAX = 4_000_000
"""Values in one file, containers that stand in several places counted at each: a small file can name one a trillion times."""

DEPTH_MAX = 64

_NUMBERS: Mapping[str, str] = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "?",
}

StorageKey = tuple[str, int, tuple[int, ...]]


@dataclass(frozen=True, slots=True, eq=False)
class ForeignTensor:
    """One tensor: safetensors' name of its dtype, its shape, its bytes. `storage`: file, address and strides of its elements.

    Names with the same storage, dtype and shape are one tied tensor; None where that is not known.
    """

    dtype: str
    shape: tuple[int, ...]
    data: memoryview = field(repr=False)
    storage: StorageKey | None = None

    def item(self) -> float | int | bool | None:
        """The one element of a tensor that has one; None otherwise, and for 8-bit floats and complex numbers."""
        if self.dtype == "BF16" and len(self.data) == 2:
            return (np.frombuffer(self.data, "<u2").astype("<u4") << 16).view("<f4")[0].item()  # type: ignore[no-any-return]
        if len(self.data) == 0 or self.dtype not in _NUMBERS:
            return None
        found = np.frombuffer(self.data, dtype=_NUMBERS[self.dtype])
        return found[0].item() if len(found) == 1 else None


def read_pickled(path: Path) -> Any:
    """The object in the file, tensors as `ForeignTensor`s.

    `CorruptCheckpointError` if it is damaged, or holds more than tensors and plain values: then it could execute something.
    """
    import torch
    from numpy._core import multiarray

    # Exactly what an array of integers is rebuilt from (the state of numpy's generator); arrays of objects are refused by torch.
    rebuild: list[Any] = [multiarray._reconstruct, np.ndarray, np.dtype, np.dtypes.UInt32DType]
    older = (multiarray._reconstruct, "numpy.core.multiarray._reconstruct")
    try:
        with torch.serialization.safe_globals([*rebuild, older]):
            try:
                found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                found = torch.load(path, map_location="cpu", weights_only=True)
        return _Freeing(path).freed(found, depth=0)
    except DckptError:
        raise
    except Exception as error:
        raise CorruptCheckpointError(
            f"{path}: expected tensors and plain values, found {_reason(error)}. Nothing in a file is ever executed: save it "
            "again with plain values, or leave it out.",
            key=str(path),
        ) from error


def _reason(error: Exception) -> str:
    """What a person should know of it. torch's own text advises to switch the protection off; it is not passed on."""
    text = str(error)
    if "Weights only load failed" in text:
        found = re.search(r"GLOBAL:? (?:GLOBAL )?(\S+)", text)
        return f"something that could execute ({found[1].rstrip('.,')})" if found else "something that could execute"
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:200]


class _Freeing:
    """Turns what one file held into values without torch, in no more memory and steps than an honest file of its size takes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._nodes_left = NODES_MAX
        self._bytes_left = path.stat().st_size
        """For tensors that have to be copied: transposed or expanded ones, whose bytes stand in the file less often."""

    def freed(self, value: Any, *, depth: int) -> Any:
        """The same with `ForeignTensor`s; `CorruptCheckpointError` beyond a limit."""
        import torch

        self._nodes_left -= 1
        if self._nodes_left < 0 or depth > DEPTH_MAX:
            raise self._beyond(f"at most {NODES_MAX:,} values, nested {DEPTH_MAX} deep", "more")
        if isinstance(value, torch.Tensor):
            return self._freed_tensor(value)
        if isinstance(value, Mapping):
            return {key: self.freed(item, depth=depth + 1) for key, item in value.items()}
        if isinstance(value, tuple):
            return tuple(self.freed(item, depth=depth + 1) for item in value)
        if isinstance(value, list):
            return [self.freed(item, depth=depth + 1) for item in value]
        return value

    def _freed_tensor(self, value: Any) -> ForeignTensor:
        import torch

        from dckpt.state.naming import DTYPE_NAMES

        if value.dtype not in DTYPE_NAMES or value.layout is not torch.strided or value.is_quantized:
            raise ConfigError(f"a tensor of {value.dtype}, {value.layout}: it has no place in a checkpoint.")
        dtype, shape = DTYPE_NAMES[value.dtype], tuple(value.shape)
        if not value.numel():
            return ForeignTensor(dtype, shape, memoryview(b""))
        if not value.is_contiguous():
            self._bytes_left -= value.numel() * value.element_size()
            if self._bytes_left < 0:
                raise self._beyond(
                    "tensors whose elements stand in the file", f"one of {shape} with strides {value.stride()}"
                )
        raw = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        address = value.untyped_storage().data_ptr() + value.storage_offset() * value.element_size()
        return ForeignTensor(dtype, shape, memoryview(raw), (str(self._path), int(address), tuple(value.stride())))

    def _beyond(self, expected: str, found: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(
            f"{self._path}: expected {expected}, found {found}. It would take memory out of all proportion to the file: save it "
            "again with plain values, or leave it out.",
            key=str(self._path),
        )


@dataclass(frozen=True, slots=True)
class ModelOrder:
    """Parameters in the order in which the model has them. norms: those of LayerNorms. ties: name -> its first name."""

    names: tuple[str, ...]
    norms: frozenset[str] = frozenset()
    ties: Mapping[str, str] = field(default_factory=dict)
    label: str = ""


def order_by_config(directory: Path, *, num_weights: int) -> ModelOrder | None:
    """As the `transformers` that is installed builds the architecture that config.json names, without memory for it.

    None without config.json or transformers, or if that version does not know the architecture. No code of the checkpoint runs,
    and none is fetched. `CorruptCheckpointError` if the file is none, or tells of more layers than `num_weights` weights have.
    """
    path = directory / "config.json"
    if not path.is_file() or path.stat().st_size > CONFIG_BYTES_MAX:
        return None
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        names = written.get("architectures")
        _ensure_few(written, path, max(num_weights, COUNT_MIN), depth=0)
    except (ValueError, AttributeError, RecursionError) as error:
        raise CorruptCheckpointError(f"{path}: expected a JSON object, found {error}.", key=str(path)) from error
    if not names:
        return None
    name = names[0] if isinstance(names, list) else names
    if not isinstance(name, str):
        raise CorruptCheckpointError(f"{path}: expected a list of names as architectures, found others.", key=str(path))
    try:
        import torch

        transformers: Any = importlib.import_module("transformers")
    except ImportError:
        return None
    kind = getattr(transformers, name, None)
    if not isinstance(kind, type) or not issubclass(kind, torch.nn.Module):
        return None
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        # config.json can name an implementation that lies elsewhere, which would be fetched and run.
        config._attn_implementation = "eager"
        with torch.device("meta"):
            model = kind(config)
    except Exception as error:
        raise CorruptCheckpointError(
            f"{path}: expected what {name} of transformers {transformers.__version__} is built from, found "
            f"{_reason(error)}. Name the optimizer's parameters with --order FILE, and leave config.json out.",
            key=str(path),
        ) from error
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for parameter_name, parameter in model.named_parameters(remove_duplicate=False):
        held = first.setdefault(id(parameter), parameter_name)
        if held != parameter_name:
            ties[parameter_name] = held
    norms = {
        f"{place}.{own}" if place else own
        for place, module in model.named_modules()
        if isinstance(module, torch.nn.LayerNorm)
        for own, _ in module.named_parameters(recurse=False)
    }
    return ModelOrder(
        tuple(first.values()), frozenset(norms), ties, f"{name} of transformers {transformers.__version__}"
    )


def _ensure_few(written: Any, path: Path, limit: int, *, depth: int) -> None:
    """Layers and the like are built one by one: each has a weight of its own."""
    if depth > DEPTH_MAX:
        raise CorruptCheckpointError(f"{path}: expected at most {DEPTH_MAX} levels, found more.", key=str(path))
    for name, value in written.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, Mapping):
                _ensure_few(one, path, limit, depth=depth + 1)
                continue
            most = LABELS_MAX if name == "num_labels" else limit
            if isinstance(one, (int, float)) and one > most and (name == "num_labels" or _COUNTS.search(name)):
                raise CorruptCheckpointError(
                    f"{path}: {name}: expected at most {most:,} in a checkpoint with so few weights, found {one}.",
                    key=str(path),
                )


def read_bytes_of(path: Path, limit: int) -> bytes:
    """A small file; `CorruptCheckpointError` if it is larger."""
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise CorruptCheckpointError(f"{path}: expected at most {limit:,} bytes.", key=str(path))
    return data
