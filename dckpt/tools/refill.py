"""What a checkpoint lacks and can honestly be given: random streams by the documented rule, counters from its own facts.

Everything here is a function of records: the manifest, the records of ranks that are good, other checkpoints' manifests.
Moments are never invented: what is lost stays lost, and is said.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dckpt.errors import CorruptCheckpointError
from dckpt.format.manifest import Manifest
from dckpt.format.sealed_json import JsonValue
from dckpt.format.streams import EPOCH_PREFIX, GENERATOR_PREFIX, rekey_stream, run_seed_of
from dckpt.planning.mesh import NamedMesh

STREAMS = ("python", "numpy", "torch")
"""What every process has; further ones are only derived where something says that the run has them."""

PLAIN_SCHEDULERS = frozenset(
    {
        *("ConstantLR", "CosineAnnealingLR", "ExponentialLR", "LambdaLR", "LinearLR"),
        *("MultiStepLR", "MultiplicativeLR", "PolynomialLR", "StepLR"),
    }
)
"""Schedules whose whole state is a counter and the learning rates; the rest is what they are built with."""

_LAMBDAS = frozenset({"LambdaLR", "MultiplicativeLR"})

Action = Literal["restored", "derived", "filled in", "left behind", "lost", "not possible"]


@dataclass(frozen=True, slots=True)
class Change:
    """One line of a plan: what, what happens to it, and how that is known to be right."""

    what: str
    action: Action
    how: str

    def __str__(self) -> str:
        return f"{self.what}: {self.action}: {self.how}"


@dataclass(frozen=True, slots=True)
class NewStreams:
    """records: rank -> its streams, of those ranks that get new ones. axes: as the manifest's `rng`."""

    records: Mapping[int, Mapping[str, JsonValue]]
    axes: Mapping[str, tuple[str, ...]]
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class StreamModel:
    """What another checkpoint of the run says of its streams: over which axes each varies, and the states of its rank 0."""

    label: str
    axes: Mapping[str, tuple[str, ...]]
    states: Mapping[str, JsonValue]


def refill_streams(
    manifest: Manifest,
    mesh: NamedMesh,
    good: Mapping[int, Mapping[str, JsonValue]],
    model: StreamModel | None,
) -> NewStreams:
    """Streams for every rank that is not among `good`: copied from one at whose place they are equal, else re-derived.

    The seed of the rule is that of the lowest good rank, else of `model`, else of the facts, else of the run's id.
    """
    axes = _axes(manifest, mesh, model)
    seed, origin = _run_seed(manifest, good, model)
    like = dict(model.states) if model is not None else {}
    for states in reversed([good[rank] for rank in sorted(good)]):
        like.update(states)
    records: dict[int, dict[str, JsonValue]] = {}
    told: dict[str, list[str]] = {"copied": [], "derived": [], "lost": []}
    for rank in range(mesh.world_size):
        if rank in good:
            continue
        place = mesh.coordinates(rank)
        records[rank] = {}
        for stream, varying in axes.items():
            twin = _twin(stream, varying, place, mesh, good)
            if twin is not None:
                records[rank][stream] = good[twin][stream]
                told["copied"].append(stream)
            elif stream.startswith(EPOCH_PREFIX):
                # Where an epoch's iterators began is a fact of that epoch: another state would give another order.
                told["lost"].append(stream)
            elif stream in like or not stream.startswith(GENERATOR_PREFIX):
                records[rank][stream] = rekey_stream(
                    stream,
                    run_seed=seed,
                    generation=manifest.generation,
                    step=manifest.step or 0,
                    coordinates={axis: place[axis] for axis in varying if axis in place},
                    like=like.get(stream),
                )
                told["derived"].append(stream)
    return NewStreams(records, axes, tuple(_stream_changes(sorted(records), told, origin)))


def _stream_changes(ranks: Sequence[int], told: Mapping[str, list[str]], origin: str) -> list[Change]:
    is_all = len(ranks) > 1 and ranks == list(range(len(ranks)))
    who = "all ranks" if is_all else f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
    changes = []
    copied, derived = dict.fromkeys(told["copied"]), dict.fromkeys(told["derived"])
    if copied:
        how = f"equal on ranks whose records are good: {', '.join(copied)}"
        changes.append(Change(f"random streams of {who}", "restored", how))
    if derived:
        how = f"{', '.join(derived)}, by the rule for another mesh (seed {origin}); the draws differ from the uninterrupted run"
        changes.append(Change(f"random streams of {who}", "derived", how))
    if told["lost"]:
        how = f"{', '.join(dict.fromkeys(told['lost']))}: an epoch that is resumed in its middle replays its iterators otherwise"
        changes.append(Change(f"random streams of {who}", "not possible", how))
    return changes


