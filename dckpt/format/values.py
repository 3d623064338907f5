"""Python values as tagged JSON: what can be stored, and nothing that executes (FORMAT.md, section 10)."""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dckpt.errors import ConfigError
from dckpt.format.layout import is_tensor_name
from dckpt.format.refusal import corrupt, shown
from dckpt.format.sealed_json import (
    INT_LIMIT,
    JsonValue,
    dump_json,
    load_json,
    open_sealed_json,
    seal_json,
)

__all__ = [
    "VALUES_DEPTH_MAX",
    "DType",
    "JsonValue",
    "Size",
    "TensorRef",
    "decode_value",
    "dump_json",
    "encode_value",
    "load_json",
    "open_sealed_json",
    "seal_json",
]

VALUES_DEPTH_MAX = 64
INT_DIGITS_MAX = 4096
ARRAY_DIMENSIONS_MAX = 32
# The largest integer of 4096 digits has at least this many bits.
_INT_BITS_MAX = 13606

_ARRAY_DTYPES = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "float32", "float64", "complex64", "complex128",
)  # fmt: skip
_DTYPE_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_DECIMAL = re.compile(r"-?[1-9][0-9]{0,4095}")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class DType:
    """A torch dtype by its name, such as `float32`; this package does not know torch."""

    name: str


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Stands for a tensor inside a value; `name` is the tensor's name in the checkpoint."""

    name: str


@dataclass(frozen=True, slots=True)
class Size:
    """A torch.Size."""

    sizes: tuple[int, ...]


def encode_value(value: Any, *, path: str) -> JsonValue:
    """`value` as tagged JSON. What cannot be stored is a `ConfigError` that names `path` and the remedy."""
    return _encode(value, path, 1)


def _refuse_value(path: str, found: str, remedy: str) -> ConfigError:
    return ConfigError(f"Value {path}: expected plain data, found {found}. {remedy}")


def _encode(value: Any, path: str, depth: int) -> JsonValue:
    # Exact types only: a subclass would come back as its base, and that is a silent change.
    kind = type(value)
    if value is None or kind is bool:
        return value  # type: ignore[no-any-return]
    if kind is str:
        return _encode_str(value, path)
    if kind is int:
        return _encode_int(value, path)
    if kind is float:
        return value if math.isfinite(value) else {"$t": "float", "v": str(value)}
    encoder = _ENCODERS.get(kind)
    if encoder is not None:
        if depth > VALUES_DEPTH_MAX:
            raise _refuse_value(path[:200], f"more than {VALUES_DEPTH_MAX} levels", "Flatten it, and look for a cycle.")
        return encoder(value, path, depth)
    if kind.__module__ == "numpy":
        return _encode_numpy(value, path)
    raise _refuse_value(path, f"{kind.__module__}.{kind.__qualname__}", _remedy(value))


def _remedy(value: Any) -> str:
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return "Store value._asdict(), and rebuild the named tuple after loading."
    if hasattr(value, "state_dict") and not isinstance(value, type):
        return "Store its state_dict()."
    if callable(value):
        return "Code is never stored: store the name or the arguments from which you can rebuild it."
    for base in (bool, int, float, str, bytes, tuple, list, dict, set, frozenset):
        if isinstance(value, base):
            return f"Subclasses are not kept: store {base.__name__}(value)."
    return "Give its class state_dict() and load_state_dict(), or store its fields as a dict."


def _encode_str(value: str, path: str) -> str:
    if not value.isascii() and _SURROGATE.search(value):
        raise _refuse_value(path, "a str with a lone surrogate", "Store bytes: value.encode(errors='surrogateescape').")
    return value


def _encode_int(value: int, path: str) -> JsonValue:
    if -INT_LIMIT < value < INT_LIMIT:
        return value
    if value.bit_length() > _INT_BITS_MAX:
        raise _refuse_value(path, f"an int of {value.bit_length()} bits", "Store it as bytes.")
    return {"$t": "int", "v": str(value)}


def _encode_list(value: list[Any], path: str, depth: int) -> JsonValue:
    return [_encode(item, f"{path}[{place}]", depth + 1) for place, item in enumerate(value)]


