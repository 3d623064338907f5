"""From a URL to the storage behind it."""

from __future__ import annotations

import os
import re
from urllib.parse import parse_qsl, unquote, urlsplit

from dckpt.errors import ConfigError
from dckpt.storage.base import Storage
from dckpt.storage.local import LocalStorage
from dckpt.storage.memory import memory_client
from dckpt.storage.object_store import ObjectStorage, parse_place
from dckpt.storage.s3_client import s3_client

SCHEMES = frozenset(("file", "memory", "s3"))
"""Schemes of URLs that `open_storage` takes."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def open_storage(url: str | os.PathLike[str], *, processes: int = 1) -> Storage:
    """The storage at `url`: a path, file:///absolute/path, s3://bucket/path or memory://name.

    Touches nothing; the root may be missing.
    s3:// takes `?endpoint=http://host:port&region=...&profile=...&addressing=path`; what is not given comes from the environment,
    the profile and the machine's role, as for every AWS tool.

    `processes` is how many have to see the same content: `ConfigError` where they would not.
    """
    text = os.fspath(url)
    if not text or "\0" in text:
        raise ConfigError(
            f"Storage URL {text!r}: expected a path or file:///path, found nothing usable. Name a directory."
        )
    scheme = _SCHEME.match(text)
    if scheme is None:
        return LocalStorage(text)
    if scheme[1].lower() == "memory":
        return _open_memory(text, processes)
    if scheme[1].lower() == "s3":
        return _open_s3(text)
    if scheme[1].lower() != "file":
        raise ConfigError(
            f"Storage URL {text!r}: expected a path, file:///path, s3://bucket/path or memory://name, found scheme "
            f"{scheme[1]!r}. This version of dckpt stores on file systems and S3; mount the store, or give a path."
        )
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/") or parts.query or parts.fragment:
        raise ConfigError(
            f"Storage URL {text!r}: expected file:///absolute/path (three slashes, '?' and '#' written as "
            f"%3F and %23), found host {parts.netloc!r} and path {parts.path!r}."
        )
    return LocalStorage(unquote(parts.path))


def split_url(url: str) -> tuple[str, str]:
    """(URL of the directory above, name) of a path or URL; options of a store stay with the first. No name: '' there."""
    place, mark, options = url.partition("?") if "://" in url else (url, "", "")
    parent, _, name = place.rstrip("/").rpartition("/")
    return (parent + mark + options, name) if not parent.endswith(":/") else (url, "")


def _open_memory(text: str, processes: int) -> Storage:
    if processes > 1:
        raise ConfigError(
            f"Storage URL {text!r}: expected a storage that all {processes} processes share, found the memory of each process. "
            "memory:// is for a single process; name a directory."
        )
    name, root = parse_place(text, text.partition("://")[2])
    return ObjectStorage(memory_client(name), root, url=f"memory://{name}/{root}".rstrip("/"))


def _open_s3(text: str) -> Storage:
    place, _, query = text.partition("://")[2].partition("?")
    bucket, root = parse_place(f"s3://{place}", place)
    options = dict(parse_qsl(query, keep_blank_values=True))
    return ObjectStorage(s3_client(bucket, options), root, url=f"s3://{bucket}/{root}".rstrip("/"), options=options)
