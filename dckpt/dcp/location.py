"""Where a stand-alone checkpoint lies: the storage root above it and its name in it."""

from __future__ import annotations

import os

from dckpt.errors import ConfigError
from dckpt.storage.opening import SCHEMES, split_url


def is_storage_url(url: str) -> bool:
    """Whether this version stores there: a path, or a URL with a scheme that `open_storage` takes."""
    scheme, separator, _ = url.partition("://")
    return not separator or scheme.lower() in SCHEMES


def split_checkpoint_url(url: str) -> tuple[str, str]:
    """(root, name) of the checkpoint directory `url`; the root is where attempts are staged and renamed from."""
    root, name = split_url(url if "://" in url else os.path.abspath(url.rstrip("/")))
    if not name or name.startswith(".") or not root:
        raise ConfigError(
            f"Checkpoint {url!r}: expected the path of a directory whose name does not start with a dot, such as "
            "runs/gpt/step-100."
        )
    return root, name