def _axes(manifest: Manifest, mesh: NamedMesh, model: StreamModel | None) -> dict[str, tuple[str, ...]]:
    if manifest.rng:
        return dict(manifest.rng)
    if model is not None and model.axes:
        # Where the meshes have other axes, none of those there says which ranks here are alike.
        return {
            stream: axes if all(axis in mesh.sizes for axis in axes) else tuple(mesh.sizes)
            for stream, axes in model.axes.items()
            if not stream.startswith(EPOCH_PREFIX)
        }
    # Nothing is known: equal masks on all ranks would be the worse mistake.
    streams = (*STREAMS, "cuda") if _ran_on_cuda(manifest) else STREAMS
    return dict.fromkeys(streams, tuple(mesh.sizes))


def _ran_on_cuda(manifest: Manifest) -> bool:
    found = manifest.facts.get("versions")
    return isinstance(found, Mapping) and any(found.get(name) for name in ("cuda", "gpu", "device"))


def _twin(
    stream: str,
    axes: Sequence[str],
    place: Mapping[str, int],
    mesh: NamedMesh,
    good: Mapping[int, Mapping[str, JsonValue]],
) -> int | None:
    """A rank that had the same state: one at the same place along every axis over which the stream varies."""
    for rank in sorted(good):
        other = mesh.coordinates(rank)
        if stream in good[rank] and all(other.get(axis) == place.get(axis) for axis in axes):
            return rank
    return None


def _run_seed(
    manifest: Manifest, good: Mapping[int, Mapping[str, JsonValue]], model: StreamModel | None
) -> tuple[int, str]:
    for rank in sorted(good):
        try:
            return run_seed_of(good[rank]), f"of rank {rank}"
        except CorruptCheckpointError:
            continue  # This rank has no usable torch stream; another one's seed is as good.
    if model is not None:
        try:
            return run_seed_of(model.states), f"of {model.label}"
        except CorruptCheckpointError:
            pass  # The same: the next source decides.
    user = manifest.facts.get("user")
    seed = user.get("seed") if isinstance(user, Mapping) else None
    if type(seed) is int and 0 <= seed < 2**64:
        return seed, "of the facts"
    text = f"dckpt-repair-v1|{manifest.run_id or manifest.attempt}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"), "made from the run's id"


# -- counters ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NewValue:
    """A part's value for the manifest."""

    value: JsonValue
    change: Change


LEGS_MAX = 1000

_LEG_FACTS = (("leg", 1), ("leg_step", -1), ("leg_epoch", -1), ("leg_samples", -1))


def refill_progress(manifest: Manifest) -> NewValue | None:
    """Counters from the checkpoint's own facts and step; None if the samples are not known."""
    if manifest.step is None:
        return None
    facts = manifest.facts.get("progress")
    known = {name: value for name, value in facts.items() if type(value) is int} if isinstance(facts, Mapping) else {}
    how = "from the checkpoint's facts"
    if "samples" not in known:
        batch = _batch_samples(manifest.facts.get("batch"))
        if batch is None:
            return None
        known["samples"] = manifest.step * batch
        how = f"the step is the checkpoint's; samples are counted as {manifest.step:,} steps of {batch:,}"
    legs = _legs_from_facts(known, manifest.step)
    if legs is None:
        return None
    history = facts.get("batch_history") if isinstance(facts, Mapping) else None
    state: dict[str, Any] = {
        "epoch": 0,
        **known,
        "step": manifest.step,
        "micro_step": manifest.micro_step,
        "best_loss": None,
        "loss_history": [],
        "batch_history": history if isinstance(history, list) else [],
        "legs": legs,
        "leg_best_loss": None,
    }
    if len(legs) > 1:
        how += (
            f"; it is in leg {len(legs)}, and the names of the legs are lost: continue with resume, for start_leg with the same "
            "name would begin that leg again"
        )
    missing = "" if "epoch" in known else "; the epoch is not known and counts from 0"
    change = Change("progress", "filled in", f"{how}{missing}; the losses' history is lost")
    return NewValue({"kind": "stateful", "state": state}, change)


def _legs_from_facts(known: dict[str, int], step: int) -> list[list[Any]] | None:
    """[name, step, epoch, samples] at the beginning of each leg; takes its facts out of `known`. None if they do not add up.

    Where legs between the first and the last began is not known, and nothing counts from there.
    """
    number, *own = (known.pop(name, default) for name, default in _LEG_FACTS)
    legs: list[list[Any]] = [[None, 0, 0, 0]]
    if number == 1:
        return legs
    begin = [step - own[0], known.get("epoch", -1) - own[1], known["samples"] - own[2]]
    if not 1 < number <= LEGS_MAX or min(own) < 0 or min(begin) < 0:
        return None
    return [*(legs * (number - 1)), [None, *begin]]


