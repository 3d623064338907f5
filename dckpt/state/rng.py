"""Random streams: read without advancing them, written back exactly, classified over the mesh, derived anew after a resize.

Streams: `python`, `numpy` (the legacy global one), `torch` (CPU), `cuda` (this process's current device), `cuda:<i>` (another
device whose generator was used or seeded apart) and `generator:<name>`. The current device has one name on all ranks,
whatever its number: rank 1 of two that run alike moves cuda:1, and that must not look like a difference.

Rekeying (`rekey_stream`) is a pure function of checkpoint and mesh. K = BLAKE2b-256 of the UTF-8 text

    dckpt-rng-v1|<run seed>|<stream>|<generation>|<step>|<axis>=<coordinate>,...        axes in the order of their names

with decimal numbers. torch CPU: 624 words of numpy's SeedSequence(int(K)), the first replaced by 0x80000000. CUDA: seed = first
8 bytes of K (little-endian), offset 0. numpy legacy: key as for torch, of its own K. numpy Generator: its bit generator
seeded with int(K). Python: random.seed(int(K)). int(K) is big-endian.
"""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch

from dckpt.errors import ConfigError, CorruptCheckpointError
from dckpt.format.values import JsonValue, decode_value, encode_value

RngAction = Literal["exact", "copy", "rekey", "fresh", "drop"]

RANK_AXIS = "rank"
"""The one axis when there is no mesh."""

_MT_WORDS = 624
# initial seed, left, seeded, next; 624 words of 64 bits each; normal x, y, rho, valid; next float normal, valid.
_TORCH_CPU = struct.Struct(f"<Qii Q {_MT_WORDS}Q ddd i4x f?3x".replace(" ", ""))
_TORCH_CPU_BYTES = 5056
_CUDA = struct.Struct("<Qq")
_GENERATOR = "generator:"

assert _TORCH_CPU.size == _TORCH_CPU_BYTES


# Reading.


def capture_rng(generators: Mapping[str, Any] | None = None) -> dict[str, JsonValue]:
    """Every stream's state as tagged JSON. No stream moves, and CUDA is not started."""
    streams: dict[str, JsonValue] = {
        "python": _encode({"kind": "python", **_python_state(random.getstate())}),
        "numpy": _encode({"kind": "numpy-legacy", "state": np.random.get_state(legacy=False)}),
        "torch": _encode({"kind": "torch", "device": "cpu", "state": _bytes(torch.get_rng_state())}),
    }
    for stream, state in _cuda_states().items():
        streams[stream] = _encode({"kind": "torch", "device": "cuda", "state": state})
    for name, generator in (generators or {}).items():
        streams[f"{_GENERATOR}{name}"] = _encode(_generator_record(name, generator))
    return streams


def _encode(record: dict[str, Any]) -> JsonValue:
    return encode_value(record, path="rng")


def _bytes(state: torch.Tensor) -> bytes:
    return state.numpy().tobytes()


def _python_state(state: tuple[Any, ...]) -> dict[str, Any]:
    version, words, gauss = state
    return {"version": version, "words": struct.pack(f"<{len(words)}I", *words), "gauss": gauss}


def _cuda_states() -> dict[str, bytes]:
    # A process that has not started CUDA has drawn nothing there; starting it would take memory on the device.
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return {}
    states = [_bytes(generator.get_state()) for generator in torch.cuda.default_generators]
    current = torch.cuda.current_device()
    found = {"cuda": states[current]}
    untouched = _CUDA.pack(_CUDA.unpack(states[current][: _CUDA.size])[0], 0)
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
    records = {stream: _decode(stream, state) for stream, state in streams.items()}
    unavailable = sorted(set(records) - set(available_streams(generators)))
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
    return ["python", "numpy", "torch", *cuda, *(f"{_GENERATOR}{name}" for name in generators or {})]


def _decode(stream: str, state: JsonValue) -> dict[str, Any]:
    record = decode_value(state, key="manifest.json", path=f"rng.{stream}")
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        raise _damaged(stream, "a record with a kind", type(record).__name__)
    return record


def _damaged(stream: str, expected: str, found: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"random stream {stream}: expected {expected}, found {found}. Use an older checkpoint; `dckpt verify` shows "
        "the damage",
        field=f"rng.{stream}",
        expected=expected,
        found=found,
    )


def _raw(stream: str, record: dict[str, Any], name: str) -> bytes:
    value = record.get(name)
    if not isinstance(value, bytes):
        raise _damaged(stream, f"bytes as {name!r}", type(value).__name__)
    return value


