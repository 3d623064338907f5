"""The version of the program that trains. Without torch."""

from __future__ import annotations

import functools
import hashlib
import logging
import subprocess
import sys
from pathlib import Path

log = logging.getLogger(__name__)

GIT_S_MAX = 10.0


@functools.cache
def code_facts() -> dict[str, str]:
    """The program that trains: its file, a digest of it, and the commit and uncommitted changes of its git work tree.

    Asked once for a process. What cannot be found out is left out: no git, no work tree, an interactive session.
    """
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    place = Path(main).resolve() if main else None
    return {} if place is None or not place.is_file() else describe_code(place)


def describe_code(place: Path) -> dict[str, str]:
    """The same of a script, or of a directory, which has no digest of a script."""
    found: dict[str, str] = {}
    if place.is_file():
        found = {"script": place.name, "script_digest": hashlib.blake2b(place.read_bytes(), digest_size=16).hexdigest()}
    directory = place.parent if place.is_file() else place
    commit = _git(directory, "rev-parse", "HEAD")
    if commit is not None:
        found["commit"] = commit.decode().strip()
        changes = _git(directory, "diff", "HEAD")
        if changes:
            found["changes"] = hashlib.blake2b(changes, digest_size=16).hexdigest()
    return found


def _git(directory: Path, *arguments: str) -> bytes | None:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(directory), *arguments],
            capture_output=True,
            timeout=GIT_S_MAX,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.debug("code version not found out: %s", error)
        return None
    return done.stdout if done.returncode == 0 else None