def _batch_samples(batch: object) -> int | None:
    if not isinstance(batch, Mapping):
        return None
    numbers = [batch.get(name) for name in ("micro", "accumulation", "data_parallel")]
    if not all(type(number) is int and number > 0 for number in numbers):
        return None
    product = 1
    for number in numbers:
        assert isinstance(number, int)
        product *= number
    return product


def refill_scheduler(manifest: Manifest, before: Sequence[tuple[str, Manifest]]) -> NewValue | Change | None:
    """The counter and learning rates: from the facts, else from an earlier checkpoint's state, moved on.

    None if nothing says that the run has a scheduler; a `Change` if it has one that cannot be given back. `before`: other
    checkpoints of the run with their labels, the nearest first.
    """
    facts = manifest.facts.get("scheduler")
    if isinstance(facts, Mapping) and facts:
        return _scheduler_from_facts(facts)
    rates = _group_rates(manifest)
    for label, other in before:
        record = other.values.get("scheduler")
        if isinstance(record, Mapping) and other.step is not None:
            return _scheduler_from_other(manifest, rates, label, other, record)
    if any(rate[1] is not None for rate in rates):
        how = "the optimizer's groups say that there was one, and nothing says which; learning rates are in the groups"
        return Change("scheduler", "not possible", how)
    return None


def _scheduler_from_facts(facts: Mapping[str, Any]) -> NewValue | Change:
    states: dict[str, Any] = {}
    for key, one in facts.items():
        kind = one.get("class") if isinstance(one, Mapping) else None
        counter, rates = (one.get("last_epoch"), one.get("last_lr")) if isinstance(one, Mapping) else (None, None)
        if kind not in PLAIN_SCHEDULERS or type(counter) is not int or not isinstance(rates, list):
            how = f"{kind} keeps more than a counter; it restarts at the beginning of its schedule"
            return Change("scheduler", "not possible", how)
        states[key] = {"last_epoch": counter, "_step_count": counter + 1, "_last_lr": rates}
        if kind in _LAMBDAS:
            states[key]["lr_lambdas"] = [None] * len(rates)
    change = Change("scheduler", "filled in", "counter and learning rates from the checkpoint's facts")
    if set(states) == {""}:
        return NewValue({"kind": "stateful", "state": states[""]}, change)
    several: dict[str, Any] = {key: {"kind": "stateful", "state": state} for key, state in states.items()}
    return NewValue({"kind": "several", "state": several}, change)


def _scheduler_from_other(
    manifest: Manifest, rates: Sequence[tuple[Any, Any]], label: str, other: Manifest, record: Mapping[str, Any]
) -> NewValue | Change:
    """Only where the counter moves with the steps, and everything else of the state is what it was built with."""
    state = record.get("state")
    shift = (manifest.step or 0) - (other.step or 0)
    counter = state.get("last_epoch") if isinstance(state, Mapping) else None
    is_plain = (
        record.get("kind") == "stateful"
        and isinstance(state, Mapping)
        and not {"_schedulers", "best", "num_bad_epochs", "T_cur"} & set(state)
        and isinstance(state.get("_last_lr"), list)
        and len(state["_last_lr"]) == len(rates)
    )
    if not is_plain or type(counter) is not int or counter != other.step:
        how = f"the state in {label} does not say how it moves from step to step; it restarts at the beginning of its schedule"
        return Change("scheduler", "not possible", how)
    assert isinstance(state, Mapping)
    moved: dict[str, Any] = {**state, "last_epoch": counter + shift, "_last_lr": [rate for rate, _ in rates]}
    if type(state.get("_step_count")) is int:
        moved["_step_count"] = state["_step_count"] + shift
    how = f"the state in {label} moved on by {shift} steps; learning rates are those of this checkpoint's optimizer"
    return NewValue({"kind": "stateful", "state": moved}, Change("scheduler", "filled in", how))


def _group_rates(manifest: Manifest) -> list[tuple[Any, Any]]:
    """(learning rate, initial learning rate) of each group of a single optimizer."""
    optim = manifest.values.get("optim")
    optimizers = optim.get("optimizers") if isinstance(optim, Mapping) else None
    record = optimizers.get("") if isinstance(optimizers, Mapping) and len(optimizers) == 1 else None
    groups = record.get("groups") if isinstance(record, Mapping) else None
    options = (
        [group.get("options") for group in groups if isinstance(group, Mapping)] if isinstance(groups, list) else []
    )
    return [(one.get("lr"), one.get("initial_lr")) for one in options if isinstance(one, Mapping)]


# -- what stays lost ---------------------------------------------------------------------------------------------------

MOMENTS_LOST = (
    "optimizer moments are lost and are not invented: they restart at zero. Expect a loss spike; warm the learning rate up "
    "again over some hundred steps, or continue from an older checkpoint that has them"
)
"""What is said wherever moments are missing."""
