"""One sentence for every file that is refused: which file, which field, expected, found."""

from __future__ import annotations

from dckpt.errors import CorruptCheckpointError

_SHOWN_CHARS_MAX = 120


def shown(value: object) -> str:
    """`value` for a message, cut short: a hostile file must not fill the log."""
    if isinstance(value, (str, bytes)):
        value = value[: _SHOWN_CHARS_MAX + 1]
    elif isinstance(value, (list, dict, tuple)):
        return f"{type(value).__name__} of {len(value)} items"
    elif isinstance(value, int) and abs(value) >= 2**128:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS_MAX else text[:_SHOWN_CHARS_MAX] + "..."


def corrupt(key: str, field: str, expected: object, found: object) -> CorruptCheckpointError:
    """The error for `field` of the file `key`. `expected` and `found`: strings go in as they are."""
    expected_text = expected if isinstance(expected, str) else shown(expected)
    found_text = found if isinstance(found, str) else shown(found)
    message = (
        f"File {key}, {field}: expected {expected_text}, found {found_text}. "
        "The file is damaged or not of dckpt: use an older step, or see `dckpt verify`."
    )
    return CorruptCheckpointError(message, key=key, field=field, expected=expected_text, found=found_text)
