"""The data: the same files, the same split, the same order, a position inside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dckpt.findings import Finding, Severity
from dckpt.resume.checks.base import Check, Evidence, each_rank, finding, get, not_checked

_USER: dict[str, tuple[Severity, str, str]] = {
    "dataset": (
        "critical",
        "the training data",
        "train on the same files, or call checkpointer.start_leg(state) for new data",
    ),
    "split": (
        "critical",
        "the split into training and validation",
        "make the split with dckpt.split_indices and the saved seed",
    ),
    "tokenizer": (
        "critical",
        "the tokenizer",
        "use the saved tokenizer: other token numbers mean other words to the model",
    ),
    "vocab_size": (
        "critical",
        "the vocabulary size",
        "use the saved vocabulary, or extend it on purpose and allow vocab_size",
    ),
    "seed": ("warning", "the seed", "use the saved seed: what is derived from it would not match what was trained"),
}


def check_user_facts(name: str) -> Any:
    """The check of one of the well-known facts that only the user can know."""
    severity, what, remedy = _USER[name]

    def check(evidence: Evidence) -> Iterator[Finding]:
        old, new = _known(evidence.saved, name), _known(evidence.current, name)
        if old is None or new is None:
            if old is None and new is None:
                yield not_checked(name, f"nothing is known of {what}", f'pass facts={{"{name}": ...}} to TrainState')
            else:
                side = "the checkpoint does not say" if old is None else "this run does not say"
                yield not_checked(name, f"{side} {what}", f'pass facts={{"{name}": ...}} to TrainState')
        elif old != new:
            yield finding(
                name,
                severity,
                f"{what} differs from what was saved",
                expected=old,
                found=new,
                remedy=remedy,
            )

    return check


def _known(facts: Any, name: str) -> Any:
    found = get(facts, f"user.{name}")
    if found is None and name == "dataset":
        prints = {key: item.get("dataset") for key, item in (get(facts, "data") or {}).items() if item.get("dataset")}
        return prints or None
    return found


def check_data_order(evidence: Evidence) -> Iterator[Finding]:
    """Seed, size, shuffling and the version of the order are what they were, and the position lies inside the epoch."""
    saved = get(evidence.saved, "data") or {}
    # After a load the live sampler has the saved state; what the program asked for is what it had before.
    current = get(evidence.built if evidence.built is not None else evidence.current, "data") or {}
    if not saved or not current:
        yield not_checked(
            "data_order", "no sampler told its order", "pass data=dckpt.ElasticDistributedSampler(...) to TrainState"
        )
        return
    for key in sorted(set(saved) & set(current)):
        yield from _compare_order(key, saved[key], current[key])
    yield from _positions(evidence)
    for key, item in saved.items():
        cursor, size = item.get("cursor"), item.get("n_eff", item.get("size"))
        if isinstance(cursor, int) and isinstance(size, int) and not 0 <= cursor <= size:
            yield finding(
                "data_order",
                "critical",
                f"the position in the data{_label(key)} lies behind its end",
                expected=f"0 to {size}",
                found=cursor,
                remedy="resume from an older checkpoint, or start the epoch again with start_leg",
            )


def _positions(evidence: Evidence) -> Iterator[Finding]:
    """The live samplers stand where they stood when they were saved, on every rank."""
    saved, live = get(evidence.saved, "data") or {}, get(evidence.current, "data") or {}
    for rank, positions in each_rank(evidence, "positions"):
        for key in sorted(set(saved) & set(positions)):
            old, (epoch, cursor) = saved[key], positions[key]
            before = old.get("epoch"), old.get("cursor")
            if None in before or before == (epoch, cursor):
                continue
            if (epoch, cursor) == (before[0] + 1, 0) and before[1] >= _last_start(old, live.get(key) or {}):
                continue  # what is left of the epoch makes no step of this batch
            yield finding(
                "data_order",
                "critical",
                f"the position in the data{_label(key)} on rank {rank} is epoch {epoch}, sample {cursor}, and epoch {before[0]}, "
                f"sample {before[1]} was saved: samples would be repeated or left out",
                expected=f"epoch {before[0]}, sample {before[1]}",
                found=f"epoch {epoch}, sample {cursor}",
                remedy="nothing may move the sampler between the load and the first step; progress.advance() does it later",
            )
            return


def _last_start(old: Mapping[str, Any], new: Mapping[str, Any]) -> int:
    """From which position on no whole step of the new batch is left in the epoch."""
    size = int(old.get("size", 0))
    return size - int(new.get("global_batch", 1)) + 1 if new.get("tail") == "drop" else size


def _label(key: str) -> str:
    return f" {key!r}" if key else ""


def _compare_order(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Finding]:
    for name in ("order_version", "seed", "shuffle", "size", "tail"):
        if name in old and name in new and old[name] != new[name]:
            yield finding(
                "data_order",
                "critical",
                f"the order of the data{_label(key)} is another one: {name} was {old[name]} and is now {new[name]}, so samples "
                "would be repeated and others left out",
                expected=f"{name}={old[name]}",
                found=f"{name}={new[name]}",
                remedy="build the sampler as it was saved, or call checkpointer.start_leg(state) for other data",
            )


CHECKS = (
    *(
        Check(name, title, "before", check_user_facts(name))
        for name, title in (
            ("dataset", "Fingerprint of the training data"),
            ("split", "Split into training and validation"),
            ("tokenizer", "Tokenizer"),
            ("vocab_size", "Size of the vocabulary"),
            ("seed", "Seed of the program"),
        )
    ),
    Check("data_order", "Order of the samples, and the position in it", "before", check_data_order),
)