def _encode_tuple(value: tuple[Any, ...], path: str, depth: int) -> JsonValue:
    return {
        "$t": "tuple",
        "v": [_encode(item, f"{path}[{place}]", depth + 1) for place, item in enumerate(value)],
    }


def _encode_pairs(value: dict[Any, Any], path: str, depth: int) -> list[JsonValue]:
    return [
        [
            _encode(name, f"{path} key {shown(name)}", depth + 1),
            _encode(item, f"{path}.{shown(name)}", depth + 1),
        ]
        for name, item in value.items()
    ]


def _encode_dict(value: dict[Any, Any], path: str, depth: int) -> JsonValue:
    if all(type(name) is str and not name.startswith("$") for name in value):
        return {_encode_str(name, path): _encode(item, f"{path}.{name}", depth + 1) for name, item in value.items()}
    return {"$t": "dict", "v": _encode_pairs(value, path, depth)}


def _encode_ordered_dict(value: OrderedDict[Any, Any], path: str, depth: int) -> JsonValue:
    return {"$t": "OrderedDict", "v": _encode_pairs(value, path, depth)}


def _encode_counter(value: Counter[Any], path: str, depth: int) -> JsonValue:
    return {"$t": "Counter", "v": _encode_pairs(value, path, depth)}


def _encode_set(value: set[Any] | frozenset[Any], path: str, depth: int) -> JsonValue:
    # A set of strings has another order in every process. Values are compared between ranks by their bytes.
    items = [_encode(item, f"{path} element", depth + 1) for item in value]
    return {"$t": type(value).__name__, "v": sorted(items, key=dump_json)}


def _encode_bytes(value: bytes, path: str, depth: int) -> JsonValue:
    del path, depth
    return {"$t": "bytes", "v": base64.b64encode(value).decode("ascii")}


def _encode_dtype(value: DType, path: str, depth: int) -> JsonValue:
    del depth
    if not _DTYPE_NAME.fullmatch(value.name):
        raise _refuse_value(path, f"the dtype name {shown(value.name)}", "Use torch's name, such as float32.")
    return {"$t": "dtype", "v": value.name}


def _encode_tensor_ref(value: TensorRef, path: str, depth: int) -> JsonValue:
    del depth
    if not is_tensor_name(value.name):
        raise _refuse_value(path, f"the tensor name {shown(value.name)}", "Use 1 to 4096 bytes, no control characters.")
    return {"$t": "tensor", "v": value.name}


def _encode_size(value: Size, path: str, depth: int) -> JsonValue:
    del depth
    if not all(type(size) is int and -INT_LIMIT < size < INT_LIMIT for size in value.sizes):
        raise _refuse_value(path, f"the sizes {shown(value.sizes)}", "Use ints below 2^63.")
    return {"$t": "size", "v": list(value.sizes)}


_ENCODERS: dict[type, Callable[[Any, str, int], JsonValue]] = {
    list: _encode_list,
    tuple: _encode_tuple,
    dict: _encode_dict,
    OrderedDict: _encode_ordered_dict,
    Counter: _encode_counter,
    set: _encode_set,
    frozenset: _encode_set,
    bytes: _encode_bytes,
    DType: _encode_dtype,
    TensorRef: _encode_tensor_ref,
    Size: _encode_size,
}


def _encode_numpy(value: Any, path: str) -> JsonValue:
    import numpy as np  # Imported here: `dckpt ls` reads manifests and must start quickly.

    kind = type(value)
    is_array = kind is np.ndarray
    dtype = value.dtype if is_array or isinstance(value, np.generic) else None
    if dtype is None or dtype.name not in _ARRAY_DTYPES or dtype.fields is not None:
        found = f"{kind.__module__}.{kind.__qualname__}" + (f" of dtype {dtype}" if dtype is not None else "")
        raise _refuse_value(path, found, "Convert it to a plain numeric array, or to lists and numbers.")
    if not dtype.isnative:
        raise _refuse_value(
            path, f"an array of byte order {dtype.str}", "Use array.astype(array.dtype.newbyteorder('='))."
        )
    raw = np.asarray(value).astype(dtype.newbyteorder("<"), copy=False).tobytes()
    data = base64.b64encode(raw).decode("ascii")
    if not is_array:
        return {"$t": "npscalar", "dtype": dtype.name, "v": data}
    if value.ndim > ARRAY_DIMENSIONS_MAX:
        raise _refuse_value(path, f"an array of {value.ndim} dimensions", "Reshape it.")
    return {"$t": "ndarray", "dtype": dtype.name, "shape": list(value.shape), "v": data}


