"""Facts as JSON takes them."""

from __future__ import annotations

import math
from typing import Any


def finite(value: Any) -> Any:
    """The same with floats that are no numbers as text ("nan", "inf"): JSON has none, and a fact must never cost a save."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
