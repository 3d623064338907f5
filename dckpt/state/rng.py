"""Random streams of this process: read without advancing them, written back exactly.

Streams: `python`, `numpy` (the legacy global one), `torch` (CPU), `cuda` (this process's current device), `cuda:<i>` (another
device whose generator was used or seeded apart) and `generator:<name>`. The current device has one name on all ranks,
whatever its number: rank 1 of two that run alike moves cuda:1, and that must not look like a difference.

Which state a stream gets on another mesh is decided in `dckpt.planning.streams`, without torch.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from dckpt.errors import ConfigError
from dckpt.format.streams import (
    CUDA_STATE,
    GENERATOR_PREFIX,
    MT_WORDS,
    damaged_stream,
    decode_stream,
    encode_stream,
    kind_of_stream,
    plain_stream,
    python_record,
    stream_bytes,
)
from dckpt.format.values import JsonValue

# Reading.


def capture_rng(generators: Mapping[str, Any] | None = None) -> dict[str, JsonValue]:
    """Every stream's state as tagged JSON. No stream moves, and CUDA is not started."""
    streams: dict[str, JsonValue] = {
        "python": encode_stream(python_record(random.getstate())),
        "numpy": encode_stream({"kind": "numpy-legacy", "state": np.random.get_state(legacy=False)}),
        "torch": encode_stream({"kind": "torch", "device": "cpu", "state": _bytes(torch.get_rng_state())}),
    }
    for stream, state in _cuda_states().items():
        streams[stream] = encode_stream({"kind": "torch", "device": "cuda", "state": state})
    for name, generator in (generators or {}).items():
        streams[f"{GENERATOR_PREFIX}{name}"] = encode_stream(_generator_record(name, generator))
    return streams


def _bytes(state: torch.Tensor) -> bytes:
    return state.numpy().tobytes()


def _cuda_states() -> dict[str, bytes]:
    # A process that has not started CUDA has drawn nothing there; starting it would take memory on the device.
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return {}
    states = [_bytes(generator.get_state()) for generator in torch.cuda.default_generators]
    current = torch.cuda.current_device()
    found = {"cuda": states[current]}
    untouched = CUDA_STATE.pack(CUDA_STATE.unpack(states[current][: CUDA_STATE.size])[0], 0)
    for index, state in enumerate(states):
        # What was seeded along with the current device and never used is described by the current device's seed.
        if index != current and state != untouched:
            found[f"cuda:{index}"] = state
    return found


def _generator_record(name: str, generator: Any) -> dict[str, Any]:
    if isinstance(generator, torch.Generator):
        return {"kind": "torch", "device": generator.device.type, "state": _bytes(generator.get_state())}
    if isinstance(generator, np.random.Generator):
        return {"kind": "numpy", "state": generator.bit_generator.state}
    raise ConfigError(
        f"generators[{name!r}]: expected a torch.Generator or numpy.random.Generator, found "
        f"{type(generator).__name__}. Keep another source's state in extra={{...}}"
    )


# Writing back.


def restore_rng(streams: Mapping[str, JsonValue], generators: Mapping[str, Any] | None = None) -> None:
    """Set every stream given. All of them are checked before the first one is touched; others stay as they are."""
    generators = generators or {}
    records = ensure_restorable(streams, generators)
    # `cuda` is last: should the current device have another number now, its own stream wins over `cuda:<i>`.
    for stream in sorted(records, key=lambda name: (name == "cuda", name)):
        _set_stream(stream, records[stream], generators, has_own=records)


def ensure_restorable(
    streams: Mapping[str, JsonValue], generators: Mapping[str, Any] | None = None
) -> dict[str, dict[str, Any]]:
    """The decoded streams, once all of them fit this process's devices and generators; touches nothing.

    `ConfigError` for a stream that this process does not have or has in another kind, `CorruptCheckpointError` for a
    state that is none.
    """
    generators = generators or {}
    records = {stream: decode_stream(stream, state) for stream, state in streams.items()}
    live = set(available_streams(generators))
    unavailable = sorted(stream for stream in records if plain_stream(stream) not in live)
    if unavailable:
        raise ConfigError(
            f"random streams {unavailable}: this process has no such device or generator; it has "
            f"{available_streams(generators)}. Pass the generator to TrainState, or leave the stream out"
        )
    for stream, record in records.items():
        _ensure_fits(stream, record, generators)
    return records


