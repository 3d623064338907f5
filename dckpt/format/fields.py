"""Strict reading of one JSON object: each field typed, ranged, known; a refusal names file and field."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from dckpt.errors import FormatVersionError
from dckpt.format.layout import is_hex32, is_hex64, is_safe_component, is_tensor_name
from dckpt.format.refusal import corrupt, shown


def ensure_version(found: dict[str, Any], *, key: str, kind: str, major: int) -> tuple[int, int]:
    """(major, minor) of a sealed file of this kind; a newer major is refused as such, not as damage."""
    if found.get("dckpt") != kind:
        raise corrupt(key, "dckpt", repr(kind), shown(found.get("dckpt")))
    version = found.get("version")
    if not isinstance(version, list) or len(version) != 2 or not all(type(part) is int for part in version):
        raise corrupt(key, "version", "two integers", shown(version))
    if version[0] > major:
        raise FormatVersionError(
            f"File {key}: expected version {major} or older, found {version[0]}.{version[1]}. Upgrade dckpt to read it."
        )
    if version[0] < 1 or version[1] < 0:
        raise corrupt(key, "version", "1.0 or newer", f"{version[0]}.{version[1]}")
    return version[0], version[1]


class Fields:
    """The fields of one JSON object. `path` is the place of the object in the file `key`, for messages."""

    __slots__ = ("_found", "_key", "_path")

    def __init__(self, found: Any, *, key: str, path: str = "") -> None:
        if not isinstance(found, dict):
            raise corrupt(key, path or "JSON", "an object", shown(found))
        self._found: dict[str, Any] = found
        self._key = key
        self._path = f"{path}." if path else ""

    def refuse(self, name: str, expected: str, found: object) -> Exception:
        """The error for the field `name`; the caller raises it."""
        return corrupt(self._key, self._path + name, expected, found if isinstance(found, str) else shown(found))

    def ensure_known(self, known: Collection[str], *, is_newer: bool) -> None:
        """Refuses unknown fields, unless the file's minor version is newer and may have added them."""
        if is_newer:
            return
        for name in self._found:
            if name not in known:
                raise corrupt(self._key, self._path + shown(name).strip("'"), "a known field", "an unknown one")

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def names_of_fields(self) -> list[str]:
        """The names of all fields, in the order of the file."""
        return list(self._found)

    def value(self, name: str) -> Any:
        """The field as it stands."""
        try:
            return self._found[name]
        except KeyError:
            raise self.refuse(name, "a value", "nothing") from None

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.value(name) is not None

    def integer(self, name: str, low: int, high: int) -> int:
        """An integer from `low` to `high`."""
        found = self.value(name)
        if type(found) is not int or not low <= found <= high:
            raise self.refuse(name, f"an integer from {low} to {high}", shown(found))
        return found

    def seconds(self, name: str) -> float:
        """A finite number that is not negative."""
        found = self.value(name)
        if type(found) not in (int, float) or not (found >= 0 and math.isfinite(found)):
            raise self.refuse(name, "a number of seconds", shown(found))
        return float(found)

    def text(self, name: str) -> str:
        """Any string."""
        found = self.value(name)
        if not isinstance(found, str):
            raise self.refuse(name, "a string", shown(found))
        return found

    def component(self, name: str) -> str:
        """A string that is safe as one component of a path."""
        found = self.text(name)
        if not is_safe_component(found):
            raise self.refuse(name, "1 to 128 of [A-Za-z0-9._-]", shown(found))
        return found

    def hex32(self, name: str) -> str:
        """32 hexadecimal digits."""
        found = self.text(name)
        if not is_hex32(found):
            raise self.refuse(name, "32 digits of 0-9a-f", shown(found))
        return found

    def hex64(self, name: str) -> str:
        """64 hexadecimal digits."""
        found = self.text(name)
        if not is_hex64(found):
            raise self.refuse(name, "64 digits of 0-9a-f", shown(found))
        return found

    def choice(self, name: str, choices: Collection[str]) -> str:
        """One of `choices`."""
        found = self.text(name)
        if found not in choices:
            raise self.refuse(name, "one of " + ", ".join(choices), shown(found))
        return found

    def items(self, name: str, *, limit: int) -> list[Any]:
        """An array of at most `limit` items."""
        found = self.value(name)
        if not isinstance(found, list):
            raise self.refuse(name, "an array", shown(found))
        if len(found) > limit:
            raise self.refuse(name, f"at most {limit} items", str(len(found)))
        return found

    def names(self, name: str, *, limit: int) -> tuple[str, ...]:
        """Distinct names."""
        found = self.items(name, limit=limit)
        for position, item in enumerate(found):
            if not isinstance(item, str) or not is_tensor_name(item):
                raise self.refuse(f"{name}[{position}]", "a name", shown(item))
        if len(set(found)) != len(found):
            raise self.refuse(name, "distinct names", "a repeated one")
        return tuple(found)

    def mapping(self, name: str) -> dict[str, Any]:
        """An object whose keys are names."""
        found = self.value(name)
        if not isinstance(found, dict):
            raise self.refuse(name, "an object", shown(found))
        for item in found:
            if not is_tensor_name(item):
                raise self.refuse(name, "names as keys", shown(item))
        return found

    def texts(self, name: str) -> dict[str, str]:
        """An object whose keys are names and whose values are strings."""
        found = self.mapping(name)
        for item, text in found.items():
            if not isinstance(text, str):
                raise self.refuse(f"{name}.{item}", "a string", shown(text))
        return dict(found)
