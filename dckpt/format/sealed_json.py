"""Strict JSON, and JSON files that carry their own SHA-256 (FORMAT.md, sections 4.1 and 4.2)."""

from __future__ import annotations

import hashlib
import json
import math
import re
from typing import Any, TypeAlias

from dckpt.errors import ConfigError
from dckpt.format.refusal import corrupt, shown

JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"

JSON_DEPTH_MAX = 256
JSON_BYTES_PER_CONTAINER = 16
"""A text has at most one `[` or `{` per so many bytes of its limit: containers are what makes a parse use memory."""
INT_LIMIT = 2**63

_SEAL_HEAD = b',"sha256":"'
_SEAL_TAIL = b'"}\n'
_SEAL_BYTES = len(_SEAL_HEAD) + 64 + len(_SEAL_TAIL)
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class _RefusedError(Exception):
    """Carries (expected, found) out of the hooks of the JSON parser."""


def _parse_int(text: str) -> int:
    # Converting a decimal takes quadratic time in old Pythons: look at the length first.
    if len(text) > 20 or not -INT_LIMIT < int(text) < INT_LIMIT:
        raise _RefusedError("an integer between -2^63 and 2^63", shown(text))
    return int(text)


def _parse_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _RefusedError("a number that a 64-bit float holds", shown(text))
    return value


def _refuse_constant(text: str) -> Any:
    raise _RefusedError("a finite number", text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise _RefusedError("each key once", f"the key {shown(name)} twice")
            seen.add(name)
    return found


def _ensure_depth(root: Any, key: str) -> None:
    # Level by level and not recursively: the depth of a hostile text must not be the depth of our stack.
    level = [root]
    depth = 0
    while level:
        depth += 1
        if depth > JSON_DEPTH_MAX:
            raise corrupt(key, "JSON", f"at most {JSON_DEPTH_MAX} levels", "a deeper nesting")
        level = [
            item
            for container in level
            if isinstance(container, (dict, list))
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, (dict, list))
        ]


def _ensure_no_surrogates(root: Any, key: str) -> None:
    rest = [root]
    while rest:
        item = rest.pop()
        if isinstance(item, dict):
            rest.extend(item.keys())
            rest.extend(item.values())
        elif isinstance(item, list):
            rest.extend(item)
        elif isinstance(item, str) and _SURROGATE.search(item):
            raise corrupt(key, "JSON", "valid Unicode", f"a lone surrogate in {shown(item)}")


def _num_containers(data: bytes) -> int:
    return data.count(b"[") + data.count(b"{")


def load_json(data: bytes | bytearray | memoryview, *, key: str, limit: int) -> Any:
    """The value of a JSON text of at most `limit` bytes; what section 4.2 of FORMAT.md forbids is refused."""
    data = bytes(data)
    if len(data) > limit:
        raise corrupt(key, "size", f"at most {limit} bytes", f"{len(data)} bytes")
    if _num_containers(data) > limit // JSON_BYTES_PER_CONTAINER:
        expected = f"at most {limit // JSON_BYTES_PER_CONTAINER} arrays and objects"
        raise corrupt(key, "JSON", expected, str(_num_containers(data)))
    try:
        text = data.decode("utf-8")
        found = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_parse_int,
            parse_float=_parse_float,
            parse_constant=_refuse_constant,
        )
    except UnicodeDecodeError as error:
        raise corrupt(key, f"byte {error.start}", "UTF-8", error.reason) from None
    except json.JSONDecodeError as error:
        raise corrupt(key, f"JSON at character {error.pos}", "JSON", error.msg) from None
    except _RefusedError as error:
        raise corrupt(key, "JSON", str(error.args[0]), str(error.args[1])) from None
    except RecursionError:
        raise corrupt(key, "JSON", f"at most {JSON_DEPTH_MAX} levels", "a deeper nesting") from None
    _ensure_depth(found, key)
    if _SURROGATE_ESCAPE.search(text):
        _ensure_no_surrogates(found, key)
    return found


def dump_json(obj: Any, *, limit: int | None = None) -> bytes:
    """Canonical JSON: no spaces, keys in order of insertion, UTF-8. Equal values give equal bytes.

    With a `limit`, what `load_json` would refuse for its size under that limit is refused here.
    """
    try:
        text = json.dumps(obj, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        data = text.encode("utf-8")
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"A value to be stored as JSON: expected finite numbers, valid Unicode, plain containers, "
            f"found: {error}. Encode it with dckpt.format.values.encode_value first."
        ) from error
    if limit is not None and (len(data) > limit or _num_containers(data) > limit // JSON_BYTES_PER_CONTAINER):
        raise ConfigError(
            f"A value to be stored as JSON: expected at most {limit} bytes and {limit // JSON_BYTES_PER_CONTAINER} arrays "
            f"and objects, found {len(data)} and {_num_containers(data)}. Store large data as a tensor."
        )
    return data


def seal_json(obj: dict[str, Any]) -> bytes:
    """The content of a sealed file; `obj` must not be empty and must not have a key `sha256`."""
    assert obj, "an empty object cannot be sealed"
    assert "sha256" not in obj, "the seal is written by seal_json"
    body = dump_json(obj)[:-1]
    return body + _SEAL_HEAD + hashlib.sha256(body).hexdigest().encode() + _SEAL_TAIL


def open_sealed_json(data: bytes | bytearray | memoryview, *, key: str, limit: int) -> dict[str, Any]:
    """The object in a sealed file, without its seal; any flipped, missing or additional byte is refused."""
    data = bytes(data)
    if len(data) > limit:
        raise corrupt(key, "size", f"at most {limit} bytes", f"{len(data)} bytes")
    body, seal = data[:-_SEAL_BYTES], data[-_SEAL_BYTES:]
    if len(data) <= _SEAL_BYTES or not (seal.startswith(_SEAL_HEAD) and seal.endswith(_SEAL_TAIL)):
        raise corrupt(
            key,
            "sha256",
            "the file to end in its seal",
            f"{shown(data[-40:])} at the end of {len(data)} bytes",
        )
    stated = seal[len(_SEAL_HEAD) : -len(_SEAL_TAIL)]
    actual = hashlib.sha256(body).hexdigest().encode()
    if stated != actual:
        raise corrupt(key, "sha256", shown(stated), actual.decode())
    found = load_json(data, key=key, limit=limit)
    if not isinstance(found, dict):
        raise corrupt(key, "JSON", "an object", shown(found))
    found.pop("sha256", None)
    return found
