"""Where the checkpoint comes from, whether it is whole, and whether the next one can be written."""

from __future__ import annotations

from collections.abc import Iterator

from dckpt.findings import Finding
from dckpt.resume.checks.base import Check, Evidence, each_rank, finding, get, not_checked, ranks_text, some

SPACE_FACTOR = 2


def check_walked_back(evidence: Evidence) -> Iterator[Finding]:
    """The newest checkpoint was good."""
    for name in get(evidence.load, "damaged") or ():
        yield finding(
            "walked_back",
            "warning",
            f"{name} is damaged; walked back past it, and the steps since {evidence.checkpoint.get('name')} are trained again",
            expected="the newest checkpoint is whole",
            found=f"{name} is damaged",
            remedy=f"run `dckpt verify` on {name} to see the damage, `dckpt repair` to restore what another checkpoint holds",
        )


def check_files(evidence: Evidence) -> Iterator[Finding]:
    """Every file that the manifest names is there and has its size."""
    faults = evidence.checkpoint.get("file_faults")
    if not faults:
        return  # a load has read them all
    yield finding(
        "files",
        "critical",
        f"files of {evidence.checkpoint.get('name')} are missing or have another size: {some(faults)}",
        expected="every file with its size",
        found=list(faults),
        remedy="run `dckpt verify` and `dckpt repair` on it; resume would walk back to an older step, or allow files",
    )


def check_same_checkpoint(evidence: Evidence) -> Iterator[Finding]:
    """All ranks loaded the same checkpoint, and stand at the same step."""
    for what, path in (("checkpoint", "checkpoint"), ("step", "step")):
        values: dict[object, list[int]] = {}
        for rank, value in each_rank(evidence, path):
            values.setdefault(value, []).append(rank)
        if len(values) > 1:
            odd = sorted(rank for ranks in sorted(values.values(), key=len)[:-1] for rank in ranks)
            yield finding(
                "same_checkpoint",
                "critical",
                f"ranks disagree about the {what}: {ranks_text(odd)} have another one than the rest",
                expected=f"one {what}",
                found=f"{len(values)} of them",
                remedy="give every rank the same root, and change the counters on none of them alone",
            )
    saved = get(evidence.saved, "progress.step")
    live = [step for _, step in each_rank(evidence, "step")]
    if saved is not None and live and live[0] != saved:
        yield finding(
            "same_checkpoint",
            "critical",
            f"the run stands at step {live[0]} after loading step {saved}",
            expected=saved,
            found=live[0],
            remedy="change no counter between the load and the validation",
        )


def check_parts(evidence: Evidence) -> Iterator[Finding]:
    """Everything that was saved was loaded."""
    for part in get(evidence.load, "skipped_parts") or ():
        yield finding(
            "parts",
            "warning",
            f"the checkpoint holds part {part}, which this TrainState does not have; it was skipped",
            expected=f"part {part} in the TrainState",
            found="not given",
            remedy=f"pass {part}= to TrainState if training needs it",
        )


def check_rank_tensors(evidence: Evidence) -> Iterator[Finding]:
    """Tensors that differed between ranks could be kept so."""
    names, saved_by = get(evidence.load, "carried") or [], evidence.checkpoint.get("world_size")
    origin = evidence.checkpoint.get("origin")
    if not names and origin:
        # A checkpoint that was resharded for these ranks holds rank 0's value already, and says of what.
        names, saved_by = origin.get("carried") or [], origin.get("world_size")
    if names:
        yield finding(
            "rank_tensors",
            "warning",
            f"{some(list(names))}: differed between ranks when saved; all {get(evidence.current, 'world.size')} "
            "ranks continue with rank 0's value",
            expected="the same value on every rank, or the same number of ranks",
            found=f"{len(names)} tensors differed between {saved_by} ranks",
            remedy="use SyncBatchNorm, or continue on the same number of ranks",
        )


def check_lineage(evidence: Evidence) -> Iterator[Finding]:
    """The chain of generations is unbroken, and no other job continued the same step."""
    lineage = evidence.checkpoint.get("lineage")
    if lineage is None:
        yield not_checked("lineage", "the history of the run was not read", "nothing to do")
        return
    for note in lineage.get("notes") or ():
        yield finding(
            "lineage",
            "warning",
            str(note),
            expected="an unbroken chain of generations",
            found="a gap",
            remedy="`dckpt ls` shows the history",
        )
    for name in lineage.get("siblings") or ():
        yield finding(
            "lineage",
            "warning",
            f"{name} has the same step and is not on the line that is continued: the run was continued twice from there",
            expected="one continuation",
            found=name,
            remedy="make sure that no other job trains in this run; `dckpt prune --superseded` removes abandoned ones",
        )


def check_next_save(evidence: Evidence) -> Iterator[Finding]:
    """There is room to write what comes."""
    space = evidence.checkpoint.get("space")
    if space is None or space.get("free") is None:
        yield not_checked("next_save", "the storage does not say how much room is left", "watch it yourself")
        return
    if space.get("read_only"):
        yield finding(
            "next_save",
            "warning",
            f"the run cannot be written: {space['read_only']}",
            expected="a writable run",
            found="read-only",
            remedy="mount it writable before training, or every save fails",
        )
    needed = SPACE_FACTOR * int(space["checkpoint_bytes"])
    if int(space["free"]) < needed:
        yield finding(
            "next_save",
            "warning",
            f"{int(space['free']):,} bytes are free, and a checkpoint of this run has {int(space['checkpoint_bytes']):,}",
            expected=f"at least {needed:,} bytes",
            found=f"{int(space['free']):,} bytes",
            remedy="free space, or keep fewer checkpoints (`dckpt prune`)",
        )


CHECKS = (
    Check("walked_back", "The newest checkpoint is good", "after", check_walked_back),
    Check("same_checkpoint", "One checkpoint and one step on all ranks", "after", check_same_checkpoint),
    Check("parts", "All parts were loaded", "after", check_parts),
    Check("rank_tensors", "Tensors that differ by rank", "after", check_rank_tensors),
    Check("files", "Files of the checkpoint", "before", check_files),
    Check("lineage", "History of the run", "before", check_lineage),
    Check("next_save", "Room for the next save", "before", check_next_save),
)
