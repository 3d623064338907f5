"""Training flags, dropout, what is trainable, ties, buffers that no checkpoint holds, gradients left over, averages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dckpt.findings import Finding
from dckpt.resume.checks.base import Check, Evidence, each_rank, finding, get, not_checked, ranks_text, some


def _flags(modes: list[list[Any]]) -> dict[str, bool]:
    return dict(modes)


def check_train_mode(evidence: Evidence) -> Iterator[Finding]:
    """Every submodule is in the mode in which it was saved."""
    saved = get(evidence.saved, "model.modes")
    if saved is None:
        yield not_checked("train_mode", "the saved training flags are not known", "call model.train() before the loop")
        return
    sensitive = {name for name, _ in get(evidence.saved, "model.dropout.modules") or ()}
    sensitive |= set(get(evidence.saved, "model.batch_norms.names") or ())
    was_evaluating = _flags(saved).get("", True) is False
    for rank, modes in each_rank(evidence, "modes"):
        if modes == saved:
            continue
        if was_evaluating and _flags(modes) == {"": True}:
            yield finding(
                "train_mode",
                "warning",
                "the checkpoint was saved in eval mode, probably after a validation that failed, and the model trains now: the "
                "steps before the save had no dropout, and BatchNorm stood still",
                expected="eval mode",
                found="training mode",
                remedy="go on; evaluate inside dckpt.evaluating(model), which puts each mode back whatever happens",
            )
            return
        old, new = _flags(saved), _flags(modes)
        changed = sorted(name for name in {**old, **new} if old.get(name) != new.get(name))
        hits = [name for name in sensitive if _mode_of(name, old) != _mode_of(name, new)]
        what = "eval" if any(new.get(name) is False for name in changed) else "training"
        yield finding(
            "train_mode",
            "critical" if hits else "warning",
            f"{len(changed)} submodule{'s' * (len(changed) > 1)} on rank {rank} in {what} mode and were not when saved "
            f"({some([n or 'the model' for n in changed])})"
            + (f": {len(hits)} dropout or BatchNorm layers work differently" if hits else ""),
            expected=_mode_text(old),
            found=_mode_text(new),
            remedy="call model.train() (or put the frozen parts back into eval mode) before resume(), and evaluate "
            "inside dckpt.evaluating(model)",
        )
        return
    if was_evaluating:
        yield finding(
            "train_mode",
            "warning",
            "the checkpoint was saved with the model in eval mode, and it is in eval mode now",
            expected="training mode",
            found="eval mode",
            remedy="call model.train(); evaluate inside dckpt.evaluating(model), which puts each mode back whatever happens",
        )


def _mode_of(name: str, flags: dict[str, bool]) -> bool | None:
    """The mode of a submodule: its own entry, or that of the nearest module above it that has one."""
    while name:
        if name in flags:
            return flags[name]
        name = name.rpartition(".")[0]
    return flags.get("")


def _mode_text(flags: dict[str, bool]) -> str:
    shown = [f"{name or 'model'}: {'train' if flag else 'eval'}" for name, flag in list(flags.items())[:4]]
    return ", ".join(shown) + (", ..." if len(flags) > 4 else "")


def check_dropout(evidence: Evidence) -> Iterator[Finding]:
    """Dropout layers and rates are those of the saved model."""
    saved = get(evidence.saved, "model.dropout")
    if saved is None:
        return
    for rank, digest in each_rank(evidence, "dropout_digest"):
        if digest != saved["digest"]:
            now = get(evidence.current, "model.dropout") or {}
            yield finding(
                "dropout",
                "warning",
                f"dropout on rank {rank} is not what it was",
                expected=f"{saved['count']} layers with rates {saved['rates']}",
                found=f"{now.get('count')} layers with rates {now.get('rates')}",
                remedy="build the model with the saved rates, or allow the change",
            )
            return


def check_trainable(evidence: Evidence) -> Iterator[Finding]:
    """The same parameters are trained."""
    saved, now = get(evidence.saved, "model.trainable"), get(evidence.current, "model.trainable")
    if saved is None:
        yield not_checked("trainable", "the saved set of trained parameters is not known", "nothing to do")
        return
    odd = [rank for rank, digest in each_rank(evidence, "trainable_digest") if digest != saved["digest"]]
    if not odd:
        return
    old_names, new_names = set(saved["names"] or ()), set((now or {}).get("names") or ())
    lost, gained = sorted(old_names - new_names), sorted(new_names - old_names)
    detail = "; ".join(
        text
        for text in (
            f"no longer trained: {some(lost)}" if lost and new_names else "",
            f"trained now: {some(gained)}" if gained and old_names else "",
        )
        if text
    )
    yield finding(
        "trainable",
        "critical",
        f"other parameters are trained than when saved, on {ranks_text(odd)}" + (f" ({detail})" if detail else ""),
        expected=f"{saved['count']} trained parameters",
        found=(now or {}).get("count"),
        remedy="set requires_grad as it was before the optimizer is built, or start_leg(state) for another training",
    )


def check_tied(evidence: Evidence) -> Iterator[Finding]:
    """Tensors that were one are one."""
    saved = {k: v for k, v in (evidence.checkpoint.get("aliases") or {}).items() if k.startswith("model.")}
    for rank, tied in each_rank(evidence, "tied"):
        lost = sorted(set(saved) - set(tied))
        gained = sorted(set(tied) - set(saved))
        if lost or gained:
            change = (
                f"{lost[0]} was tied to {saved[lost[0]]} and is not"
                if lost
                else f"{gained[0]} is tied to {tied[gained[0]]} and was not"
            )
            yield finding(
                "tied_weights",
                "critical",
                f"on rank {rank} {change}: the two would train apart" if lost else f"on rank {rank} {change}",
                expected=some([f"{a} = {b}" for a, b in saved.items()]) or "no ties",
                found=some([f"{a} = {b}" for a, b in tied.items()]) or "no ties",
                remedy="tie the weights after the model is built and before it is wrapped, then resume again",
            )
            return


def check_unsaved_buffers(evidence: Evidence) -> Iterator[Finding]:
    """Buffers that no state_dict holds (rotary tables, masks) were made again as they were, on every rank alike."""
    saved = get(evidence.saved, "model.unsaved_buffers")
    per_rank = each_rank(evidence, "unsaved_buffers")
    if not per_rank or not any(buffers for _, buffers in per_rank):
        return
    if saved is None:
        yield not_checked("computed_buffers", "the saved values of computed buffers are not known", "nothing to do")
        saved = {}
    hollow = sorted({name for _, buffers in per_rank for name, digest in buffers.items() if digest == "meta"})
    if hollow:
        yield finding(
            "computed_buffers",
            "critical",
            f"{some(hollow)} hold no values: the model was built on the meta device and they were never computed",
            expected="values",
            found="meta tensors",
            remedy="compute these buffers after to_empty() (a reset_parameters or init method of the module)",
        )
        return
    invalid = sorted(
        {
            n
            for _, found in per_rank
            for n, digest in found.items()
            if digest.startswith("NaN ") and saved.get(n) != digest
        }
    )
    if invalid:
        yield finding(
            "computed_buffers",
            "critical",
            f"{some(invalid)} hold NaN: memory that was never written, or a computation that failed",
            expected="numbers",
            found="NaN",
            remedy="compute these buffers when the model is built, after to_empty() too",
        )
        return
    digests: dict[str, dict[str, list[int]]] = {}
    for rank, buffers in per_rank:
        for name, digest in buffers.items():
            digests.setdefault(name, {}).setdefault(digest, []).append(rank)
    for name, found in digests.items():
        was = saved.get(name)
        if len(found) > 1 and was in found:
            odd = sorted(rank for digest, ranks in found.items() if digest != was for rank in ranks)
            yield finding(
                "computed_buffers",
                "critical",
                f"the computed buffer {name} on {ranks_text(odd)} has another value than when saved, and than on the other ranks",
                expected="one value on all ranks",
                found=f"{len(found)} values",
                remedy="look at how these ranks build the model",
            )
            return
    changed = [
        name for name, found in digests.items() if saved.get(name) and list(found) != [saved[name]] and len(found) == 1
    ]
    if changed:
        yield finding(
            "computed_buffers",
            "warning",
            f"computed buffers have other values than when saved: {some(changed)}",
            expected="the saved values",
            found=f"{len(changed)} other values",
            remedy="check what they are computed from (sequence length, rotary base, scaling), or register them as persistent",
        )


def check_gradients(evidence: Evidence) -> Iterator[Finding]:
    """No gradient is left over, unless the checkpoint brought it."""
    if get(evidence.load, "continued_micro_step"):
        return
    for rank, left in each_rank(evidence, "gradients"):
        if left["count"]:
            yield finding(
                "gradients",
                "critical",
                f"{left['count']} parameters on rank {rank} have gradients ({some(left['names'])}): the next step would add them",
                expected="no gradients",
                found=f"{left['count']} gradients",
                remedy="call optimizer.zero_grad() before the loop",
            )
            return


def check_ema(evidence: Evidence) -> Iterator[Finding]:
    """The average is there, has counted on, and is not simply the weights."""
    saved, now = get(evidence.saved, "ema"), get(evidence.current, "ema")
    if saved is None and "ema" not in (evidence.checkpoint.get("parts") or ()):
        return
    if "ema" not in (evidence.checkpoint.get("parts") or ()) or now is None:
        yield finding(
            "ema",
            "critical",
            "the average of the weights is missing "
            + ("in this run" if now is None else "in the checkpoint")
            + ": it would start again from the current weights",
            expected="an average",
            found="none",
            remedy="pass ema= to TrainState",
        )
        return
    if saved and saved.get("updates") is not None and saved.get("updates") != now.get("updates"):
        yield finding(
            "ema",
            "critical",
            f"the average counts {now.get('updates')} updates, saved {saved['updates']}: its decay would warm up again",
            expected=saved["updates"],
            found=now.get("updates"),
            remedy="keep the counter where state_dict() finds it (a buffer), or in extra=",
        )
    equal = get(evidence.load, "ema_equals_weights")
    if equal and (get(evidence.saved, "progress.step") or 0) > 1:
        yield finding(
            "ema",
            "warning",
            "the average is bit for bit equal to the weights: it was never updated, or was made again",
            expected="an average that differs from the weights",
            found="equal",
            remedy="check that the average is updated after each step, and saved before it is overwritten",
        )


def check_frozen_rows(evidence: Evidence) -> Iterator[Finding]:
    """Rows that must not train (base vocabulary under an extended one) are the saved ones and have no momentum."""
    now = get(evidence.load, "frozen_rows") or {}
    base = get(evidence.saved, "frozen_rows") or {}
    for name in sorted(set(base) - set(now)):
        yield not_checked(
            "frozen_rows", f"the frozen rows of {name} are not declared", "pass frozen_rows= to TrainState"
        )
    for name, found in now.items():
        was = base.get(name)
        if was is None:
            yield not_checked("frozen_rows", f"the checkpoint does not know frozen rows of {name}", "nothing to do")
        elif was["rows"] != found["rows"]:
            yield finding(
                "frozen_rows",
                "critical",
                f"{name}: other rows are declared frozen than when saved",
                expected=was["rows"],
                found=found["rows"],
                remedy="declare the rows of the base vocabulary as before",
            )
        elif was["fingerprint"] != found["fingerprint"]:
            yield finding(
                "frozen_rows",
                "critical",
                f"{name}: rows {found['rows'][0]} to {found['rows'][1]} are declared frozen, and are not what they were at the "
                "start",
                expected=was["fingerprint"],
                found=found["fingerprint"],
                remedy="copy the base rows in again; mask their gradient on the sharded parameter, without weight decay",
            )
        if found["moments"]:
            yield finding(
                "frozen_rows",
                "critical",
                f"{name}: frozen rows have moments in the optimizer, so they get gradients: the mask does not hold",
                expected="no moments",
                found=f"{found['moments']} elements",
                remedy="set the mask on the sharded parameter, after wrapping; then reset these rows and their moments",
            )
        if found["weight_decay"]:
            yield finding(
                "frozen_rows",
                "warning",
                f"{name}: weight decay {found['weight_decay']:.9g} moves rows whose gradient is masked",
                expected="no weight decay on a tensor with frozen rows",
                found=found["weight_decay"],
                remedy="put the tensor into a group with weight_decay=0",
            )


CHECKS = (
    Check("train_mode", "Training and eval mode of every submodule", "after", check_train_mode),
    Check("dropout", "Dropout rates", "after", check_dropout),
    Check("trainable", "Which parameters are trained", "after", check_trainable),
    Check("tied_weights", "Tied weights", "after", check_tied),
    Check("computed_buffers", "Buffers that no checkpoint holds", "after", check_unsaved_buffers),
    Check("gradients", "Gradients left over", "after", check_gradients),
    Check("ema", "Average of the weights", "after", check_ema),
    Check("frozen_rows", "Rows that must not train", "after", check_frozen_rows),
)