def available_streams(generators: Mapping[str, Any] | None = None) -> list[str]:
    """The streams that `restore_rng` can set in this process."""
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cuda = ["cuda", *(f"cuda:{index}" for index in range(devices))] if devices else []
    return ["python", "numpy", "torch", *cuda, *(f"{GENERATOR_PREFIX}{name}" for name in generators or {})]


def _ensure_fits(stream: str, record: dict[str, Any], generators: Mapping[str, Any]) -> None:
    """Try the state on a stand-in, so that a bad one is found before any stream has moved."""
    stream = plain_stream(stream)
    kind, expected = record["kind"], _kind_of_stream(stream, generators)
    if kind != expected[0] or (kind == "torch" and record.get("device") != expected[1]):
        found = f"{kind} on {record.get('device')}" if kind == "torch" else kind
        raise ConfigError(
            f"random stream {stream}: saved as {found}, this process has {' on '.join(filter(None, expected))}. "
            "Pass the same kind of generator, or leave the stream out"
        )
    try:
        if kind == "python":
            random.Random().setstate(_python_tuple(stream, record))  # no secret is made here
        elif kind == "numpy-legacy":
            np.random.RandomState().set_state(record["state"])
        elif kind == "numpy":
            generator = generators[stream.removeprefix(GENERATOR_PREFIX)]
            type(generator.bit_generator)().state = record.get("state")
        else:
            _ensure_torch_state(stream, stream_bytes(stream, record, "state"), record["device"])
    except (ValueError, TypeError, KeyError, RuntimeError, OverflowError, AttributeError) as error:
        raise damaged_stream(stream, f"a state of {kind}", f"{type(error).__name__}: {error}") from error


def _ensure_torch_state(stream: str, state: bytes, device: str) -> None:
    if device == "cpu":
        torch.Generator().set_state(_tensor(state))
    elif device == "cuda" and (len(state) != CUDA_STATE.size or CUDA_STATE.unpack(state)[1] % 4):
        raise damaged_stream(
            stream, f"{CUDA_STATE.size} bytes with an offset that is a multiple of 4", f"{len(state)} bytes"
        )


def _kind_of_stream(stream: str, generators: Mapping[str, Any]) -> tuple[str, str]:
    if stream.startswith(GENERATOR_PREFIX):
        record = _generator_record(stream, generators[stream.removeprefix(GENERATOR_PREFIX)])
        return record["kind"], record.get("device", "")
    return kind_of_stream(stream)


def _python_tuple(stream: str, record: dict[str, Any]) -> tuple[Any, ...]:
    words = stream_bytes(stream, record, "words")
    if len(words) != 4 * (MT_WORDS + 1):
        raise damaged_stream(stream, f"{MT_WORDS + 1} words", f"{len(words)} bytes")
    return (record.get("version"), struct.unpack(f"<{MT_WORDS + 1}I", words), record.get("gauss"))


def _tensor(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)


def _set_stream(
    stream: str, record: dict[str, Any], generators: Mapping[str, Any], *, has_own: Collection[str]
) -> None:
    if stream == "python":
        random.setstate(_python_tuple(stream, record))
    elif stream == "numpy":
        np.random.set_state(record["state"])
    elif stream == "torch":
        torch.set_rng_state(_tensor(record["state"]))
    elif stream == "cuda":
        _set_cuda(record["state"], has_own)
    elif stream.startswith("cuda:"):
        torch.cuda.set_rng_state(_tensor(record["state"]), int(stream.removeprefix("cuda:")))
    else:
        generator = generators[stream.removeprefix(GENERATOR_PREFIX)]
        if isinstance(generator, torch.Generator):
            generator.set_state(_tensor(record["state"]))
        else:
            generator.bit_generator.state = record["state"]


def _set_cuda(state: bytes, has_own: Collection[str]) -> None:
    current = torch.cuda.current_device()
    untouched = CUDA_STATE.pack(CUDA_STATE.unpack(state)[0], 0)
    for index in range(torch.cuda.device_count()):
        if index == current:
            torch.cuda.set_rng_state(_tensor(state), index)
        elif f"cuda:{index}" not in has_own:
            torch.cuda.set_rng_state(_tensor(untouched), index)


@contextmanager
def preserved_rng(generators: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Every stream is afterwards where it was before, whatever happens inside."""
    streams = capture_rng(generators)
    try:
        yield
    finally:
        restore_rng(streams, generators)
