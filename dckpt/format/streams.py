"""Records of random streams, and how a stream is derived anew on another mesh (FORMAT.md, section 10.3). Pure functions.

Deriving (`rekey_stream`) is a pure function of checkpoint and mesh. K = BLAKE2b-256 of the UTF-8 text

    dckpt-rng-v1|<run seed>|<stream>|<generation>|<step>|<axis>=<coordinate>,...        axes in the order of their names

with decimal numbers; inside a slot (`slot_key`) of dckpt-slot-v1|<seed>|<stream>|<step>|<micro-batch>. torch CPU: 624 words
of numpy's SeedSequence(int(K)), the first replaced by 0x80000000. CUDA: seed = first 8 bytes of K (little-endian), offset 0.
numpy legacy: key as for torch, of its own K. numpy Generator: its bit generator seeded with int(K). Python:
random.seed(int(K)). int(K) is big-endian.
"""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from dckpt.errors import ConfigError, CorruptCheckpointError
from dckpt.format.values import JsonValue, decode_value, encode_value

MT_WORDS = 624
TORCH_CPU_BYTES = 5056
CUDA_STATE = struct.Struct("<Qq")
"""Seed and offset of a CUDA generator."""
GENERATOR_PREFIX = "generator:"
EPOCH_PREFIX = "epoch."
"""Before a stream's name: its state when the running epoch's iterators were made."""

# initial seed, left, seeded, next; 624 words of 64 bits each; normal x, y, rho, valid; next float normal, valid.
_TORCH_CPU = struct.Struct(f"<Qii Q {MT_WORDS}Q ddd i4x f?3x".replace(" ", ""))

assert _TORCH_CPU.size == TORCH_CPU_BYTES


def encode_stream(record: dict[str, Any]) -> JsonValue:
    """A stream's record as tagged JSON."""
    return encode_value(record, path="rng")


def decode_stream(stream: str, state: JsonValue) -> dict[str, Any]:
    """The record of a stream; `kind` is a string, the rest is not looked at."""
    record = decode_value(state, key="manifest.json", path=f"rng.{stream}")
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        raise damaged_stream(stream, "a record with a kind", type(record).__name__)
    return record


def damaged_stream(stream: str, expected: str, found: str) -> CorruptCheckpointError:
    """The error for a state that cannot be one of this stream."""
    return CorruptCheckpointError(
        f"random stream {stream}: expected {expected}, found {found}. Use an older checkpoint; `dckpt verify` shows "
        "the damage",
        field=f"rng.{stream}",
        expected=expected,
        found=found,
    )


def stream_bytes(stream: str, record: dict[str, Any], name: str) -> bytes:
    """The bytes under `name` in a stream's record."""
    value = record.get(name)
    if not isinstance(value, bytes):
        raise damaged_stream(stream, f"bytes as {name!r}", type(value).__name__)
    return value


def python_record(state: tuple[Any, ...]) -> dict[str, Any]:
    """The record of what `random.getstate()` gives."""
    version, words, gauss = state
    return {"kind": "python", "version": version, "words": struct.pack(f"<{len(words)}I", *words), "gauss": gauss}


def plain_stream(stream: str) -> str:
    """The stream itself, of which `stream` may be the state at the epoch's start."""
    return stream.removeprefix(EPOCH_PREFIX)


def kind_of_stream(stream: str) -> tuple[str, str]:
    """(kind, device) of a stream whose name says it; generators are of any kind."""
    stream = plain_stream(stream)
    if stream in ("python", "numpy"):
        return ("python", "") if stream == "python" else ("numpy-legacy", "")
    return "torch", "cpu" if stream == "torch" else "cuda"