def decode_value(json: Any, *, key: str, path: str) -> Any:
    """The value that `encode_value` stored; anything else is refused, naming `key` and `path`."""
    return _decode(json, key, path, 1)


def _decode(found: Any, key: str, path: str, depth: int) -> Any:
    kind = type(found)
    if found is None or kind is bool or kind is str:
        return found
    if kind is int:
        if not -INT_LIMIT < found < INT_LIMIT:
            raise corrupt(key, path, "an integer between -2^63 and 2^63", shown(found))
        return found
    if kind is float:
        if not math.isfinite(found):
            raise corrupt(key, path, "a finite number", shown(found))
        return found
    if depth > VALUES_DEPTH_MAX + 1:
        raise corrupt(key, path[:200], f"at most {VALUES_DEPTH_MAX} levels", "a deeper nesting")
    if kind is list:
        return [_decode(item, key, f"{path}[{place}]", depth + 1) for place, item in enumerate(found)]
    if kind is not dict:
        raise corrupt(key, path, "a JSON value", kind.__name__)
    if "$t" in found:
        return _decode_tagged(found, key, path, depth)
    decoded: dict[str, Any] = {}
    for name, item in found.items():
        if name.startswith("$"):
            raise corrupt(key, path, "keys that do not begin with $", shown(name))
        decoded[name] = _decode(item, key, f"{path}.{name}", depth + 1)
    return decoded


def _decode_tagged(found: dict[str, Any], key: str, path: str, depth: int) -> Any:
    tag = found["$t"]
    decoder = _DECODERS.get(tag) if isinstance(tag, str) else None
    if decoder is None:
        raise corrupt(key, path, "a known tag", shown(tag))
    wanted = {"$t", "v"} | {"ndarray": {"dtype", "shape"}, "npscalar": {"dtype"}}.get(tag, set())
    if set(found) != wanted:
        raise corrupt(key, path, f"the keys {sorted(wanted)}", shown(str(sorted(found))))
    return decoder(found, key, path, depth)


def _listed(found: dict[str, Any], key: str, path: str) -> list[Any]:
    value = found["v"]
    if not isinstance(value, list):
        raise corrupt(key, path, "an array", shown(value))
    return value


def _text(value: Any, key: str, path: str) -> str:
    if not isinstance(value, str):
        raise corrupt(key, path, "a string", shown(value))
    return value


def _raw(found: dict[str, Any], key: str, path: str) -> bytes:
    try:
        return base64.b64decode(_text(found["v"], key, path), validate=True)
    except (binascii.Error, ValueError) as error:
        raise corrupt(key, path, "base64", str(error)) from None


def _decode_tuple(found: dict[str, Any], key: str, path: str, depth: int) -> Any:
    items = enumerate(_listed(found, key, path))
    return tuple(_decode(item, key, f"{path}[{place}]", depth + 1) for place, item in items)


def _decode_pairs(found: dict[str, Any], key: str, path: str, depth: int) -> dict[Any, Any]:
    decoded: dict[Any, Any] = {}
    pairs = _listed(found, key, path)
    for place, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2:
            raise corrupt(key, f"{path}[{place}]", "a pair of key and value", shown(pair))
        name = _decode(pair[0], key, f"{path}[{place}] key", depth + 1)
        item = _decode(pair[1], key, f"{path}[{place}]", depth + 1)
        try:
            decoded[name] = item
        except TypeError:
            raise corrupt(key, f"{path}[{place}] key", "a hashable value", type(name).__name__) from None
    if len(decoded) != len(pairs):
        raise corrupt(key, path, "each key once", "a repeated one")
    return decoded


def _decode_ordered_dict(found: dict[str, Any], key: str, path: str, depth: int) -> Any:
    return OrderedDict(_decode_pairs(found, key, path, depth))


def _decode_counter(found: dict[str, Any], key: str, path: str, depth: int) -> Any:
    return Counter(_decode_pairs(found, key, path, depth))


