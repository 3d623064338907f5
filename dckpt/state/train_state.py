"""`TrainState`: everything a training run must carry over, captured as names and live tensors, restored as a plan."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from dckpt.errors import ConfigError
from dckpt.format.accumulation import DROP_GRADIENTS, GRADIENTS, carried_micro_step, is_in_short_step
from dckpt.format.values import JsonValue, encode_value
from dckpt.state import model as model_state
from dckpt.state import optimizer as optimizer_state
from dckpt.state.gradients import capture_gradients, gradient_obstacle, plan_gradients
from dckpt.state.holders import Collected, Stateful, capture_holder, plan_holder
from dckpt.state.naming import ensure_key
from dckpt.state.optimizer import OptimizerPlan, OptimizerState
from dckpt.state.planner import Planner
from dckpt.state.progress import TrainProgress, accumulation_of, batch_of
from dckpt.state.records import Captured, Cast, CheckpointView, RestorePlan
from dckpt.state.rng import capture_rng
from dckpt.state.run_streams import RunStreams
from dckpt.state.schedule import BuiltSchedule

# Restored together or not at all: a schedule that was built on other learning rates stays wrong for good.
_MATCHED_SET = ("optim", "scheduler", "scaler")


@dataclass(slots=True)
class _StepCounter:
    """Counts optimizer steps through post-hooks that do not keep it alive."""

    count: int = 0
    handles: list[Any] = field(default_factory=list)
    __weakref__: Any = field(init=False, repr=False, compare=False)

    def attach(self, optimizer: Optimizer) -> None:
        """Count the steps of this optimizer."""
        counter = weakref.ref(self)

        def count_step(*_: Any) -> None:
            found = counter()
            if found is not None:
                found.count += 1

        self.handles.append(optimizer.register_step_post_hook(count_step))


def _remove_hooks(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


class TrainState:
    """The live objects of one run. Construction checks them and hooks the optimizers' steps; it changes nothing else.

    `model`: a Module, or a Mapping of Modules, whose keys then enter the names. `optimizer`: an Optimizer or a Mapping.
    `scheduler`, `scaler`, `data`, `progress`: anything with state_dict and load_state_dict, or a Mapping of such.
    `ema`: a Module, something with state_dict, or a Mapping of tensors. `extra`: anything of these, and plain values;
    a plain value comes back as `state.extra[key]`. `generators`: named torch or numpy generators. `mesh`: the device
    mesh of the whole job, whose coordinates name this rank. `facts`: plain values that are saved for comparison.
    `frozen_rows`: parameter name -> rows that must not train, `n` for the first n or (start, stop); each resume proves that
    they are what they were. RNG is always captured. An `ElasticDistributedSampler` in `data` is moved by
    `progress.advance()` from now on.
    """

    def __init__(
        self,
        *,
        model: nn.Module | Mapping[str, nn.Module],
        optimizer: Optimizer | Mapping[str, Optimizer] | None = None,
        scheduler: Any = None,
        scaler: Any = None,
        data: Any = None,
        progress: Any = None,
        ema: Any = None,
        generators: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
        mesh: DeviceMesh | None = None,
        facts: Mapping[str, Any] | None = None,
        frozen_rows: Mapping[str, int | tuple[int, int]] | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.scaler = scaler
        self.data = data
        self.progress = progress
        self.ema = ema
        self.generators: dict[str, Any] = dict(generators or {})
        self.extra: MutableMapping[str, Any] = extra if isinstance(extra, MutableMapping) else dict(extra or {})
        self.mesh = mesh
        self.facts: dict[str, Any] = dict(facts or {})
        self.frozen_rows = {
            name: (0, rows) if isinstance(rows, int) else (int(rows[0]), int(rows[1]))
            for name, rows in (frozen_rows or {}).items()
        }
        self._models = _by_prefix(model, what="model")
        for prefix, module in self._models.items():
            model_state.ensure_supported(module, what=f"model{_shown_key(prefix)}")
        self._optimizers = {} if optimizer is None else _by_prefix(optimizer, what="optimizer")
        for prefix, found in self._optimizers.items():
            optimizer_state.ensure_supported(found, what=f"optimizer{_shown_key(prefix)}")
        for name in ("scheduler", "scaler", "data", "progress"):
            _ensure_stateful(getattr(self, name), what=name)
        _link_data(data, progress)
        for key in self.extra:
            ensure_key(key, what="extra")
        for key in self.generators:
            ensure_key(key, what="generators")
        if mesh is not None and not isinstance(mesh, DeviceMesh):
            raise ConfigError(f"mesh: expected a torch DeviceMesh, found {type(mesh).__name__}")
        self._streams = RunStreams(self.generators)
        self.built_schedule = BuiltSchedule(scheduler, tuple(self._optimizers.values()))
        self._counter = _StepCounter()
        for found in self._optimizers.values():
            self._counter.attach(found)
        # The hooks go when the state does, so that states made in a loop do not pile up on one optimizer.
        self._release = weakref.finalize(self, _remove_hooks, self._counter.handles)
        self._release.atexit = False

    # What the run is.

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that this state has, in the order in which they are saved."""
        return ("model", *self._components(), "rng")

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        """Every optimizer, in the order of its keys; empty without one."""
        return tuple(self._optimizers.values())

    @property
    def optimizer_steps(self) -> int | None:
        """How often `step` ran on the optimizers since this state was made; None without an optimizer."""
        return self._counter.count if self._optimizers else None

    def gradient_obstacle(self) -> str | None:
        """Why the gradients of a started accumulation cannot be stored now, or None."""
        return gradient_obstacle(self._models)

    def detach_hooks(self) -> None:
        """Stop counting optimizer steps."""
        self._release()

    def mesh_axes(self) -> dict[str, int] | None:
        """Axis -> size of the device mesh, or None without one."""
        if self.mesh is None:
            return None
        sizes = tuple(self.mesh.shape)
        names = self.mesh.mesh_dim_names or tuple(f"dim{i}" for i in range(len(sizes)))
        return dict(zip(names, sizes, strict=True))

    def coordinates(self) -> dict[str, int] | None:
        """Axis -> this rank's place on it, or None without a mesh or outside of it."""
        axes = self.mesh_axes()
        if self.mesh is None or axes is None:
            return None
        place = self.mesh.get_coordinate()
        return None if place is None else dict(zip(axes, place, strict=True))

    # Saving.

    def capture(self, *, gradients: bool = False) -> Captured:
        """The state at this instant: names, live tensors, values. Communicates nothing, changes nothing.

        Call it between optimizer steps, on every rank; with `gradients` also between the micro-batches of one.
        """
        collected = Collected()
        trees: dict[str, Any] = {"model": self._capture_models(collected)}
        if self._optimizers:
            trees["optim"] = self._capture_optimizers(collected)
        for component, obj in self._holders().items():
            trees[component] = capture_holder(obj, collected, name=component, what=component)
        if gradients:
            tensors, trees[GRADIENTS] = capture_gradients(self._models, micro_step=self.progress.micro_step)
            collected.tensors += tensors
        values = {component: encode_value(tree, path=component) for component, tree in trees.items()}
        _ensure_unique([tensor.name for tensor in collected.tensors])
        # Last, so that it is the streams' state when the capture is complete, whatever a user's state_dict() drew.
        rng = {**capture_rng(self.generators), **self._streams.epoch_start(self._epoch())}
        return Captured(tuple(collected.tensors), values, collected.aliases, rng, (*values, "rng"))

    # Random streams.

    def epoch_start_rng(self) -> AbstractContextManager[bool]:
        """Make an epoch's iterators inside, in a new epoch and after a resume in the middle of one alike.

        The first time in an epoch the streams go on, and where they stood is kept and saved with every checkpoint of the
        epoch. Entered again, as after a resume, the streams stand there inside (the value is True), and afterwards where
        they stood before: so workers get their seeds and a sampler its order again, and skipping what was consumed draws what
        it drew then. The epoch is that of `progress`. On another mesh only streams that all ranks share stand there.
        """
        return self._streams.at_epoch_start(self._epoch())

    @property
    def rng_remaps(self) -> list[dict[str, Any]]:
        """One record a resume that did not give every random stream back exactly, oldest first; saved as a fact."""
        return list(self._streams.remaps)

    @property
    def rng_shared(self) -> tuple[str, ...]:
        """The random streams that were equal on all ranks when more than one rank saved this run last."""
        return self._streams.shared

    def note_rng(self, earlier: Any, remap: dict[str, Any] | None, shared: tuple[str, ...]) -> None:
        """Take over a checkpoint's `rng_remaps` and `rng_shared`, and add what this load did to the streams, if anything."""
        self._streams.note(earlier, remap, shared)

    def restore_rng(self, streams: Mapping[str, JsonValue]) -> None:
        """Set the streams given, and those of the epoch's start for `epoch_start_rng`."""
        self._streams.restore(streams, self._epoch())

    def _epoch(self) -> int:
        return getattr(self.progress, "epoch", 0)

    def _capture_models(self, collected: Collected) -> dict[str, Any]:
        extra: dict[str, Any] = {}
        seen: dict[int, str] = {}
        for prefix, module in self._models.items():
            what = f"model{_shown_key(prefix)}"
            state = model_state.read_module(module, prefix=f"model.{prefix}", seen=seen)
            tensors, found = model_state.capture_module(state, what=what)
            collected.tensors += tensors
            collected.aliases.update(state.aliases)
            extra.update(found)
        return {"is_mapping": isinstance(self.model, Mapping), "extra": extra}

    def _capture_optimizers(self, collected: Collected) -> dict[str, Any]:
        records: dict[str, Any] = {}
        for key, state in self.optimizer_states().items():
            tensors, records[key] = optimizer_state.capture_optimizer(state)
            collected.tensors += tensors
        return {"is_mapping": isinstance(self.optimizer, Mapping), "optimizers": records}

    # Restoring.

    def plan_restore(
        self,
        view: CheckpointView,
        *,
        parts: Sequence[str] | None = None,
        allow_missing: Sequence[str] = (),
        allow_unexpected: Sequence[str] = (),
        cast: Cast = "exact",
        gradients: Literal["restore", "drop"] = "restore",
    ) -> RestorePlan:
        """How the checkpoint would go into this state; nothing live is touched yet.

        Every difference is listed at once in the plan. `parts` restricts the load (`extra` stands for all extras);
        `allow_missing` and `allow_unexpected` are names with `*` as in a shell, such as `model.head.*`, and keep the
        live value or drop the saved one. `cast="allow"` converts dtypes. Optimizer, scheduler and scaler are loaded
        as one set. `gradients`: those of an accumulation in which the checkpoint was saved are restored with the progress
        (or `parts` leaves them out), or dropped; without them the accumulation begins again.
        """
        if cast not in ("exact", "allow"):
            raise ConfigError(f"cast={cast!r}: expected 'exact' or 'allow'")
        chosen = self._chosen_parts(parts, view)
        planner = Planner(view, allow_missing=allow_missing, allow_unexpected=allow_unexpected, cast=cast)
        if GRADIENTS in view.parts and gradients == "restore" and (parts is None or GRADIENTS in parts):
            chosen |= {GRADIENTS}
        planner.plan.skipped_parts = [part for part in view.parts if part not in chosen and part != "rng"]
        if "model" in chosen:
            self._plan_models(planner)
        plans = self._plan_optimizers(planner) if "optim" in chosen else []
        for component, obj in self._holders().items():
            if component in chosen:
                self._plan_holder(component, obj, planner)
        if "scheduler" in chosen and any(plan.is_reordered for plan in plans):
            planner.differ(
                "scheduler: the optimizer's groups stand in another order than saved, and a scheduler keeps its "
                "learning rates by position. Build the groups in the saved order, or leave the scheduler out"
            )
        for plan in plans:
            planner.plan.actions.append(plan.reassert_options)
        self._plan_accumulation(planner, chosen, converts=cast == "allow")
        return planner.plan

    def _plan_accumulation(self, planner: Planner, chosen: set[str], *, converts: bool) -> None:
        """After everything else: gradients, and the micro-step that they stand for in this run."""
        if GRADIENTS in chosen:
            plan_gradients(self._models, planner.decode(GRADIENTS), planner, converts=converts)
        if "progress" not in chosen or not isinstance(self.progress, TrainProgress):
            return
        found = accumulation_of(planner.decode("progress"))
        if found is None:
            return
        plan = planner.plan
        plan.saved_micro_step, saved_batch = found
        if GRADIENTS in chosen:
            micro_step = carried_micro_step(
                plan.saved_micro_step,
                saved_batch,
                batch_of(self.progress),
                is_short=is_in_short_step(planner.decode("data")),
            )
            if isinstance(micro_step, str):
                planner.differ(
                    f"{GRADIENTS}: gradients of {plan.saved_micro_step} micro-batches cannot go on in this run: {micro_step}. "
                    f"Continue with the saved batch, or begin that step again: {DROP_GRADIENTS}"
                )
                return
            plan.micro_step = micro_step
        plan.actions.append(lambda: setattr(self.progress, "micro_step", plan.micro_step))

    def _chosen_parts(self, parts: Sequence[str] | None, view: CheckpointView) -> set[str]:
        live = {part for part in self.parts if part != "rng"}
        if parts is None:
            return live
        if isinstance(parts, str):
            raise ConfigError(f"parts={parts!r}: expected a sequence of names, such as ({parts!r},)")
        extras = {part for part in live if part.startswith("extra.")}
        chosen = {part for part in parts if part not in ("rng", "extra", GRADIENTS)} | (
            extras if "extra" in parts else set()
        )
        if GRADIENTS in parts and not {"model", "progress"} & live <= chosen:
            raise ConfigError(f"parts={tuple(parts)}: {GRADIENTS} goes with model and progress. Name them too")
        unknown = sorted(chosen - live)
        if unknown:
            raise ConfigError(f"parts={tuple(parts)}: this TrainState has no {unknown}; it has {sorted(live)}")
        common = [part for part in _MATCHED_SET if part in live and part in view.parts]
        taken = [part for part in common if part in chosen]
        if taken and taken != common:
            raise ConfigError(
                f"parts={tuple(parts)}: {', '.join(common)} are restored together or not at all. Name all of them, "
                "or leave the others out of the TrainState"
            )
        return chosen

    def _plan_models(self, planner: Planner) -> None:
        record = planner.decode("model")
        if record is None:
            planner.missing("model", "a part of the TrainState, not in the checkpoint")
            return
        extra = planner.field(record, "extra", dict, component="model")
        names: set[str] = set()
        seen: dict[int, str] = {}
        for prefix, module in self._models.items():
            what = f"model{_shown_key(prefix)}"
            state = model_state.read_module(module, prefix=f"model.{prefix}", seen=seen)
            names |= state.names()
            # With several models each gets the extra state under its own key; the rest is left for the others.
            own = {name: tree for name, tree in extra.items() if name.startswith(f"model.{prefix}")}
            model_state.plan_module(state, planner, own, component="model", what=what)
        for name in sorted(set(extra) - names):
            if not any(name.startswith(f"model.{prefix}") for prefix in self._models):
                planner.unexpected(name, "extra state in the checkpoint, of a model that is not live")
        model_state.plan_unexpected(planner, names, component="model", what="model")

    def _plan_optimizers(self, planner: Planner) -> list[OptimizerPlan]:
        record = planner.decode("optim")
        if record is None:
            planner.missing("optim", "a part of the TrainState, not in the checkpoint")
            return []
        saved = planner.field(record, "optimizers", dict, component="optim")
        plans: list[OptimizerPlan] = []
        states = self.optimizer_states()
        for key, state in states.items():
            if key not in saved:
                planner.missing(state.prefix, "an optimizer of the TrainState, not in the checkpoint")
                continue
            plan = OptimizerPlan(state, saved[key], planner)
            planner.plan.actions.append(plan.attach)
            plans.append(plan)
        for key in sorted(set(saved) - set(states)):
            name = f"optim.{key}" if key else "optim"
            planner.consume(planner.unconsumed(name))
            planner.unexpected(name, "an optimizer in the checkpoint, not in the TrainState")
        for name in planner.unconsumed("optim"):
            planner.unexpected(name, "in the checkpoint, and no optimizer record refers to it")
        return plans

    def _plan_holder(self, component: str, obj: Any, planner: Planner) -> None:
        record = planner.decode(component)
        if record is None:
            planner.missing(component, "a part of the TrainState, not in the checkpoint")
            return
        plan_holder(
            obj,
            record,
            planner,
            name=component,
            what=component,
            is_fixed=component == "ema",
            replace=self._replacer(component),
        )

    def _replacer(self, component: str) -> Callable[[Any], None] | None:
        if not component.startswith("extra."):
            return None
        key = component.removeprefix("extra.")
        return lambda value: self.extra.__setitem__(key, value)

    # The parts.

    def _holders(self) -> dict[str, Any]:
        found = {
            "scheduler": self.scheduler,
            "scaler": self.scaler,
            "data": self.data,
            "progress": self.progress,
            "ema": self.ema,
        }
        present = {name: obj for name, obj in found.items() if obj is not None}
        return present | {f"extra.{ensure_key(key, what='extra')}": obj for key, obj in self.extra.items()}

    def _components(self) -> list[str]:
        return [*(["optim"] if self._optimizers else []), *self._holders()]

    def models(self) -> dict[str, nn.Module]:
        """Prefix of its names ("" or "<key>.") -> model."""
        return dict(self._models)

    def optimizer_states(self) -> dict[str, OptimizerState]:
        """Key ("" for a single one) -> optimizer, with the names of its parameters."""
        names = model_state.parameter_names(self._models)
        replicated: frozenset[int] = frozenset()
        for module in self._models.values():
            replicated |= model_state.replicated_parameters(module)
        states: dict[str, OptimizerState] = {}
        for prefix, optimizer in self._optimizers.items():
            key = prefix.removesuffix(".")
            states[key] = OptimizerState(optimizer, f"optim.{key}" if key else "optim", names, replicated)
        return states


