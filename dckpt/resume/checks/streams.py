"""Random streams: all there, and equal or distinct over the ranks as they were."""

from __future__ import annotations

from collections.abc import Iterator

from dckpt.findings import Finding
from dckpt.resume.checks.base import Check, Evidence, each_rank, finding, get, not_checked, ranks_text

ALWAYS = ("python", "numpy", "torch")


def check_rng_complete(evidence: Evidence) -> Iterator[Finding]:
    """The checkpoint holds the streams that this run uses."""
    saved = evidence.checkpoint.get("rng")
    if "rng" not in (evidence.checkpoint.get("parts") or ()) or not saved:
        yield finding(
            "rng_complete",
            "critical",
            "the checkpoint holds no random streams: dropout and shuffling would repeat the numbers of step 0",
            expected=list(ALWAYS),
            found="none",
            remedy="`dckpt repair` derives streams by the documented rule, or allow rng_complete",
        )
        return
    missing = [stream for stream in ALWAYS if stream not in saved]
    fresh = sorted(name for name, how in (get(evidence.load, "rng") or {}).items() if how.startswith("not saved"))
    gone = sorted(
        name for name, how in (get(evidence.load, "rng") or {}).items() if how.startswith("saved, not present")
    )
    if missing:
        yield finding(
            "rng_complete",
            "critical",
            f"the checkpoint lacks the random streams {', '.join(missing)}",
            expected=list(ALWAYS),
            found=sorted(saved),
            remedy="`dckpt repair` derives them by the documented rule, or allow rng_complete",
        )
    fresh = [name for name in fresh if name not in missing]
    if fresh:
        yield finding(
            "rng_complete",
            "warning",
            f"random streams of this run were not saved and start as they were seeded: {', '.join(fresh)}",
            expected="a saved state",
            found="none",
            remedy="go on if they are new in this run",
        )
    if gone:
        yield finding(
            "rng_complete",
            "warning",
            f"saved random streams have no place in this run: {', '.join(gone)}",
            expected="the generators and devices that were saved",
            found="none of that name",
            remedy="pass the generators to TrainState(generators={...}), or go on if they are not used any more",
        )


def check_rng_pattern(evidence: Evidence) -> Iterator[Finding]:
    """Streams are where the load left them; those that differed between ranks differ, those that were equal are equal."""
    saved = evidence.checkpoint.get("rng") or {}
    moved = _moved(evidence)
    yield from _moved_findings(moved)
    per_rank = each_rank(evidence, "rng")
    if len(per_rank) < 2 or evidence.load is None:
        return
    told = get(evidence.load, "rng") or {}
    if not any(how in ("exact", "copied", "re-derived") for how in told.values()):
        yield not_checked("rng_pattern", "no random stream was restored", "nothing to do")
        return
    for stream, axes in saved.items():
        states: dict[str, list[int]] = {}
        for rank, digests in per_rank:
            if stream in digests:
                states.setdefault(digests[stream], []).append(rank)
        if told.get(stream) not in ("exact", "copied", "re-derived"):
            continue
        was_shared_by_one = int(evidence.checkpoint.get("world_size") or 1) == 1
        if not axes and len(states) > 1 and not was_shared_by_one:
            odd = sorted(rank for ranks in sorted(states.values(), key=len)[:-1] for rank in ranks)
            yield finding(
                "rng_pattern",
                "critical",
                f"random stream {stream} was equal on all ranks and now differs on {ranks_text(odd)}",
                expected="one state",
                found=f"{len(states)} states",
                remedy="seed and draw alike on all ranks; something drew numbers between the load and the validation",
            )
        shared = [ranks for ranks in states.values() if len(ranks) > 1]
        if told[stream] == "exact" and stream not in moved:
            shared = []  # some of the ranks shared it when it was saved
        if axes and shared and _must_differ(evidence, axes, shared[0]):
            yield finding(
                "rng_pattern",
                "critical",
                f"random stream {stream} differed between ranks and is now the same on {ranks_text(shared[0])}: they would "
                "draw the same dropout masks and augmentations",
                expected="a state of its own on each rank",
                found=f"{len(states)} states on {len(per_rank)} ranks",
                remedy="do not call torch.manual_seed with one seed after resume()",
            )


def _moved(evidence: Evidence) -> dict[str, list[int]]:
    """Stream -> the ranks on which it is not where the load left it."""
    moved: dict[str, list[int]] = {}
    for rank, streams in each_rank(evidence, "moved_streams"):
        for stream in streams:
            moved.setdefault(stream, []).append(rank)
    return moved


def _moved_findings(moved: dict[str, list[int]]) -> Iterator[Finding]:
    for stream, ranks in moved.items():
        yield finding(
            "rng_pattern",
            "critical",
            f"random stream {stream} on {ranks_text(ranks)} is not where the load left it: something seeded it or drew from it",
            expected="the restored state",
            found="another state",
            remedy="seed before resume(), and make iterators of data after it, inside state.epoch_start_rng()",
        )


def _must_differ(evidence: Evidence, axes: list[str], ranks: list[int]) -> bool:
    """Whether these ranks stand at different places along the axes over which the stream varied."""
    places = [get(evidence.ranks[rank], "coordinates") for rank in ranks]
    if any(place is None or any(axis not in place for axis in axes) for place in places):
        return True
    return len({tuple(place[axis] for axis in axes) for place in places}) > 1


CHECKS = (
    Check("rng_complete", "Random streams that are needed", "before", check_rng_complete),
    Check("rng_pattern", "Random streams as restored, and over the ranks", "after", check_rng_pattern),
)
