"""Optimizer options, step counters, learning rates, schedules and the gradient scaler."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from dckpt.findings import Finding
from dckpt.resume.checks.base import Check, Evidence, each_rank, finding, get, not_checked, relative, some

EXACT, SERIOUS = 1e-12, 1e-6
SCHEDULE_WARN, SCHEDULE_CRITICAL = 1e-6, 1e-2
SCALE_MAX = 2.0**24
_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "momentum", "swa_lr")
_HOW = ("foreach", "fused", "capturable", "differentiable")


def _label(key: str, group: int | None = None) -> str:
    name = f" {key!r}" if key else ""
    return name if group is None else f"{name} group {group}"


def check_param_groups(evidence: Evidence) -> Iterator[Finding]:
    """The groups hold the same parameters in the same order, and the program asks for the options that were saved."""
    saved = get(evidence.saved, "optim")
    built = get(evidence.built, "optim") if evidence.built is not None else None
    if not saved or not built:
        yield not_checked("param_groups", "the groups are not known on both sides", "pass optimizer= to TrainState")
        return
    for key in sorted(set(saved) & set(built)):
        old, new = saved[key], built[key]
        if old["class"] != new["class"]:
            yield finding(
                "param_groups",
                "critical",
                f"optimizer{_label(key)} is another kind",
                expected=old["class"],
                found=new["class"],
                remedy="build the optimizer that was saved",
            )
        if [group["members"] for group in old["groups"]] != [group["members"] for group in new["groups"]]:
            same = sorted(group["members"] for group in old["groups"]) == sorted(
                group["members"] for group in new["groups"]
            )
            yield finding(
                "param_groups",
                "warning" if same else "critical",
                f"optimizer{_label(key)} has {'its groups in another order' if same else 'other parameters in its groups'}",
                expected=[f"{group['count']} parameters" for group in old["groups"]],
                found=[f"{group['count']} parameters" for group in new["groups"]],
                remedy="build the groups as they were; states were matched by name, options by group",
            )
            continue
        yield from _options_asked_for(key, old["groups"], new["groups"], _moved_by_schedules(evidence))


def _moved_by_schedules(evidence: Evidence) -> tuple[str, ...]:
    """Options that a schedule moves beside the learning rate."""
    schedules = (get(evidence.saved, "scheduler") or {}).values()
    cycles = any(schedule.get("horizon", {}).get("cycle_momentum") for schedule in schedules)
    return ("betas", "momentum") if cycles else ()


def _options_asked_for(key: str, old: list[Any], new: list[Any], moved: tuple[str, ...]) -> Iterator[Finding]:
    for number, (before, now) in enumerate(zip(old, new, strict=True)):
        changed = [
            f"{name}={now['options'][name]} (saved {before['options'][name]})"
            for name in before["options"]
            if name in now["options"]
            and name not in (*_RATES, *_HOW, *moved)
            and not _same(before["options"][name], now["options"][name])
        ]
        if changed:
            yield finding(
                "param_groups",
                "warning",
                f"optimizer{_label(key, number)}: the program asks for {some(changed)}; the saved values go on",
                expected="the options that were saved",
                found=some(changed),
                remedy="set them after resume() if the change is wanted, or put them back in the program",
            )


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, (int, float)) and isinstance(new, (int, float)) and not isinstance(old, bool):
        return relative(float(new), float(old)) <= EXACT
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return all(_same(a, b) for a, b in zip(old, new, strict=True))
    return bool(old == new)


def check_loaded_options(evidence: Evidence) -> Iterator[Finding]:
    """After the load each group has the saved options, on every rank. (Rates are the next check's.)"""
    saved = get(evidence.saved, "optim")
    if not saved or not each_rank(evidence, "optim"):
        if "optim" in (evidence.checkpoint.get("parts") or ()):
            yield not_checked("optimizer_options", "the saved options are not known", "nothing to do")
        return
    for rank, live in each_rank(evidence, "optim"):
        for key in sorted(set(saved) & set(live)):
            for number, (old, new) in enumerate(zip(saved[key]["groups"], live[key]["groups"], strict=False)):
                changed = [
                    f"{name}={new['options'].get(name)} (saved {value})"
                    for name, value in old["options"].items()
                    if name not in (*_RATES, *_HOW) and not _same(value, new["options"].get(name))
                ]
                if changed:
                    yield finding(
                        "optimizer_options",
                        "critical",
                        f"optimizer{_label(key, number)} on rank {rank} does not have the options that were "
                        f"saved: {some(changed)}",
                        expected="the saved options",
                        found=some(changed),
                        remedy="look for code that changes the optimizer after the load",
                    )
                    return


def check_optimizer_steps(evidence: Evidence) -> Iterator[Finding]:
    """Each parameter's step counter is the saved one, and they agree inside a group."""
    saved, step = get(evidence.saved, "steps"), get(evidence.saved, "progress.step")
    lives = each_rank(evidence, "steps")
    if not lives:
        if "optim" in (evidence.checkpoint.get("parts") or ()):
            yield not_checked("optimizer_steps", "the step counters are not known", "nothing to do")
        return
    for rank, live in lives:
        for key, groups in live.items():
            old = (saved or {}).get(key)
            # Facts are rank 0's: another rank may hold other parameters, but then they are not as many.
            is_comparable = rank == 0 or _sizes(old) == _sizes(groups)
            if old is not None and is_comparable and [g for g in old if g] and old != groups:
                yield finding(
                    "optimizer_steps",
                    "critical",
                    f"the step counters of optimizer{_label(key)} on rank {rank} are not those that were saved",
                    expected=old,
                    found=groups,
                    remedy="load again: bias correction and warm-up would start from the wrong step",
                )
                return
            counters = sorted({int(float(count)) for group in groups for count in group if _is_number(count)})
            # Equal to what was saved they are right: steps skipped by a scaler, several steps of one optimizer for one of
            # the other, an optimizer that was built later than the run.
            is_as_saved = old == groups or not any(old or ())  # a counter on a device is not read while saving
            if counters and step is not None and counters[-1] != step:
                yield finding(
                    "optimizer_steps",
                    "info" if is_as_saved or (counters[-1] < step and get(evidence.saved, "scaler")) else "critical",
                    f"the optimizer{_label(key)} counts {counters[-1]} steps on rank {rank}, the run {step}",
                    expected=step,
                    found=counters[-1],
                    remedy="find out whether the optimizer was stepped without progress.advance(), or built anew during the run",
                )
                return


def _sizes(groups: list[dict[str, int]] | None) -> list[int]:
    return [sum(group.values()) for group in groups or ()]


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def check_learning_rate(evidence: Evidence) -> Iterator[Finding]:
    """The optimizer's rate is the saved one, and the one that the scheduler believes to have set."""
    saved = get(evidence.saved, "optim")
    for rank, live in each_rank(evidence, "optim"):
        for key in sorted(live):
            rates = [group["options"].get("lr") for group in live[key]["groups"]]
            old = [group["options"].get("lr") for group in (saved or {}).get(key, {}).get("groups", [])]
            if old and len(old) == len(rates):
                yield from _compare_rates(f"optimizer{_label(key)} on rank {rank}", "saved", old, rates)
            schedule = get(evidence.ranks[rank], "scheduler") or {}
            believed = schedule.get(key, {}).get("last_lr") if key in schedule else None
            if believed is None and len(live) == 1 and len(schedule) == 1:
                believed = next(iter(schedule.values())).get("last_lr")
            if believed is not None and len(believed) == len(rates) and not _sets_rates_itself(evidence, key):
                yield from _compare_rates(f"optimizer{_label(key)} on rank {rank}", "of the scheduler", believed, rates)
    if not saved and "optim" in (evidence.checkpoint.get("parts") or ()):
        yield not_checked("learning_rate", "the saved learning rates are not known", "nothing to do")


def _sets_rates_itself(evidence: Evidence, key: str) -> bool:
    """Whether the rate was not the scheduler's when it was saved: a loop that warms it up by hand, say."""
    groups = get(evidence.saved, "optim") or {}
    schedules = get(evidence.saved, "scheduler") or {}
    schedule = schedules.get(key) or (next(iter(schedules.values())) if len(schedules) == 1 else {})
    rates = [group["options"].get("lr") for group in groups.get(key, {}).get("groups", [])]
    believed = schedule.get("last_lr") or []
    numbers = [(a, b) for a, b in zip(rates, believed, strict=False) if isinstance(a, float) and isinstance(b, float)]
    return any(relative(a, b) > SERIOUS for a, b in numbers)


def _compare_rates(what: str, source: str, expected: list[Any], found: list[Any]) -> Iterator[Finding]:
    for group, (old, new) in enumerate(zip(expected, found, strict=True)):
        if not isinstance(old, (int, float)) or not isinstance(new, (int, float)):
            continue
        off = relative(float(new), float(old))
        if off > EXACT:
            yield finding(
                "learning_rate",
                "critical" if off > SERIOUS else "warning",
                f"{what}, group {group}: the learning rate is {new:.9g}, the one {source} is {old:.9g}",
                expected=float(old),
                found=float(new),
                remedy="give optimizer and scheduler to the same TrainState, and build the scheduler before resume()",
            )
            return


def check_schedule(evidence: Evidence) -> Iterator[Finding]:
    """The schedule that the program builds, asked at the saved step, gives the rate that was saved."""
    saved, planned = get(evidence.saved, "scheduler"), get(evidence.load, "planned_rates")
    if not saved:
        return
    for key, old in saved.items():
        rates, last = (planned or {}).get(key), old.get("last_lr")
        if rates is None or last is None or len(rates) != len(last):
            yield not_checked(
                "schedule",
                f"scheduler{_label(key)} cannot be asked for an earlier step",
                "compare the plotted rates yourself",
            )
            continue
        for group, (was, would) in enumerate(zip(last, rates, strict=True)):
            off = relative(float(would), float(was))
            if off > SCHEDULE_WARN:
                yield finding(
                    "schedule",
                    "critical" if off > SCHEDULE_CRITICAL else "warning",
                    f"the schedule{_label(key, group)} that this program builds gives {would:.9g} at the saved "
                    "step, and the saved run had "
                    f"{was:.9g}: its length, warm-up or base rate changed",
                    expected=float(was),
                    found=float(would),
                    remedy="build the schedule with the saved constants, or call start_leg(state, scheduler='fresh') "
                    "for a new one; if allowed, the saved constants go on, but the functions of a LambdaLR are the new ones",
                )
                break


def check_schedule_continues(evidence: Evidence) -> Iterator[Finding]:
    """The next learning rate is the one that the saved run would have had."""
    saved = get(evidence.saved, "scheduler") or {}
    for rank, live in each_rank(evidence, "scheduler"):
        for key in sorted(set(saved) & set(live)):
            old, new = saved[key].get("next_lr"), live[key].get("next_lr")
            if old is None or new is None or len(old) != len(new):
                continue
            worst = max((relative(float(b), float(a)) for a, b in zip(old, new, strict=True)), default=0.0)
            if worst > SERIOUS:
                yield finding(
                    "schedule_continues",
                    "warning",
                    f"after its next step the scheduler{_label(key)} on rank {rank} sets another learning rate "
                    "than the saved run would have",
                    expected=[float(rate) for rate in old],
                    found=[float(rate) for rate in new],
                    remedy="build the schedule as it was saved; a change on purpose goes through start_leg(state, "
                    "scheduler='fresh')",
                )
                return


def check_scheduler(evidence: Evidence) -> Iterator[Finding]:
    """Kind, counter and constants of each schedule."""
    saved = get(evidence.saved, "scheduler")
    if not saved:
        return
    built = get(evidence.built, "scheduler") or {}
    for key in sorted(set(saved) & set(built)):
        old, new = saved[key], built[key]
        if old["class"] != new["class"]:
            yield finding(
                "scheduler",
                "critical",
                f"scheduler{_label(key)} is another kind",
                expected=old["class"],
                found=new["class"],
                remedy="build the scheduler that was saved, or start_leg(state, scheduler='fresh')",
            )
            continue
        before, now = _flat(old.get("horizon") or {}), _flat(new.get("horizon") or {})
        changed = [name for name in before if name in now and not _same_deep(before[name], now[name])]
        if changed:
            yield finding(
                "scheduler",
                "warning",
                f"scheduler{_label(key)}: the program asks for another schedule in {', '.join(changed)}; the saved one goes on",
                expected=some([f"{name}={before[name]}" for name in changed]),
                found=some([f"{name}={now[name]}" for name in changed]),
                remedy="put the constants back, or call start_leg(state, scheduler='fresh') to begin the new schedule",
            )
    for rank, live in each_rank(evidence, "scheduler"):
        for key in sorted(set(saved) & set(live)):
            if saved[key].get("last_epoch") != live[key].get("last_epoch"):
                yield finding(
                    "scheduler",
                    "critical",
                    f"scheduler{_label(key)} on rank {rank} stands at step {live[key].get('last_epoch')}, saved "
                    f"at {saved[key].get('last_epoch')}",
                    expected=saved[key].get("last_epoch"),
                    found=live[key].get("last_epoch"),
                    remedy="look for code that steps the scheduler between the load and the first training step",
                )
                return


def _flat(horizon: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The constants of a schedule and of those inside it, these as `schedules[1].T_max`."""
    found = {f"{prefix}{name}": value for name, value in horizon.items() if name != "schedules"}
    for number, inner in enumerate(horizon.get("schedules") or ()):
        found |= _flat(inner, f"{prefix}schedules[{number}].")
    return found


def _same_deep(old: Any, new: Any) -> bool:
    if isinstance(old, dict) and isinstance(new, dict):
        return old.keys() == new.keys() and all(_same_deep(old[key], new[key]) for key in old)
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(_same_deep(a, b) for a, b in zip(old, new, strict=True))
    return _same(old, new)


def check_grad_scaler(evidence: Evidence) -> Iterator[Finding]:
    """The loss scale is there, sane, and the saved one."""
    saved = get(evidence.saved, "scaler") or {}
    lives = each_rank(evidence, "scaler")
    for rank, live in lives:
        for key in sorted({**saved, **live}):
            old, new = saved.get(key), live.get(key)
            fault = _scaler_fault(old, new)
            if fault is not None:
                yield finding(
                    "grad_scaler",
                    "critical",
                    f"gradient scaler{_label(key)} on rank {rank}: {fault}",
                    expected=old,
                    found=new,
                    remedy="give the scaler to TrainState; a scale that starts again overflows and skips steps",
                )
                return


def _scaler_fault(old: Any, new: Any) -> str | None:
    if old is None:
        return None
    if new is None:
        return "it was saved and this run has none"
    if bool(old) != bool(new):
        return "its state is empty" if old else "it was switched off when saved and is on now"
    if not new:
        return None
    scale = new.get("scale")
    if not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        return f"its scale is {scale}"
    is_default = old.get("growth_factor", 2.0) == 2.0 and old.get("backoff_factor", 0.5) == 0.5
    # A scale that was saved so is the run's own: without an overflow it grows for ever.
    if is_default and scale != old.get("scale") and (scale > SCALE_MAX or math.frexp(scale)[0] != 0.5):
        return f"its scale {scale:.9g} is no power of two up to 2^24"
    for name in ("scale", "_growth_tracker", "growth_factor", "backoff_factor", "growth_interval"):
        if name in old and old[name] != new.get(name):
            return f"{name} is {new.get(name)}, saved {old[name]}"
    return None


CHECKS = (
    Check("param_groups", "Parameter groups", "after", check_param_groups),
    Check("optimizer_options", "Options of the optimizer after the load", "after", check_loaded_options),
    Check("optimizer_steps", "Step counters of the optimizer", "after", check_optimizer_steps),
    Check("learning_rate", "Learning rate", "after", check_learning_rate),
    Check("schedule", "The new schedule at the saved step", "after", check_schedule),
    Check("schedule_continues", "The next learning rate", "after", check_schedule_continues),
    Check("scheduler", "Kind, counter and constants of the scheduler", "after", check_scheduler),
    Check("grad_scaler", "Loss scale", "after", check_grad_scaler),
)