def _by_prefix(obj: Any, *, what: str) -> dict[str, Any]:
    """{"": obj}, or {"<key>.": each} of a mapping; the prefix enters the names."""
    if isinstance(obj, Mapping):
        if not obj:
            raise ConfigError(f"{what}: the mapping is empty. Leave the argument out, or name what to save")
        return {f"{ensure_key(key, what=what)}.": item for key, item in obj.items()}
    if isinstance(obj, Sequence) and not isinstance(obj, nn.Module):
        raise ConfigError(
            f"{what}: a {type(obj).__name__} has no names. Pass a Mapping; pipeline parts are saved through "
            "torch.distributed.checkpoint with dckpt.DckptWriter"
        )
    return {"": obj}


def _shown_key(prefix: str) -> str:
    return f"[{prefix[:-1]!r}]" if prefix else ""


def _ensure_stateful(obj: Any, *, what: str) -> None:
    if obj is None or isinstance(obj, Stateful):
        return
    if isinstance(obj, Mapping) and obj:
        for key, item in obj.items():
            if not isinstance(item, Stateful):
                raise ConfigError(_not_stateful(item, f"{what}[{ensure_key(key, what=what)!r}]"))
        return
    raise ConfigError(_not_stateful(obj, what))


def _link_data(data: Any, progress: Any) -> None:
    """Samplers that want it are moved by the progress from now on; see `ElasticDistributedSampler.follow_progress`."""
    items = data.values() if isinstance(data, Mapping) else (data,)
    followers = [item for item in items if callable(getattr(item, "follow_progress", None))]
    if progress is None or not followers:
        return
    for item in followers:
        item.follow_progress(progress)
    progress.draw_from(*followers)


def _not_stateful(obj: Any, what: str) -> str:
    return (
        f"{what}: expected state_dict() and load_state_dict(), or a Mapping of such, found {type(obj).__name__}. "
        "Pass plain values as extra={...}"
    )


def _ensure_unique(names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ConfigError(f"{name}: two tensors get this name. Rename the module, the state key or the extra")
        seen.add(name)
