"""From a URL to the storage behind it."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote, urlsplit

from dckpt.errors import ConfigError
from dckpt.storage.base import Storage
from dckpt.storage.local import LocalStorage

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def open_storage(url: str | os.PathLike[str]) -> Storage:
    """The storage at `url`: a path, or file:///absolute/path. Touches nothing; the root may be missing."""
    text = os.fspath(url)
    if not text or "\0" in text:
        raise ConfigError(
            f"Storage URL {text!r}: expected a path or file:///path, found nothing usable. Name a directory."
        )
    scheme = _SCHEME.match(text)
    if scheme is None:
        return LocalStorage(text)
    if scheme[1].lower() != "file":
        raise ConfigError(
            f"Storage URL {text!r}: expected a path or file:///path, found scheme {scheme[1]!r}. This "
            "version of dckpt stores checkpoints on file systems; mount the store, or give a path."
        )
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/") or parts.query or parts.fragment:
        raise ConfigError(
            f"Storage URL {text!r}: expected file:///absolute/path (three slashes, '?' and '#' written as "
            f"%3F and %23), found host {parts.netloc!r} and path {parts.path!r}."
        )
    return LocalStorage(unquote(parts.path))
