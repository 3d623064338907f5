"""Where a stand-alone checkpoint lies: the storage root above it and its name in it."""

from __future__ import annotations

import os

from dckpt.errors import ConfigError


def is_local_url(url: str) -> bool:
    """Whether this version stores there: a path or a `file://` URL."""
    return "://" not in url or url.startswith("file://")


def split_checkpoint_url(url: str) -> tuple[str, str]:
    """(root, name) of the checkpoint directory `url`; the root is where attempts are staged and renamed from."""
    place = url.rstrip("/")
    if "://" not in place:
        place = os.path.abspath(place)
    root, _, name = place.rpartition("/")
    if not name or name.startswith(".") or not root:
        raise ConfigError(
            f"Checkpoint {url!r}: expected the path of a directory whose name does not start with a dot, such as "
            "runs/gpt/step-100."
        )
    return root, name
