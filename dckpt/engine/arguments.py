"""What `Checkpointer` is given, checked: each error says what was expected, and what to write instead."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping

from dckpt.errors import ConfigError
from dckpt.format.layout import MANIFEST_NAME, parse_checkpoint_name

log = logging.getLogger(__name__)

EXAMPLES = {"save": "dckpt.Every(steps=500)", "retention": "dckpt.Retention(last=3)"}


def place_of_run(root: str | os.PathLike[str]) -> str:
    """The run's place. A checkpoint inside a run is not one: saving there would grow a run within a committed step."""
    if not isinstance(root, str | os.PathLike):
        raise ConfigError(f"Checkpointer(root): expected a path or URL, found {type(root).__name__}.")
    place = os.path.expanduser(os.fspath(root))
    run, _, name = place.rstrip("/").rpartition("/")
    if parse_checkpoint_name(name) is not None:
        raise ConfigError(
            f"Checkpointer({place!r}): expected the directory of a run, found one of its checkpoints. To continue from it: "
            f"Checkpointer({run or '.'!r}) and checkpointer.load(state, step={name!r})."
        )
    if name == "generations" or os.path.exists(os.path.join(place, MANIFEST_NAME)):
        raise ConfigError(
            f"Checkpointer({place!r}): expected the directory of a run, found a part of one or a stand-alone checkpoint. "
            "Choose another root."
        )
    return place


def ensure_count(name: str, found: int) -> None:
    """At least 1."""
    if found < 1:
        raise ConfigError(f"Checkpointer({name}=): expected at least 1, found {found}.")


def ensure_kind(name: str, found: object, kind: type) -> None:
    """None, or one of our own objects: `EXAMPLES` shows it."""
    if found is not None and not isinstance(found, kind):
        raise ConfigError(
            f"Checkpointer({name}=): expected a dckpt.{kind.__name__}, such as {EXAMPLES[name]}, found {found!r:.100}."
        )


def ensure_choice(name: str, found: str, choices: tuple[str, ...], *, of: str = "Checkpointer") -> None:
    """One of a few words."""
    if found not in choices:
        raise ConfigError(f"{of}({name}=): expected one of {', '.join(choices)}, found {found!r}.")


def announce_new_run(place: str, observed_generation: int) -> None:
    """Logs that nothing is resumed, and what may be the reason: an earlier start that died, or a mistyped root."""
    log.warning("no checkpoint in %s: starting a new run from step 0", place)
    if observed_generation:
        log.warning("an earlier start of this run (generation %d) ended before its first commit", observed_generation)
    for name in neighbouring_runs(place):
        log.warning("a run with checkpoints lies beside it: %s (is the root mistyped?)", name)


def neighbouring_runs(place: str) -> list[str]:
    """Up to three runs beside `place` with a similar name; only looked for when nothing was found."""
    parent = os.path.dirname(place.rstrip("/"))
    try:
        with os.scandir(parent) as entries:
            found = [entry.path for entry in entries if os.path.isdir(os.path.join(entry.path, "generations"))]
    except OSError as error:
        log.debug("cannot look beside %s: %s", place, error)
        return []
    names = {os.path.basename(path): path for path in found if path != place.rstrip("/")}
    own = os.path.basename(place.rstrip("/"))
    similar = difflib.get_close_matches(own, list(names), n=len(names) or 1, cutoff=0.6)
    return [names[name] for name in similar if _is_slip(own, name)][:3]


def _is_slip(own: str, other: str) -> bool:
    """One letter more, less, changed or swapped with its neighbour; in names of 6 letters or more, four of five the same."""
    if min(len(own), len(other)) >= 6 and difflib.SequenceMatcher(None, own, other).ratio() >= 0.8:
        return True
    changed = [
        part for part in difflib.SequenceMatcher(None, own, other, autojunk=False).get_opcodes() if part[0] != "equal"
    ]
    start, end = changed[0][1], changed[-1][2]
    start_of_other, end_of_other = changed[0][3], changed[-1][4]
    mine, theirs = own[start:end], other[start_of_other:end_of_other]
    return max(len(mine), len(theirs)) <= 1 or (len(mine) == 2 and mine == theirs[::-1])


def plain_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Read now: a tensor that is given here may change before the manifest is written."""
    try:
        return {str(name): float(value) for name, value in metrics.items()}
    except (TypeError, ValueError) as error:
        raise ConfigError(f"metrics: expected numbers by name, found {dict(metrics)!r:.200}: {error}") from error
