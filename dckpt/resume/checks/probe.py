"""One forward pass over a kept batch, and the first steps after a resume."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

from dckpt.findings import Finding, Severity
from dckpt.resume.checks.base import Check, Evidence, finding, get, not_checked, relative

GROSS = ((0.5, "critical"), (0.2, "warning"))
STRICT = ((1e-2, "critical"), (1e-3, "warning"), (1e-5, "info"))
GRADIENT = ((0.5, "critical"), (0.05, "warning"))
SIGMAS = 6.0
WATCHED_STEPS = 20
BASELINE_MIN = 8
RECENT = 20
RATE_JUMP = 2.0


def check_probe(evidence: Evidence) -> Iterator[Finding]:
    """The loss of the probe batch is what it was when saved."""
    saved, now = get(evidence.saved, "probe"), get(evidence.load, "probe")
    if saved is None or now is None:
        if saved is not None or now is not None:
            yield not_checked(
                "probe_loss", "the probe is known on one side only", "pass probe= to resume() in every run"
            )
        return
    if saved.get("batch") != now.get("batch"):
        yield not_checked("probe_loss", "the probe batch is another one than when saved", "keep the batch in a file")
        return
    is_strict = bool(get(evidence.load, "same_mesh")) and get(evidence.saved, "precision") == get(
        evidence.current, "precision"
    )
    yield from _compare("probe_loss", "loss", float(saved["loss"]), float(now["loss"]), STRICT if is_strict else GROSS)
    if (saved.get("gradient_norm") is None) != (now.get("gradient_norm") is None):
        why = "the gradient norm of the probe is known on one side only: gradients were held when it was measured"
        yield not_checked("probe_gradient", why, "call zero_grad() after optimizer.step(), before the save")
    elif saved.get("gradient_norm") is not None:
        before, after = float(saved["gradient_norm"]), float(now["gradient_norm"])
        yield from _compare("probe_gradient", "gradient norm", before, after, GRADIENT)


def _compare(
    check: str, what: str, expected: float, found: float, tiers: Sequence[tuple[float, str]]
) -> Iterator[Finding]:
    if not math.isfinite(expected):
        yield not_checked(
            check, f"the {what} of the probe batch was {expected} when saved", "choose a batch with a finite loss"
        )
        return
    off = relative(found, expected) if math.isfinite(found) else math.inf
    for limit, severity in tiers:
        if off > limit:
            level: Severity = severity  # type: ignore[assignment]
            yield finding(
                check,
                level,
                f"the {what} of the probe batch is {found:.6g}, saved {expected:.6g}: {off:.2%} off",
                expected=expected,
                found=found,
                remedy="the model does not compute what it did; look at the other findings, and at dropout, precision and code",
            )
            return


def check_first_steps(
    before: Sequence[float],
    after: Sequence[float],
    *,
    rates: Sequence[float] = (),
    saved_rate: float | None = None,
    samples: int | None = None,
    saved_samples: int | None = None,
) -> Iterator[Finding]:
    """The losses after a resume lie within six sigma of those before it. Pure: two windows of losses, in order of steps.

    The spread is that of the losses around their own line, so that a falling loss is no alarm. rates: learning rates of the
    steps after; saved_rate: when saved. samples, saved_samples: of a step, now and when saved.
    """
    base = [loss for loss in before if math.isfinite(loss)][-50:]
    bad = [loss for loss in after if not math.isfinite(loss)]
    if bad:
        yield finding(
            "first_steps",
            "warning",
            f"the loss is {bad[0]} within {len(after)} steps of the resume",
            expected="a number",
            found=bad[0],
            remedy="stop, and look at the resume report",
        )
        return
    if len(base) >= BASELINE_MIN and after:
        level, spread = _line(base)
        spread = max(spread, 1e-6 * abs(level), 1e-12)
        # A loss that falls along a curve lies above its line in the end, and single losses jump: what happened
        # shortly before is no alarm now.
        limit = max(level + SIGMAS * spread, max(base[-RECENT:]) + SIGMAS / 2 * spread)
        # The middle of them: one batch of outliers is no spike, and what lost moments do lasts.
        now = statistics.median(after)
        if now > limit:
            yield finding(
                "first_steps",
                "warning",
                f"the loss rose to {now:.4g} within {len(after)} steps of the resume; before it, it was {level:.4g} "
                f"and moved by {spread:.3g}",
                expected=f"at most {limit:.4g}",
                found=now,
                remedy="stop, and look at the resume report: lost moments, another learning rate or other data do this",
            )
    if samples is not None and saved_samples is not None and samples != saved_samples:
        yield finding(
            "first_steps",
            "warning",
            f"a step takes {samples} samples since the resume, and took {saved_samples} before",
            expected=f"{saved_samples} samples",
            found=samples,
            remedy="set micro x accumulation x data_parallel to the saved product",
        )
    if saved_rate and rates:
        jump = max(rates) / saved_rate if saved_rate else 1.0
        if jump > RATE_JUMP:
            yield finding(
                "first_steps",
                "warning",
                f"the learning rate is {max(rates):.4g} within {len(rates)} steps of the resume, and was {saved_rate:.4g}",
                expected=saved_rate,
                found=max(rates),
                remedy="give the scheduler to TrainState, so that it goes on where it was",
            )


def _line(values: Sequence[float]) -> tuple[float, float]:
    """Value at the end of the least-squares line, and the standard deviation around it."""
    count = len(values)
    middle = (count - 1) / 2
    mean = sum(values) / count
    slope = sum((i - middle) * (value - mean) for i, value in enumerate(values)) / sum(
        (i - middle) ** 2 for i in range(count)
    )
    rest = [value - mean - slope * (i - middle) for i, value in enumerate(values)]
    spread = math.sqrt(sum(item * item for item in rest) / max(1, count - 2))
    return mean + slope * (count - 1 - middle), spread


CHECKS = (Check("probe_loss", "Loss of the probe batch", "probe", check_probe),)
