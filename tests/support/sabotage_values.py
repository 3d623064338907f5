"""Tensors and flags that are not what they were, case by case, and what the validator must say to it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.support.sabotage import (
    VOCABULARY,
    Case,
    Net,
    Run,
)

C, W, I = "critical", "warning", "info"  # noqa: E741 - as in the tables of the documentation

FINGERPRINTS, TENSORS = {"fingerprints": C}, {"tensors": C}


def _zero(run: Run, *kinds: str, of: str | None = None) -> None:
    for held in [run.moments(of)] if of else list(run.optimizer.state.values()):
        for kind in kinds:
            held[kind].zero_()


def _scale(kind: str, by: float) -> Callable[[Run], object]:
    return lambda run: [moment.mul_(by) for moment in run.all_moments(kind)]


def _swap(one: torch.Tensor, other: torch.Tensor) -> None:
    held = one.clone()
    one.copy_(other)
    other.copy_(held)


def _swap_moments(kind: str) -> Callable[[Run], object]:
    return lambda run: _swap(run.moments("twin_a.weight")[kind], run.moments("twin_b.weight")[kind])


def _halve(tensors: list[torch.Tensor]) -> None:
    for tensor in tensors:
        tensor.copy_(tensor.bfloat16().to(tensor.dtype))


def _cast_moments(run: Run) -> None:
    for held in run.optimizer.state.values():
        held["exp_avg"], held["exp_avg_sq"] = held["exp_avg"].bfloat16(), held["exp_avg_sq"].bfloat16()


def _exchange_states(run: Run) -> None:
    """As `Optimizer.load_state_dict` does when a list of parameters has another order: it goes by position."""
    first, second = (dict(run.model.named_parameters())[name] for name in ("twin_a.weight", "twin_b.weight"))
    states = run.optimizer.state
    states[first], states[second] = states[second], states[first]


def _set_bit(run: Run) -> None:
    run.model.up.weight.view(torch.int32)[3, 3] ^= 1


def _untie(run: Run) -> None:
    run.model.head.weight = torch.nn.Parameter(run.model.embed.weight.detach().clone())


def _meta(run: Run) -> None:
    run.model.rotary = torch.empty(16, device="meta")


def _forget(run: Run, *names: str) -> None:
    for name in names:
        run.optimizer.state.pop(dict(run.model.named_parameters())[name])


def _unfreeze(model: Net) -> None:
    model.frozen.requires_grad_(True)


def _freeze(model: Net) -> None:
    model.twin_a.requires_grad_(False)


def _deeper(model: Net) -> None:
    model.more = torch.nn.Linear(16, 16)


def _no_dropout_model(model: Net) -> None:
    model.drop = torch.nn.Identity()


VALUES = [
    # Moments.
    Case("all first moments zeroed", {"moments_lost": C, **FINGERPRINTS}, "zero", lambda r: _zero(r, "exp_avg")),
    Case("all second moments zeroed", {"moments_lost": C, **FINGERPRINTS}, "zero", lambda r: _zero(r, "exp_avg_sq")),
    Case(
        "all moments zeroed", {"moments_lost": C, **FINGERPRINTS}, "zero", lambda r: _zero(r, "exp_avg", "exp_avg_sq")
    ),
    Case(
        "moments of one parameter zeroed",
        {"moments_lost": W, **FINGERPRINTS},
        "optim.up.weight.exp_avg",
        lambda r: _zero(r, "exp_avg", "exp_avg_sq", of="up.weight"),
    ),
    Case("moments saved as zeros", {"moments_lost": C}, "spike", saved="zero moments"),
    Case("first moments scaled", FINGERPRINTS, "exp_avg", _scale("exp_avg", 10.0)),
    Case("second moments scaled", {"moments_coherent": C, **FINGERPRINTS}, "exp_avg_sq", _scale("exp_avg_sq", 0.01)),
    Case("second moments scaled up", FINGERPRINTS, "exp_avg_sq", _scale("exp_avg_sq", 100.0)),
    Case(
        "first moments of two parameters swapped", FINGERPRINTS, "optim.twin_a.weight.exp_avg", _swap_moments("exp_avg")
    ),
    Case(
        "second moments of two parameters swapped",
        FINGERPRINTS,
        "optim.twin_b.weight.exp_avg_sq",
        _swap_moments("exp_avg_sq"),
    ),
    Case("states assigned by another order", FINGERPRINTS, "optim.twin_a.weight", _exchange_states),
    Case(
        "first and second moment exchanged",
        FINGERPRINTS,
        "optim.up.weight",
        lambda r: _swap(r.moments("up.weight")["exp_avg"], r.moments("up.weight")["exp_avg_sq"]),
    ),
    Case(
        "moments rounded to bfloat16", FINGERPRINTS, "optimizer states", lambda r: _halve(r.all_moments("exp_avg_sq"))
    ),
    Case("moments cast to bfloat16", TENSORS, "lost precision", _cast_moments),
    Case(
        "one moment NaN",
        {"moments_valid": C},
        "optim.up.weight.exp_avg",
        lambda r: r.moments("up.weight")["exp_avg"].view(-1)[3].fill_(float("nan")),
    ),
    Case(
        "one square negative",
        {"moments_valid": C},
        "negative",
        lambda r: r.moments("up.weight")["exp_avg_sq"].view(-1)[3].fill_(-1.0),
    ),
    Case(
        "moments of one parameter missing",
        {"optimizer_steps": C, **TENSORS},
        "step counters",
        lambda r: _forget(r, "up.weight"),
    ),
    Case(
        "moments of all parameters missing",
        {**TENSORS, "optimizer_steps": C},
        "optim",
        lambda r: r.optimizer.state.clear(),
    ),
    Case(
        "step counters reset",
        {"optimizer_steps": C},
        "step counters",
        lambda r: [step.zero_() for step in r.all_moments("step")],
    ),
    Case(
        "step counters off by one",
        {"optimizer_steps": C},
        "step counters",
        lambda r: [step.add_(1) for step in r.all_moments("step")],
    ),
    Case(
        "one step counter off by one",
        {"optimizer_steps": C},
        "step counters",
        lambda r: r.moments("up.bias")["step"].add_(1),
    ),
    Case("step counters saved behind", {"optimizer_steps": I}, "the run 12", saved="unstepped"),
    # Weights and buffers.
    Case("a feed-forward matrix zeroed", FINGERPRINTS, "model.up.weight", lambda r: r.model.up.weight.zero_()),
    Case("one bit flipped", FINGERPRINTS, "model.up.weight", _set_bit),
    Case("zero turned into minus zero", FINGERPRINTS, "model.rest", lambda r: r.model.rest.neg_()),
    Case(
        "rows rolled by one",
        FINGERPRINTS,
        "model.down.weight",
        lambda r: r.model.down.weight.copy_(r.model.down.weight.roll(1, 0)),
    ),
    Case(
        "columns swapped",
        FINGERPRINTS,
        "model.down.weight",
        lambda r: _swap(r.model.down.weight[:, 1], r.model.down.weight[:, 9]),
    ),
    Case(
        "a duplicated half",
        FINGERPRINTS,
        "model.up.weight",
        lambda r: r.model.up.weight[16:].copy_(r.model.up.weight[:16]),
    ),
    Case(
        "two layers exchanged",
        FINGERPRINTS,
        "model.twin_a.weight",
        lambda r: _swap(r.model.twin_a.weight, r.model.twin_b.weight),
    ),
    Case("weights rounded to bfloat16", FINGERPRINTS, "parameters", lambda r: _halve(list(r.model.parameters()))),
    Case("a model cast to bfloat16 after the load", TENSORS, "lost precision", lambda r: r.model.bfloat16()),
    Case("a model built in bfloat16", {"load": "refused"}, "BF16", build={"change": lambda m: m.bfloat16()}),
    Case(
        "weights multiplied by 1.0001",
        FINGERPRINTS,
        "parameters",
        lambda r: [p.mul_(1.0001) for p in r.model.parameters()],
    ),
    Case(
        "one weight infinite",
        {"finite_weights": C},
        "model.up.weight",
        lambda r: r.model.up.weight[0, 0].fill_(float("inf")),
    ),
    Case("weights saved as NaN", {"finite_weights": C}, "model.up.weight", saved="nan"),
    Case("a buffer stale", FINGERPRINTS, "model.seen", lambda r: r.model.seen.sub_(1)),
    Case(
        "batch statistics reset", FINGERPRINTS, "model.norm.running_mean", lambda r: r.model.norm.reset_running_stats()
    ),
    Case(
        "a variance negative",
        {"buffers": C},
        "model.norm.running_var",
        lambda r: r.model.norm.running_var[0].fill_(-1.0),
    ),
    Case(
        "a computed buffer of other values",
        {"computed_buffers": W},
        "rotary",
        build={"change": lambda m: m.rotary.mul_(2)},
    ),
    Case("a computed buffer never computed", {"computed_buffers": C}, "rotary", _meta),
    Case(
        "a computed buffer with NaN", {"computed_buffers": C}, "rotary", lambda r: r.model.rotary[1].fill_(float("nan"))
    ),
    Case("tied weights untied", {"tied_weights": C}, "model.head.weight", _untie),
    Case(
        "tied weights untied when built",
        {"load": "refused"},
        "head.weight",
        build={"change": lambda m: setattr(m.head, "weight", torch.nn.Parameter(m.head.weight.detach().clone()))},
    ),
    # The model's flags and structure.
    Case("eval mode", {"train_mode": C}, "eval mode", lambda r: r.model.eval()),
    Case("dropout in eval mode", {"train_mode": C}, "drop", lambda r: r.model.drop.eval()),
    Case("BatchNorm in eval mode", {"train_mode": C}, "norm", lambda r: r.model.norm.eval()),
    Case("one plain layer in eval mode", {"train_mode": W}, "twin_a", lambda r: r.model.twin_a.eval()),
    Case("saved in eval mode and still in it", {"train_mode": W}, "eval mode", lambda r: r.model.eval(), saved="eval"),
    Case("no dropout", {"dropout": W}, "dropout", build={"model": {"dropout": 0.0}}),
    Case("dropout replaced", {"dropout": W}, "dropout", build={"change": _no_dropout_model}),
    Case("a layer frozen", {"trainable": C}, "twin_a.weight", lambda r: r.model.twin_a.requires_grad_(False)),
    Case("a layer frozen when built", {"load": "refused"}, "twin_a.weight", build={"change": _freeze}),
    Case("a layer unfrozen", {"trainable": C}, "frozen.weight", lambda r: r.model.frozen.requires_grad_(True)),
    Case("a layer unfrozen when built", {"load": "refused"}, "frozen.weight", build={"change": _unfreeze}),
    Case("vocabulary padded", {"load": "refused"}, "vocabulary", build={"model": {"vocabulary": VOCABULARY + 4}}),
    Case("hidden size changed", {"load": "refused"}, "up.weight", build={"model": {"width": 20}}),
    Case("a layer added", {"load": "refused"}, "more.weight", build={"change": _deeper}),
    Case(
        "gradients left over",
        {"gradients": C},
        "up.weight",
        lambda r: setattr(r.model.up.weight, "grad", torch.ones_like(r.model.up.weight)),
    ),
]
