"""Compares the facts of a loaded checkpoint with the live run. Touches nothing and talks to nobody."""

from __future__ import annotations

from dckpt.findings import Finding
from dckpt.format.accumulation import GRADIENTS
from dckpt.resume.facts import global_batch
from dckpt.resume.report import LoadResult, ResumeReport
from dckpt.state.train_state import TrainState


def validate(state: TrainState, loaded: LoadResult, world_size: int) -> ResumeReport:
    """The report on continuing `state` from `loaded`; every rank computes the same one."""
    found = [
        *_check_damage(loaded),
        *_check_world_size(loaded, world_size),
        *_check_rank_tensors(loaded, world_size),
        *_check_parts(loaded),
        *_check_accumulation(loaded),
        *_check_work_remains(state),
        *_check_global_batch(state, loaded),
    ]
    return ResumeReport(loaded, world_size, tuple(found))


def _check_damage(loaded: LoadResult) -> list[Finding]:
    return [
        Finding(
            check="walked_back",
            severity="warning",
            expected="the newest checkpoint is whole",
            found=f"{name} is damaged",
            remedy=f"run `dckpt verify` on {name} to see the damage",
            message=f"{name} is damaged; walked back past it. The steps since {loaded.checkpoint} are trained again.",
        )
        for name in loaded.damaged
    ]


def _check_world_size(loaded: LoadResult, world_size: int) -> list[Finding]:
    saved = loaded.manifest.world_size
    if saved == world_size:
        return []
    derived = sorted(stream for stream, how in loaded.rng.items() if how == "re-derived")
    told = f"; random streams re-derived on every rank: {', '.join(derived)}" if derived else ""
    return [
        Finding(
            check="world_size",
            severity="info",
            expected=str(saved),
            found=str(world_size),
            remedy="none needed: tensors are resharded, random streams follow the rule in FORMAT.md",
            message=f"saved on {saved} ranks, continued on {world_size}{told}.",
        )
    ]


def _check_rank_tensors(loaded: LoadResult, world_size: int) -> list[Finding]:
    # A checkpoint that was resharded for these ranks holds rank 0's value already, and says of what.
    origin = loaded.manifest.lineage
    names, saved_by = loaded.carried_from_rank_0, loaded.manifest.world_size
    if not names and origin is not None:
        names, saved_by = origin.carried, origin.world_size
    if not names:
        return []
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return [
        Finding(
            check="rank_tensors",
            severity="warning",
            expected="the same value on every rank, or the same number of ranks",
            found=f"{len(names)} tensors differed between {saved_by} ranks",
            remedy="use SyncBatchNorm, or continue on the same number of ranks",
            message=f"{shown}: differed between ranks when saved; all {world_size} ranks continue with rank 0's value.",
        )
    ]


def _check_parts(loaded: LoadResult) -> list[Finding]:
    return [
        Finding(
            check="parts",
            severity="warning",
            expected=f"part {part} in the TrainState",
            found="not given",
            remedy=f"pass {part}= to TrainState if training needs it",
            message=f"the checkpoint holds part {part}, which this TrainState does not have; it was skipped.",
        )
        for part in loaded.skipped_parts
        if not (loaded.begins_leg and part == "data")
        if part != GRADIENTS
    ]


def _check_accumulation(loaded: LoadResult) -> list[Finding]:
    lost = loaded.micro_step
    if not lost or loaded.continued_micro_step:
        return []
    is_stored = GRADIENTS in loaded.manifest.parts
    batches = f"{lost} micro-batch" + ("es" if lost > 1 else "")
    return [
        Finding(
            check="accumulation",
            severity="warning",
            expected=f"the gradients of {batches}",
            found="dropped by this resume" if is_stored else "not in the checkpoint",
            remedy="none needed if the data's position counts optimizer steps: they are computed again",
            message=f"the gradients of {batches} of step {loaded.step} were "
            f"{'dropped' if is_stored else 'not stored'}: that step begins again. If the data's position counts optimizer steps "
            "they are computed again, with other random numbers; else their samples are lost.",
        )
    ]


def _check_work_remains(state: TrainState) -> list[Finding]:
    progress = state.progress
    if progress is None or not progress.done:
        return []
    return [
        Finding(
            check="work_remains",
            severity="critical",
            expected=f"a step below max_steps={progress.max_steps}",
            found=f"step {progress.step}",
            remedy="raise max_steps, or start a new run",
            message=f"step {progress.step} of {progress.max_steps} is already done: no work remains, the first step() returns "
            "Stop. Raise max_steps, or start a new run.",
        )
    ]


def _check_global_batch(state: TrainState, loaded: LoadResult) -> list[Finding]:
    old = global_batch(loaded.manifest.facts)
    progress = state.progress
    if old is None or progress is None or progress.batch is None:
        return []
    new = progress.batch.samples
    if old == new:
        return []
    return [
        Finding(
            check="global_batch",
            severity="critical",
            expected=f"{old} samples a step",
            found=f"{new}",
            remedy="set micro x accumulation x data_parallel to the saved product",
            message=f"the global batch was {old} samples and is now {new}: learning-rate schedule and step counts no longer "
            "mean the same. Set micro x accumulation x data_parallel to the saved product.",
        )
    ]