def stream_digest(state: JsonValue) -> str:
    """32 hex digits that are equal exactly for equal states."""
    text = json.dumps(state, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def run_seed_of(streams: Mapping[str, JsonValue]) -> int:
    """The seed of the run: what torch's CPU generator was first seeded with (of rank 0, as the caller sees to)."""
    if "torch" not in streams:
        raise damaged_stream("torch", "the CPU stream", "none")
    state = stream_bytes("torch", decode_stream("torch", streams["torch"]), "state")
    if len(state) != TORCH_CPU_BYTES:
        raise damaged_stream("torch", f"{TORCH_CPU_BYTES} bytes", f"{len(state)} bytes")
    return int.from_bytes(state[:8], "little")


def stream_key(stream: str, *, run_seed: int, generation: int, step: int, coordinates: Mapping[str, int]) -> bytes:
    """K of the rule above; `coordinates` are those along the axes over which the stream varies."""
    place = ",".join(f"{axis}={coordinates[axis]}" for axis in sorted(coordinates))
    text = f"dckpt-rng-v1|{run_seed}|{stream}|{generation}|{step}|{place}"
    return hashlib.blake2b(text.encode(), digest_size=32).digest()


def slot_key(stream: str, *, seed: int, step: int, micro_batch: int) -> bytes:
    """K of a stream inside a slot: a function of what is computed, never of who computes it."""
    text = f"dckpt-slot-v1|{seed}|{stream}|{step}|{micro_batch}"
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
        return encode_stream(python_record(random.Random(number).getstate()))
    if kind == "numpy-legacy":
        state = {"key": mt_words(number), "pos": MT_WORDS}
        legacy = {"bit_generator": "MT19937", "state": state, "has_gauss": 0, "gauss": 0.0}
        return encode_stream({"kind": kind, "state": legacy})
    if kind == "numpy":
        return encode_stream({"kind": kind, "state": _bit_generator(stream, like)(number).state})
    if device == "cuda":
        raw = CUDA_STATE.pack(int.from_bytes(key[:8], "little"), 0)
    elif device == "cpu":
        raw = torch_cpu_state(mt_words(number), seed=int.from_bytes(key[:8], "little"))
    else:
        raise ConfigError(
            f"random stream {stream}: a generator on {device!r} cannot be derived anew. Reseed it yourself"
        )
    return encode_stream({"kind": kind, "device": device, "state": raw})


def torch_cpu_state(words: np.ndarray[Any, np.dtype[np.uint32]], *, seed: int) -> bytes:
    """A freshly seeded state of torch's CPU generator: 624 Mersenne Twister words, none used yet."""
    return _TORCH_CPU.pack(seed, 1, 1, 0, *(int(word) for word in words), 0.0, 0.0, 0.0, 0, 0.0, False)


def mt_words(number: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Mersenne Twister words for a key, as the rule above says."""
    words = np.random.SeedSequence(number).generate_state(MT_WORDS, np.uint32).astype(np.uint32)
    # Only the highest bit of the first word is state; this one makes the state non-zero for certain.
    words[0] = 0x80000000
    return words


def _kind_to_rekey(stream: str, like: JsonValue | None) -> tuple[str, str]:
    if not plain_stream(stream).startswith(GENERATOR_PREFIX):
        return kind_of_stream(stream)
    if like is None:
        raise ConfigError(f"random stream {stream}: pass like=, a saved state of it, for its kind is not in its name")
    record = decode_stream(stream, like)
    return record["kind"], str(record.get("device", ""))


def _bit_generator(stream: str, like: JsonValue | None) -> type[np.random.BitGenerator]:
    state = decode_stream(stream, like).get("state") if like is not None else None
    name = state.get("bit_generator") if isinstance(state, dict) else None
    kinds: dict[str, type[np.random.BitGenerator]] = {
        kind.__name__: kind
        for kind in (
            np.random.MT19937, np.random.PCG64, np.random.PCG64DXSM, np.random.Philox, np.random.SFC64,
        )
    }  # fmt: skip
    if not isinstance(name, str) or name not in kinds:
        raise damaged_stream(stream, f"one of {', '.join(kinds)}", f"{name!r:.80}")
    return kinds[name]