def _decode_set(found: dict[str, Any], key: str, path: str, depth: int) -> Any:
    items = [_decode(item, key, f"{path} element", depth + 1) for item in _listed(found, key, path)]
    try:
        decoded = frozenset(items) if found["$t"] == "frozenset" else set(items)
    except TypeError:
        raise corrupt(key, path, "hashable elements", "one that is not") from None
    if len(decoded) != len(items):
        raise corrupt(key, path, "each element once", "a repeated one")
    return decoded


def _decode_bytes(found: dict[str, Any], key: str, path: str, depth: int) -> Any:
    del depth
    return _raw(found, key, path)


def _decode_int(found: dict[str, Any], key: str, path: str, depth: int) -> Any:
    del depth
    text = _text(found["v"], key, path)
    if not _DECIMAL.fullmatch(text) or abs(int(text)) < INT_LIMIT:
        raise corrupt(key, path, f"an integer beyond 2^63 of at most {INT_DIGITS_MAX} digits", shown(text))
    return int(text)


def _decode_float(found: dict[str, Any], key: str, path: str, depth: int) -> Any:
    del depth
    text = _text(found["v"], key, path)
    if text not in ("inf", "-inf", "nan"):
        raise corrupt(key, path, "inf, -inf or nan", shown(text))
    return float(text)


def _decode_dtype(found: dict[str, Any], key: str, path: str, depth: int) -> Any:
    del depth
    name = _text(found["v"], key, path)
    if not _DTYPE_NAME.fullmatch(name):
        raise corrupt(key, path, "the name of a dtype", shown(name))
    return DType(name)


def _decode_tensor_ref(found: dict[str, Any], key: str, path: str, depth: int) -> Any:
    del depth
    name = _text(found["v"], key, path)
    if not is_tensor_name(name):
        raise corrupt(key, path, "the name of a tensor", shown(name))
    return TensorRef(name)


def _integers(value: Any, key: str, path: str) -> list[int]:
    if not isinstance(value, list) or not all(type(size) is int and -INT_LIMIT < size < INT_LIMIT for size in value):
        raise corrupt(key, path, "an array of integers", shown(value))
    return value


def _decode_size(found: dict[str, Any], key: str, path: str, depth: int) -> Any:
    del depth
    return Size(tuple(_integers(found["v"], key, path)))


def _decode_array(found: dict[str, Any], key: str, path: str, depth: int) -> Any:
    del depth
    import numpy as np  # Imported here: see _encode_numpy.

    name = _text(found["dtype"], key, path)
    if name not in _ARRAY_DTYPES:
        raise corrupt(key, path, "a plain numeric dtype", shown(name))
    shape = _integers(found["shape"], key, path) if found["$t"] == "ndarray" else []
    raw = _raw(found, key, path)
    dtype = np.dtype(name)
    wanted = math.prod(shape) * dtype.itemsize if len(shape) <= ARRAY_DIMENSIONS_MAX else -1
    if wanted != len(raw) or any(size < 0 for size in shape):
        raise corrupt(
            key,
            path,
            f"{len(raw)} bytes in at most {ARRAY_DIMENSIONS_MAX} dimensions",
            f"shape {shown(shape)}",
        )
    # Of a bytearray, not of bytes: the array that was stored could be written to.
    flat = np.frombuffer(bytearray(raw), dtype=dtype.newbyteorder("<")).astype(dtype, copy=False)
    if found["$t"] == "npscalar":
        return flat[0]
    try:
        return flat.reshape(shape)
    except ValueError as error:
        # An empty array may state dimensions that numpy cannot hold.
        raise corrupt(key, path, "a shape that numpy holds", str(error)) from None


_DECODERS: dict[str, Callable[[dict[str, Any], str, str, int], Any]] = {
    "tuple": _decode_tuple,
    "dict": _decode_pairs,
    "OrderedDict": _decode_ordered_dict,
    "Counter": _decode_counter,
    "set": _decode_set,
    "frozenset": _decode_set,
    "bytes": _decode_bytes,
    "int": _decode_int,
    "float": _decode_float,
    "dtype": _decode_dtype,
    "tensor": _decode_tensor_ref,
    "size": _decode_size,
    "ndarray": _decode_array,
    "npscalar": _decode_array,
}