def _ensure_fits(stream: str, record: dict[str, Any], generators: Mapping[str, Any]) -> None:
    """Try the state on a stand-in, so that a bad one is found before any stream has moved."""
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
            generator = generators[stream.removeprefix(_GENERATOR)]
            type(generator.bit_generator)().state = record.get("state")
        else:
            _ensure_torch_state(stream, _raw(stream, record, "state"), record["device"])
    except (ValueError, TypeError, KeyError, RuntimeError, OverflowError, AttributeError) as error:
        raise _damaged(stream, f"a state of {kind}", f"{type(error).__name__}: {error}") from error


def _ensure_torch_state(stream: str, state: bytes, device: str) -> None:
    if device == "cpu":
        torch.Generator().set_state(_tensor(state))
    elif device == "cuda" and (len(state) != _CUDA.size or _CUDA.unpack(state)[1] % 4):
        raise _damaged(stream, f"{_CUDA.size} bytes with an offset that is a multiple of 4", f"{len(state)} bytes")


def _kind_of_stream(stream: str, generators: Mapping[str, Any]) -> tuple[str, str]:
    if stream.startswith(_GENERATOR):
        record = _generator_record(stream, generators[stream.removeprefix(_GENERATOR)])
        return record["kind"], record.get("device", "")
    if stream in ("python", "numpy"):
        return ("python", "") if stream == "python" else ("numpy-legacy", "")
    return "torch", "cpu" if stream == "torch" else "cuda"


def _python_tuple(stream: str, record: dict[str, Any]) -> tuple[Any, ...]:
    words = _raw(stream, record, "words")
    if len(words) != 4 * (_MT_WORDS + 1):
        raise _damaged(stream, f"{_MT_WORDS + 1} words", f"{len(words)} bytes")
    return (record.get("version"), struct.unpack(f"<{_MT_WORDS + 1}I", words), record.get("gauss"))


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
        generator = generators[stream.removeprefix(_GENERATOR)]
        if isinstance(generator, torch.Generator):
            generator.set_state(_tensor(record["state"]))
        else:
            generator.bit_generator.state = record["state"]


def _set_cuda(state: bytes, has_own: Collection[str]) -> None:
    current = torch.cuda.current_device()
    untouched = _CUDA.pack(_CUDA.unpack(state)[0], 0)
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


# Deciding.


