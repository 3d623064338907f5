"""Batch, accumulation, work that remains, ranks, samples: what the settings of the new run must agree with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dckpt.findings import Finding, Severity
from dckpt.format.accumulation import GRADIENTS
from dckpt.resume.checks.base import Check, Evidence, Facts, each_rank, finding, get, not_checked, some

SMALL_REST = 0.01


def global_samples(batch: Facts | None) -> int | None:
    """Samples of one optimizer step over all ranks."""
    if batch is None or any(not isinstance(batch.get(key), int) for key in ("micro", "accumulation", "data_parallel")):
        return None
    return int(batch["micro"] * batch["accumulation"] * batch["data_parallel"])


def check_global_batch(evidence: Evidence) -> Iterator[Finding]:
    """micro x accumulation x data_parallel is what it was."""
    old, new = get(evidence.saved, "batch"), get(evidence.current, "batch")
    before, now = global_samples(old), global_samples(new)
    if before is None or now is None:
        side = "the checkpoint does not say its batch" if before is None else "the batch of this run is not known"
        yield not_checked("global_batch", side, "pass batch=dckpt.Batch(...) to TrainProgress")
        return
    if before != now:
        yield finding(
            "global_batch",
            "critical",
            f"the global batch was {before} samples a step and is now {now} ({_split(old)}, now {_split(new)}): "
            "the learning-rate "
            "schedule and step counts no longer mean the same",
            expected=f"{before} samples a step",
            found=now,
            remedy=_batch_remedy(before, new),
        )
    elif old != new:
        yield finding(
            "global_batch",
            "info",
            f"the {now} samples of a step are split as {_split(new)}, before as {_split(old)}",
            expected=_split(old),
            found=_split(new),
            remedy="nothing to do: the same samples make each step",
        )


def _batch_remedy(samples: int, batch: Any) -> str:
    """With the accumulation that keeps the product, if there is one."""
    rest = batch["micro"] * batch["data_parallel"]
    if samples % rest == 0:
        return f"set accumulation to {samples // rest}, or allow global_batch if the change is wanted"
    rest = batch["accumulation"] * batch["data_parallel"]
    if samples % rest == 0:
        return f"set the micro-batch to {samples // rest}, or allow global_batch if the change is wanted"
    return (
        "set micro x accumulation x data_parallel to the saved product, or allow global_batch if the change is wanted"
    )


def _split(batch: Any) -> str:
    return f"{batch['micro']} x {batch['accumulation']} x {batch['data_parallel']}"


def check_accumulation(evidence: Evidence) -> Iterator[Finding]:
    """A checkpoint within an accumulation has its gradients, and they come back."""
    lost = int(evidence.checkpoint.get("micro_step") or 0)
    is_stored = GRADIENTS in (evidence.checkpoint.get("parts") or ())
    if not lost or get(evidence.load, "continued_micro_step") or (evidence.load is None and is_stored):
        return
    batches = f"{lost} micro-batch" + ("es" if lost > 1 else "")
    how = "dropped" if is_stored and evidence.load is not None else "not stored"
    yield finding(
        "accumulation",
        "warning",
        f"the gradients of {batches} of step {evidence.checkpoint.get('step')} were {how}: that step begins again. If the data's "
        "position counts optimizer steps they are computed again, with other random numbers; else their samples are lost",
        expected=f"the gradients of {batches}",
        found=how,
        remedy="nothing to do if the data's position counts optimizer steps, as that of dckpt's sampler does",
    )


def check_work_remains(evidence: Evidence) -> Iterator[Finding]:
    """There is something left to train: a run that ends at once looks like success."""
    progress = get(evidence.current, "progress") or get(evidence.saved, "progress") or {}
    if evidence.load is None and get(evidence.saved, "progress"):
        progress = evidence.saved["progress"]
    limits = [
        ("step", "max_steps", progress.get("leg_step", progress.get("step"))),
        ("epoch", "max_epochs", progress.get("leg_epoch", progress.get("epoch"))),
    ]
    leg = progress.get("leg")
    of_leg = f" of leg {leg}" if isinstance(leg, int) and leg > 1 else ""
    is_known = False
    for what, name, at in limits:
        limit = evidence.current.get(name)
        if not isinstance(limit, int) or not isinstance(at, int):
            continue
        is_known = True
        if at >= limit:
            yield finding(
                "work_remains",
                "critical",
                f"{what} {at}{of_leg} of {name}={limit} is already done: no work remains, and the run would end at once "
                "as if it had trained",
                expected=f"a {what}{of_leg} below {name}={limit}",
                found=f"{what} {at}{of_leg}",
                remedy=f"do nothing if the run is finished; for more training raise {name} (a learning-rate schedule that is "
                f"built from {name} is then another one, see [schedule]), or call checkpointer.start_leg(state), which counts "
                "from zero again, with a new name if legs have names",
            )
        elif what == "step" and limit - at < SMALL_REST * limit:
            yield finding(
                "work_remains",
                "warning",
                f"only {limit - at} of {limit} steps remain",
                expected=f"at least {SMALL_REST:.0%} of {name}",
                found=f"{limit - at} steps",
                remedy=f"raise {name} if more training is wanted",
            )
    if not is_known:
        yield not_checked("work_remains", "this run states no end", "pass max_steps= or max_epochs= to TrainProgress")


def check_world_size(evidence: Evidence) -> Iterator[Finding]:
    """What becomes of ranks and mesh. A change that is planned for is information."""
    saved_size, saved_mesh = evidence.checkpoint.get("world_size"), evidence.checkpoint.get("mesh")
    size, mesh = get(evidence.current, "world.size"), get(evidence.current, "world.mesh")
    if size is None:
        yield not_checked("world_size", "the number of ranks of this run is not known", "pass --world-size")
        return
    if saved_size == size and (saved_mesh == mesh or evidence.load is None):
        return
    told = _streams_told(get(evidence.load, "rng") or {})
    changed = [
        axis
        for axis in {**(saved_mesh or {}), **(mesh or {})}
        if (saved_mesh or {}).get(axis, 1) != (mesh or {}).get(axis, 1)
        and axis.lower() in ("tp", "pp", "ep", "cp", "sp")
    ]
    is_model_parallel = bool(saved_mesh and mesh and changed)
    before, now = _arrangement(saved_size, saved_mesh), _arrangement(size, mesh)
    yield finding(
        "world_size",
        "warning" if is_model_parallel else "info",
        f"saved on {before}, continued on {now}{told}"
        + (f". The axes {', '.join(changed)} changed: sums are taken in another order" if is_model_parallel else ""),
        expected=before,
        found=now,
        remedy="nothing to do: tensors are resharded, and random streams follow the rule in FORMAT.md",
    )


def _streams_told(streams: dict[str, str]) -> str:
    derived = sorted(name for name, how in streams.items() if how == "re-derived")
    copied = sorted(name for name, how in streams.items() if how == "copied")
    told = f"; random streams re-derived on every rank: {', '.join(derived)}" if derived else ""
    if copied:
        told += f"; copied, equal on all ranks: {', '.join(copied)}"
    if any(name.startswith(("torch", "cuda")) for name in (*derived, *copied)):
        told += "; dropout masks differ from those on the saved ranks (dckpt.rng_slot keeps them)"
    return told


def _arrangement(size: Any, mesh: Any) -> str:
    if not mesh:
        return f"{size} rank{'s' if size != 1 else ''}"
    return f"{size} ranks ({', '.join(f'{axis}={count}' for axis, count in mesh.items())})"


def check_training_parts(evidence: Evidence) -> Iterator[Finding]:
    """The checkpoint holds what training needs besides weights."""
    parts = evidence.checkpoint.get("parts") or ()
    if "optim" not in parts:
        yield finding(
            "training_parts",
            "critical" if evidence.load is None else "info",
            "the checkpoint holds no optimizer state: moments would start empty, and the loss may spike",
            expected="part optim",
            found=list(parts),
            remedy="resume from another checkpoint, or load the weights alone and warm the learning rate up again",
        )
    elif "progress" not in parts:
        yield finding(
            "training_parts",
            "warning" if evidence.load is None else "info",
            "the checkpoint holds no counters: steps, epochs and samples are counted from zero",
            expected="part progress",
            found=list(parts),
            remedy="pass progress= to TrainState",
        )


def check_samples(evidence: Evidence) -> Iterator[Finding]:
    """The counters of steps and samples agree with each other."""
    progress = get(evidence.saved, "progress")
    if not progress:
        yield not_checked("samples", "the checkpoint has no counters", "pass progress= to TrainState")
        return
    step, samples, history = progress.get("step"), progress.get("samples"), progress.get("batch_history") or []
    if evidence.checkpoint.get("step") not in (None, step):
        yield finding(
            "samples",
            "critical",
            f"the checkpoint is named step {evidence.checkpoint['step']}, and its counter says {step}",
            expected=evidence.checkpoint["step"],
            found=step,
            remedy="call progress.advance() once after each optimizer step, and save with its step",
        )
    if not history or progress.get("batch_changes", 0) > len(history) or not isinstance(samples, int):
        yield not_checked(
            "samples", "the samples of each step are not known", "pass batch=dckpt.Batch(...) to TrainProgress"
        )
        return
    ends = [begin for begin, _ in history[1:]] + [step]
    counted = sum((end - begin) * size for (begin, size), end in zip(history, ends, strict=True))
    if counted != samples:
        yield finding(
            "samples",
            "critical",
            f"the checkpoint counts {samples} samples, its steps and batch sizes make {counted}",
            expected=counted,
            found=samples,
            remedy="find out which of the two the loop moves by itself: only progress.advance() should",
        )


def check_ranks_agree(evidence: Evidence) -> Iterator[Finding]:
    """All ranks run one program with one batch, one end, one arithmetic and one set of libraries."""
    told = each_rank(evidence, "settings")
    severities: tuple[tuple[Severity, tuple[str, ...]], ...] = (
        ("critical", ("batch", "max_steps", "max_epochs")),
        ("warning", ("precision", "versions", "code")),
    )
    for rank, found in told[1:]:
        changed = {
            name: _other_values(name, told[0][1].get(name), found.get(name))
            for _, names in severities
            for name in names
        }
        for severity, names in severities:
            texts = [text for name in names for text in changed[name]]
            if texts:
                yield finding(
                    "ranks_agree",
                    severity,
                    f"rank {rank} was started with other settings than rank 0: {some(texts)}",
                    expected="the settings of rank 0",
                    found=some(texts),
                    remedy="start all ranks with the same program, arguments and environment",
                )
        if any(changed.values()):
            return


def _other_values(name: str, first: Any, other: Any) -> list[str]:
    """What differs, as text; of a record only what both have, for not every node can say everything."""
    if isinstance(first, dict) and isinstance(other, dict):
        return [f"{key} {first[key]} -> {other[key]}" for key in first if key in other and first[key] != other[key]]
    return [f"{name} {first} -> {other}"] if first != other and name.startswith(("batch", "max")) else []


CHECKS = (
    Check("global_batch", "Samples of one optimizer step", "before", check_global_batch),
    Check("accumulation", "Position inside gradient accumulation", "before", check_accumulation),
    Check("work_remains", "Steps that are left to train", "before", check_work_remains),
    Check("world_size", "Number and arrangement of ranks", "before", check_world_size),
    Check("training_parts", "What training needs besides weights", "before", check_training_parts),
    Check("samples", "Count of samples", "before", check_samples),
    Check("ranks_agree", "One program on all ranks", "after", check_ranks_agree),
)
