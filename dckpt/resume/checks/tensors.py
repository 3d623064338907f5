"""Names, dtypes and values of tensors after a load."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from dckpt.findings import Finding
from dckpt.resume.checks.base import Check, Evidence, each_rank, finding, get, not_checked, some, union

LOST_SHARE = 0.999
WIDTH = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
MANY_INCOHERENT, FAR_INCOHERENT = 1e-4, 1.5


def check_tensors(evidence: Evidence) -> Iterator[Finding]:
    """The live tensors have the names, dtypes and shapes that were saved."""
    saved, now = get(evidence.saved, "tensors"), get(evidence.current, "tensors")
    if not saved or not now:
        yield not_checked(
            "tensors", "names and shapes of this run are not known before it is built", "the load compares them"
        )
        return
    for part in sorted(set(saved) | set(now)):
        old, new = saved.get(part), now.get(part)
        if new is None and old is not None and _is_wanted(evidence, part):
            yield finding(
                "tensors",
                "critical" if part in ("model", "optim") else "warning",
                f"all tensors of part {part} are gone: {_text(old)} were saved",
                expected=_text(old),
                found="none",
                remedy="nothing may empty an optimizer or a model between the load and the first step",
            )
        if old is None or new is None or old["digest"] == new["digest"]:
            continue
        narrowed = any(
            _widest(old["dtypes"]) > _widest(new["dtypes"]) or _floats(new["dtypes"], dtype) < count
            for dtype, count in old["dtypes"].items()
            if WIDTH.get(dtype, 0) >= 4
        ) and _total(old["dtypes"]) == _total(new["dtypes"])
        what = "dtypes" if old["dtypes"] != new["dtypes"] and old["count"] == new["count"] else "names or shapes"
        yield finding(
            "tensors",
            "critical" if narrowed or (part in ("model", "optim") and what != "dtypes") else "warning",
            f"the {what} of part {part} are not those that were saved"
            + (": values lost precision" if narrowed else ""),
            expected=_text(old),
            found=_text(new),
            remedy="build model and optimizer as they were; a conversion on purpose is load(state, cast='allow')",
        )


def _is_wanted(evidence: Evidence, part: str) -> bool:
    """Whether this run has the part, and loaded it."""
    is_loaded = evidence.load is not None and part not in (get(evidence.load, "skipped_parts") or ())
    return is_loaded and part in (get(evidence.current, "parts") or ())


def _text(part: dict[str, object]) -> str:
    dtypes = part["dtypes"]
    assert isinstance(dtypes, dict)
    return f"{part['count']} tensors ({', '.join(f'{count} {dtype}' for dtype, count in dtypes.items())})"


def _widest(dtypes: dict[str, int]) -> int:
    return max((WIDTH.get(dtype, 0) for dtype in dtypes), default=0)


def _floats(dtypes: dict[str, int], at_least: str) -> int:
    return sum(count for dtype, count in dtypes.items() if WIDTH.get(dtype, 0) >= WIDTH[at_least])


def _total(dtypes: dict[str, int]) -> int:
    return sum(dtypes.values())


def check_fingerprints(evidence: Evidence) -> Iterator[Finding]:
    """Every tensor has bit for bit the values that were saved, wherever its shards lie now."""
    found = get(evidence.load, "fingerprints")
    if found is None:
        if evidence.load is not None:
            yield not_checked("fingerprints", "the checkpoint has no fingerprints", "save once more with this version")
        return
    if found.get("reason") or found.get("without"):
        why = found.get("reason") or f"{len(found['without'])} tensors were saved without a fingerprint"
        yield not_checked("fingerprints", str(why), "save once more with this version")
    differing = list(found["differing"])
    groups: dict[str, list[str]] = defaultdict(list)
    for name in differing:
        groups[_kind(name)].append(name)
    for kind, names in groups.items():
        yield finding(
            "fingerprints",
            "critical",
            f"{len(names)} {kind} do not have the values that were saved: {some(names)}",
            expected="the saved bits",
            found=f"{len(names)} of {found['checked']} tensors differ",
            remedy="nothing may change between load and validation; if nothing did, shards went to wrong places: "
            "do not train on this, and report it",
        )


def _kind(name: str) -> str:
    part = name.partition(".")[0]
    return {"model": "parameters or buffers", "optim": "optimizer states", "ema": "averaged weights"}.get(
        part, "tensors"
    )


def check_replicas(evidence: Evidence) -> Iterator[Finding]:
    """Ranks that hold the same shards hold the same values."""
    drifted = get(evidence.load, "fingerprints.drifted") or {}
    if not drifted:
        return
    name, who = next(iter(drifted.items()))
    yield finding(
        "replicas",
        "critical",
        f"replicas disagree: {who} hold other values of {some(list(drifted))} than the lowest rank with the same shard",
        expected="equal values on ranks that hold the same shards",
        found=f"{len(drifted)} tensors differ, {name} on {who}",
        remedy="do not train: gradients would be averaged over different models. Resume again, and see what changes one rank",
    )


def check_finite(evidence: Evidence) -> Iterator[Finding]:
    """Parameters, buffers and optimizer states are numbers."""
    names = list(dict.fromkeys(n for _, found in each_rank(evidence, "values.nonfinite") for n in found["names"]))
    for kind, check, chosen in (
        ("parameters or buffers", "finite_weights", [n for n in names if not n.startswith("optim.")]),
        ("optimizer states", "moments_valid", [n for n in names if n.startswith("optim.")]),
    ):
        if chosen:
            yield finding(
                check,
                "critical",
                f"{len(chosen)} {kind} hold NaN or infinity: {some(chosen)}",
                expected="finite numbers",
                found=f"{len(chosen)} tensors with NaN or infinity",
                remedy="resume from an older step (`dckpt rollback`), from before the loss became NaN",
            )


def check_moments(evidence: Evidence) -> Iterator[Finding]:
    """Second moments are not negative, and moments are not all zero after the first step."""
    negative = list(dict.fromkeys(n for _, found in each_rank(evidence, "values.negative") for n in found["names"]))
    squares = [name for name in negative if name.startswith("optim.")]
    if squares:
        yield finding(
            "moments_valid",
            "critical",
            f"averages of squares are negative: {some(squares)}",
            expected="at least zero",
            found=f"{len(squares)} tensors with negative elements",
            remedy="resume from an older step; these moments were overwritten",
        )
    variances = [name for name in negative if not name.startswith("optim.")]
    if variances:
        yield finding(
            "buffers",
            "critical",
            f"variances of BatchNorm are negative: {some(variances)}",
            expected="at least zero",
            found=f"{len(variances)} buffers with negative elements",
            remedy="resume from an older step; these buffers were overwritten",
        )


def check_moments_lost(evidence: Evidence) -> Iterator[Finding]:
    """A moment that is zero everywhere after training began was lost."""
    step = get(evidence.saved, "progress.step") or evidence.checkpoint.get("step") or 0
    if not step or "optim" not in (evidence.checkpoint.get("parts") or ()):
        return
    zero: dict[str, int] = defaultdict(int)
    for _, names in each_rank(evidence, "values.zero_moments.names"):
        for name in names:
            zero[name] += 1
    gone: dict[str, int] = {}
    for kind in union(evidence, "values.moments"):
        counts = [moments[kind] for _, moments in each_rank(evidence, "values.moments") if kind in moments]
        total = max(all_ for _, all_ in counts)
        if total and min(zeros for zeros, _ in counts) >= LOST_SHARE * total:
            gone[kind] = total
    # A shard of zeros may be part of a tensor that is not zero: those count that are zero on every rank that reports.
    lost = sorted(name for name, ranks in zero.items() if ranks == len(evidence.ranks))
    if gone:
        yield finding(
            "moments_lost",
            "critical",
            f"{' and '.join(f'all {total} {kind}' for kind, total in gone.items())} of the optimizer are zero after {step} "
            "steps: they were lost, and the loss will spike",
            expected="moments that are not zero",
            found=f"{', '.join(gone)} are zero",
            remedy="resume from a checkpoint that has them; else warm the learning rate up again (`dckpt repair` says how)",
        )
    elif lost:
        first = [name for name in lost if name.rpartition(".")[2] in ("exp_avg", "momentum_buffer")]
        yield finding(
            "moments_lost",
            "warning",
            f"{len(lost)} moments are zero everywhere after {step} steps: {some(first or lost)}",
            expected="moments that are not zero",
            found=f"{len(lost)} are zero",
            remedy="go on if these parameters never get a gradient (unused experts); else resume from another checkpoint",
        )


def check_coherence(evidence: Evidence) -> Iterator[Finding]:
    """Adam's two averages are of the same gradients: |m| <= c sqrt(v)."""
    rows = [row for _, found in each_rank(evidence, "values.incoherent") for row in found]
    if not rows:
        return
    schedules = (get(evidence.saved, "scheduler") or {}).values()
    if any(schedule.get("horizon", {}).get("cycle_momentum") for schedule in schedules):
        yield not_checked(
            "moments_coherent", "a schedule moves the betas, and the bound holds for constant ones", "nothing to do"
        )
        return
    worst = max(float(row[1]) for row in rows)
    share = max(float(row[2]) for row in rows)
    names = list(dict.fromkeys(str(row[0]) for row in sorted(rows, key=lambda row: -float(row[1]))))
    yield finding(
        "moments_coherent",
        "critical" if worst > FAR_INCOHERENT or share > MANY_INCOHERENT else "warning",
        f"exp_avg and exp_avg_sq of {some(names)} cannot come from the same gradients: up to {worst:.3g} times "
        "the possible ratio",
        expected="a ratio of at most 1",
        found=f"{worst:.3g}, in {share:.2%} of the elements",
        remedy="the moments of two parameters, or of two steps, were mixed: resume from another checkpoint",
    )


CHECKS = (
    Check("tensors", "Names, shapes and dtypes", "before", check_tensors),
    Check("fingerprints", "Values of every tensor", "after", check_fingerprints),
    Check("replicas", "Agreement of replicas", "after", check_replicas),
    Check("finite_weights", "No NaN and no infinity", "after", check_finite),
    Check("moments_valid", "Optimizer states that are possible", "after", check_moments),
    Check("moments_lost", "Moments that were lost", "after", check_moments_lost),
    Check("moments_coherent", "Adam's two averages fit each other", "after", check_coherence),
)