def stream_digest(state: JsonValue) -> str:
    """32 hex digits that are equal exactly for equal states."""
    text = json.dumps(state, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def classify_streams(
    digests_per_rank: Sequence[Mapping[str, str]], coordinates: Sequence[Mapping[str, int]] | None = None
) -> dict[str, tuple[str, ...]]:
    """Stream -> the mesh axes along which it varies; () is equal everywhere. Without a mesh the one axis is `rank`.

    A stream varies along an axis when two ranks that differ in this axis alone have different states; a rank without
    the stream differs from one that has it.
    """
    if coordinates and len(coordinates) != len(digests_per_rank):
        raise ConfigError(
            f"classify_streams: {len(digests_per_rank)} ranks gave digests, {len(coordinates)} gave coordinates. "
            "Every rank must be in the mesh"
        )
    places = coordinates or [{RANK_AXIS: rank} for rank in range(len(digests_per_rank))]
    axes = list(places[0]) if places else []
    streams = dict.fromkeys(stream for digests in digests_per_rank for stream in digests)
    return {stream: _varying_axes(stream, digests_per_rank, places, axes) for stream in streams}


def _varying_axes(
    stream: str,
    digests_per_rank: Sequence[Mapping[str, str]],
    places: Sequence[Mapping[str, int]],
    axes: Sequence[str],
) -> tuple[str, ...]:
    varying: list[str] = []
    for axis in axes:
        lines: dict[tuple[int, ...], set[str]] = {}
        for digests, place in zip(digests_per_rank, places, strict=True):
            line = tuple(place[other] for other in axes if other != axis)
            lines.setdefault(line, set()).add(digests.get(stream, ""))
        if any(len(found) > 1 for found in lines.values()):
            varying.append(axis)
    return tuple(varying)


def plan_rng(
    saved: Mapping[str, Sequence[str]], *, same_mesh: bool, available: Collection[str]
) -> dict[str, RngAction]:
    """Stream -> what a resuming rank does with it.

    exact: its own bytes. copy: any rank's bytes, they are equal. rekey: `rekey_stream` on every rank. drop: this process
    has no such device or generator. fresh: live and never saved, left as the program seeded it.
    """
    plan: dict[str, RngAction] = {}
    for stream, axes in saved.items():
        if stream not in available:
            plan[stream] = "drop"
        elif same_mesh:
            plan[stream] = "exact"
        else:
            plan[stream] = "rekey" if axes else "copy"
    for stream in available:
        # `cuda:<i>` is saved only where it says something that `cuda` does not.
        if stream not in saved and not stream.startswith("cuda:"):
            plan[stream] = "fresh"
    return plan


# Deriving.


def run_seed_of(streams: Mapping[str, JsonValue]) -> int:
    """The seed of the run: what torch's CPU generator was first seeded with (of rank 0, as the caller sees to)."""
    if "torch" not in streams:
        raise _damaged("torch", "the CPU stream", "none")
    state = _raw("torch", _decode("torch", streams["torch"]), "state")
    if len(state) != _TORCH_CPU_BYTES:
        raise _damaged("torch", f"{_TORCH_CPU_BYTES} bytes", f"{len(state)} bytes")
    return int.from_bytes(state[:8], "little")


def stream_key(stream: str, *, run_seed: int, generation: int, step: int, coordinates: Mapping[str, int]) -> bytes:
    """K of the rule above; `coordinates` are those along the axes over which the stream varies."""
    place = ",".join(f"{axis}={coordinates[axis]}" for axis in sorted(coordinates))
    text = f"dckpt-rng-v1|{run_seed}|{stream}|{generation}|{step}|{place}"
    return hashlib.blake2b(text.encode(), digest_size=32).digest()


def rekey_stream(
    stream: str,
    *,
    run_seed: int,
    generation: int,
    step: int,
    coordinates: Mapping[str, int],
    like: JsonValue | None = None,
) -> JsonValue:
    """The stream's new state. `like` is any saved state of a `generator:<name>` stream, which tells its kind."""
    key = stream_key(stream, run_seed=run_seed, generation=generation, step=step, coordinates=coordinates)
    number = int.from_bytes(key, "big")
    kind, device = _kind_to_rekey(stream, like)
    if kind == "python":
        return _encode({"kind": kind, **_python_state(random.Random(number).getstate())})
    if kind == "numpy-legacy":
        state = {"key": _mt_words(number), "pos": _MT_WORDS}
        legacy = {"bit_generator": "MT19937", "state": state, "has_gauss": 0, "gauss": 0.0}
        return _encode({"kind": kind, "state": legacy})
    if kind == "numpy":
        return _encode({"kind": kind, "state": _bit_generator(stream, like)(number).state})
    if device == "cuda":
        raw = _CUDA.pack(int.from_bytes(key[:8], "little"), 0)
    elif device == "cpu":
        raw = torch_cpu_state(_mt_words(number), seed=int.from_bytes(key[:8], "little"))
    else:
        raise ConfigError(
            f"random stream {stream}: a generator on {device!r} cannot be derived anew. Reseed it yourself"
        )
    return _encode({"kind": kind, "device": device, "state": raw})


def torch_cpu_state(words: np.ndarray[Any, np.dtype[np.uint32]], *, seed: int) -> bytes:
    """A freshly seeded state of torch's CPU generator: 624 Mersenne Twister words, none used yet."""
    return _TORCH_CPU.pack(seed, 1, 1, 0, *(int(word) for word in words), 0.0, 0.0, 0.0, 0, 0.0, False)


def _mt_words(number: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
    words = np.random.SeedSequence(number).generate_state(_MT_WORDS, np.uint32).astype(np.uint32)
    # Only the highest bit of the first word is state; this one makes the state non-zero for certain.
    words[0] = 0x80000000
    return words


def _kind_to_rekey(stream: str, like: JsonValue | None) -> tuple[str, str]:
    if not stream.startswith(_GENERATOR):
        return _kind_of_stream(stream, {})
    if like is None:
        raise ConfigError(f"random stream {stream}: pass like=, a saved state of it, for its kind is not in its name")
    record = _decode(stream, like)
    return record["kind"], str(record.get("device", ""))


def _bit_generator(stream: str, like: JsonValue | None) -> type[np.random.BitGenerator]:
    state = _decode(stream, like).get("state") if like is not None else None
    name = state.get("bit_generator") if isinstance(state, dict) else None
    kinds: dict[str, type[np.random.BitGenerator]] = {
        kind.__name__: kind
        for kind in (
            np.random.MT19937, np.random.PCG64, np.random.PCG64DXSM, np.random.Philox, np.random.SFC64,
        )
    }  # fmt: skip
    if not isinstance(name, str) or name not in kinds:
        raise _damaged(stream, f"one of {', '.join(kinds)}", f"{name!r:.80}")
    return kinds[name]
