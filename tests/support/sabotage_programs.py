"""Programs, settings, data and histories that are not what they were, and what the validator must say to it."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.optim import lr_scheduler

import dckpt
from dckpt.resume.facts.code import code_facts
from tests.support.sabotage import (
    Case,
    Net,
    Run,
    changed_facts,
    open_run,
    reseal,
    save_run,
    sequence,
    validate,
)

C, W, I = "critical", "warning", "info"  # noqa: E741 - as in the tables of the documentation

FINGERPRINTS = {"fingerprints": C}


def _lambda(optimizer: torch.optim.Optimizer, power: float = 0.5) -> Any:
    return lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) ** -power)


def _drop_gradients(root: Path) -> Run:
    run = Run()
    with open_run(root) as checkpointer:
        checkpointer.resume(run.state)
        run.train(12)
        run.backward()
        run.progress.accumulate()
        checkpointer.save(run.state, blocking=True, gradients="drop")
    return run


def _zero(run: Run, *kinds: str, of: str | None = None) -> None:
    for held in [run.moments(of)] if of else list(run.optimizer.state.values()):
        for kind in kinds:
            held[kind].zero_()


def _next_rate(run: Run) -> None:
    rate = run.optimizer.param_groups[0]["lr"]
    for group in run.optimizer.param_groups:
        group["lr"] = rate * 0.9993


def _late_schedule(run: Run, *, is_given: bool) -> None:
    for group in run.optimizer.param_groups:
        group.pop("initial_lr")
    run.scheduler = sequence(run.optimizer)
    run.state.scheduler = run.scheduler if is_given else None


def _scaler(**changed: Any) -> Callable[[Run], object]:
    return lambda run: run.scaler.load_state_dict({**run.scaler.state_dict(), **changed})


def _earlier(run: Run) -> None:
    run.sampler.load_state_dict({**run.sampler.state_dict(), "cursor": 8})


def _beyond(run: Run) -> None:
    run.sampler._place = replace(run.sampler._place, cursor=0, epoch=run.sampler._place.epoch + 1)


def _one_group(model: Net) -> list[dict[str, Any]]:
    return [{"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": 0.1}]


def _other_order(model: Net) -> list[dict[str, Any]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
    ]


def _other_members(model: Net) -> list[dict[str, Any]]:
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    is_first = {name: p.ndim > 1 and "embed" not in name for name, p in trained}
    return [
        {"params": [p for name, p in trained if is_first[name]], "weight_decay": 0.1},
        {"params": [p for name, p in trained if not is_first[name]], "weight_decay": 0.0},
    ]


def _other_decay(model: Net) -> list[dict[str, Any]]:
    first, second = _other_order(model)
    return [{**second, "weight_decay": 0.2}, first]


def _walked_back(root: Path) -> dckpt.ResumeReport:
    run = save_run(root)
    with open_run(root) as checkpointer:
        checkpointer.resume(run.state)
        run.train(2)
        name = checkpointer.save(run.state, blocking=True).checkpoint
    for path in (root / str(name)).rglob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.unlink()
        path.write_bytes(bytes(data))
    with open_run(root) as checkpointer:
        report = checkpointer.resume(Run(seed=2).state)
        assert report is not None
        return report


def _continued_twice(root: Path) -> dckpt.ResumeReport:
    save_run(root)
    names = []
    for _ in range(2):
        run = Run()
        with open_run(root) as checkpointer:
            checkpointer.load(run.state, 12)
            run.train(2)
            names.append(checkpointer.save(run.state, blocking=True).checkpoint)
    with open_run(root) as checkpointer:
        checkpointer.rollback(str(names[0]))
        report = checkpointer.resume(Run(seed=2).state)
        assert report is not None
        return report


def _resumed(root: Path, change: Callable[[dckpt.Checkpointer], object], **options: Any) -> dckpt.ResumeReport:
    save_run(root)
    run = Run(seed=2, **options)
    with open_run(root) as checkpointer:
        change(checkpointer)
        return validate(checkpointer, run.state, checkpointer.load(run.state))


def _no_room(root: Path) -> dckpt.ResumeReport:
    return _resumed(root, lambda checkpointer: setattr(checkpointer._storage, "free_bytes", lambda: 1000))


def _mixed_steps(root: Path) -> dckpt.ResumeReport:
    """Values of one step, and the manifest and counters of another."""
    run = save_run(root)
    with open_run(root) as checkpointer:
        checkpointer.resume(run.state)
        run.train(2)
        checkpointer.save(run.state, blocking=True)
    fresh = Run(seed=2)
    with open_run(root) as checkpointer:
        loaded = checkpointer.load(fresh.state)
        checkpointer.load(fresh.state, 12)
        return validate(checkpointer, fresh.state, loaded)


def _resealed(change: Callable[[Any], Any]) -> Callable[[Path], dckpt.ResumeReport]:
    def act(root: Path) -> dckpt.ResumeReport:
        save_run(root)
        reseal(root, change)
        return _resumed_plainly(root)

    return act


def _resumed_plainly(root: Path, **options: Any) -> dckpt.ResumeReport:
    run = Run(seed=2, **options)
    with open_run(root) as checkpointer:
        return validate(checkpointer, run.state, checkpointer.load(run.state))


def _without(part: str) -> Callable[[Path], dckpt.ResumeReport]:
    """The run that resumes leaves a part out of its state."""

    def act(root: Path) -> dckpt.ResumeReport:
        save_run(root)
        run = Run(seed=2)
        state = run.state_of(**{part: None})
        with open_run(root) as checkpointer:
            return validate(checkpointer, state, checkpointer.load(state))

    return act


def _refused_without(part: str) -> Callable[[Path], dckpt.ResumeReport]:
    def act(root: Path) -> dckpt.ResumeReport:
        save_run(root)
        with open_run(root) as checkpointer:
            report = checkpointer.resume(Run(seed=2).state_of(**{part: None}))
            assert report is not None
            return report

    return act


def _no_streams(manifest: Any) -> Any:
    parts = tuple(part for part in manifest.parts if part != "rng")
    return replace(manifest, parts=parts, rng={}, rank_values=tuple(n for n in manifest.rank_values if n != "rng"))


def _switched(switch: Callable[[], object], back: Callable[[], object]) -> Callable[[Path], dckpt.ResumeReport]:
    """Saved with a switch of torch off, resumed with it on."""

    def act(root: Path) -> dckpt.ResumeReport:
        save_run(root)
        run = Run(seed=2)
        with open_run(root) as checkpointer:
            loaded = checkpointer.load(run.state)
            switch()
            try:
                return validate(checkpointer, run.state, loaded)
            finally:
                back()

    return act


def _uncommitted(root: Path) -> dckpt.ResumeReport:
    """The script lies in a work tree of git, and was changed since."""
    work = root.parent / f"{root.name}-work"
    work.mkdir()
    script = work / "train.py"
    script.write_text("lr = 1\n")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@y", "-C", str(work), *arguments], check=True)
    main = sys.modules["__main__"]
    kept = getattr(main, "__file__", None)
    try:
        main.__file__ = str(script)
        code_facts.cache_clear()
        save_run(root, facts={"code": None})
        script.write_text("lr = 2\n")
        code_facts.cache_clear()
        return _resumed_plainly(root, facts={"code": None})
    finally:
        main.__file__ = kept
        code_facts.cache_clear()


def _under_autocast(root: Path) -> dckpt.ResumeReport:
    save_run(root)
    with torch.autocast("cpu", torch.bfloat16):
        return _resumed_plainly(root)


def _facts(**changed: Any) -> dict[str, Any]:
    return {"facts": changed}


def _other_order_version(manifest: Any) -> Any:
    values = copy.deepcopy(dict(manifest.values))
    values["data"]["state"]["order_version"] = 99
    return replace(manifest, values=values)


SAVED: dict[str, Callable[[Path], object]] = {
    "plain": save_run,
    "lambda": lambda root: save_run(root, schedule=_lambda),
    "generator": lambda root: save_run(root, generators={"augment": torch.Generator().manual_seed(1)}),
    "extra": lambda root: save_run(root, extra={"notes": torch.ones(3)}),
    "ema is the weights": lambda root: save_run(
        root, before=lambda run: run.ema.module.load_state_dict(run.model.state_dict())
    ),
    "eval": lambda root: save_run(root, before=lambda run: run.model.eval()),
    "long": lambda root: save_run(root, steps=120),
    "short": lambda root: save_run(root, max_steps=12),
    "lost gradients": _drop_gradients,
    "samples": lambda root: save_run(
        root, before=lambda run: setattr(run.progress, "samples", run.progress.samples + 4)
    ),
    "zero moments": lambda root: save_run(root, before=lambda run: _zero(run, "exp_avg", "exp_avg_sq")),
    "nan": lambda root: save_run(root, before=lambda run: run.model.up.weight.data.fill_(float("nan"))),
    "unstepped": lambda root: save_run(root, before=lambda run: [step.sub_(3) for step in run.all_moments("step")]),
}

PROGRAMS = [
    # Optimizer, schedule, scaler.
    Case("learning rate off by one step", {"learning_rate": C}, "learning rate", _next_rate),
    Case(
        "learning rate of one group",
        {"learning_rate": C},
        "group 1",
        lambda r: r.optimizer.param_groups[1].update(lr=0.02),
    ),
    Case("schedule built too late", {"learning_rate": C}, "learning rate", lambda r: _late_schedule(r, is_given=True)),
    Case(
        "schedule built too late and not given",
        {"learning_rate": C},
        "learning rate",
        lambda r: _late_schedule(r, is_given=False),
    ),
    Case(
        "schedule stepped twice", {"scheduler": C, "learning_rate": C}, "stands at step", lambda r: r.scheduler.step()
    ),
    Case("schedule of another length", {"scheduler": W}, "T_max", build={"schedule": lambda o: sequence(o, total=50)}),
    Case("another warm-up", {"schedule": C}, "warm-up", build={"schedule": lambda o: sequence(o, warmup=40)}),
    Case("another base rate", {"schedule": C}, "base rate", build={"lr": 2e-2}),
    Case(
        "another function of the step",
        {"schedule": C},
        "at the saved step",
        build={"schedule": lambda o: _lambda(o, 1.0)},
        saved="lambda",
    ),
    Case(
        "another kind of schedule",
        {"scheduler": C},
        "another kind",
        build={"schedule": lambda o: lr_scheduler.StepLR(o, 3)},
    ),
    Case("schedule missing", {"parts": W}, "scheduler", act=_without("scheduler")),
    Case("schedule missing in a resume", {"load": "refused"}, "scheduler", act=_refused_without("scheduler")),
    Case("betas changed in the program", {"param_groups": W}, "betas", build={"betas": (0.9, 0.999)}),
    Case(
        "betas changed after the load",
        {"optimizer_options": C},
        "betas",
        lambda r: r.optimizer.param_groups[0].update(betas=(0.9, 0.999)),
    ),
    Case("weight decay changed in the program", {"param_groups": W}, "weight_decay", build={"groups": _other_decay}),
    Case(
        "weight decay changed after the load",
        {"optimizer_options": C},
        "weight_decay",
        lambda r: r.optimizer.param_groups[0].update(weight_decay=0.3),
    ),
    Case("groups in another order", {"load": "refused"}, "another order", build={"groups": _other_order}),
    Case("parameters in another group", {"load": "refused"}, "from saved group 1", build={"groups": _other_members}),
    Case("one group of two", {"load": "refused"}, "group", build={"groups": _one_group}),
    Case(
        "another optimizer", {"load": "refused"}, "optim.class: saved by AdamW", build={"optimizer": torch.optim.Adam}
    ),
    Case(
        "scaler switched off",
        {"load": "refused"},
        "scaler: enabled in the checkpoint, disabled live",
        build={"scaler": {"enabled": False}},
    ),
    Case("scale infinite", {"grad_scaler": C}, "scale is inf", _scaler(scale=float("inf"))),
    Case("scale no power of two", {"grad_scaler": C}, "no power of two", _scaler(scale=1000.0)),
    Case("scaler begins again", {"grad_scaler": C}, "saved", _scaler(scale=65536.0, _growth_tracker=0)),
    Case("growth tracker reset", {"grad_scaler": C}, "_growth_tracker", _scaler(_growth_tracker=0)),
    Case("scaler missing", {"grad_scaler": C}, "this run has none", act=_without("scaler")),
    # Random streams.
    Case("torch seeded after the load", {"rng_pattern": C}, "torch", lambda _: torch.manual_seed(3)),
    Case("numbers drawn after the load", {"rng_pattern": C}, "python", lambda _: random.random()),
    Case("no random streams", {"rng_complete": C}, "no random streams", act=_resealed(_no_streams)),
    Case("a generator left out", {"rng_complete": W}, "augment", saved="generator"),
    Case(
        "a generator that was not saved",
        {"rng_complete": W},
        "augment",
        build={"generators": {"augment": torch.Generator()}},
    ),
    # Settings and data.
    Case("batch 8 to 64", {"global_batch": C}, "is now", build={"batch": dckpt.Batch(micro=32, accumulation=2)}),
    Case(
        "accumulation changed", {"global_batch": C}, "2 x 4 x 1", build={"batch": dckpt.Batch(micro=2, accumulation=4)}
    ),
    Case(
        "batch split otherwise", {"global_batch": I}, "1 x 4 x 1", build={"batch": dckpt.Batch(micro=1, accumulation=4)}
    ),
    Case("data set changed", {"dataset": C}, "training data", build=_facts(dataset="files-b")),
    Case("split changed", {"split": C}, "split", build=_facts(split="split-b")),
    Case("tokenizer changed", {"tokenizer": C}, "tokenizer", build=_facts(tokenizer="words-b")),
    Case("vocabulary size changed", {"vocab_size": C}, "vocabulary size", build=_facts(vocab_size=16)),
    Case("seed changed", {"seed": W}, "seed", build=_facts(seed=8)),
    Case(
        "configuration changed", {"config": W}, "depth: 2 -> 3", build=_facts(config={"depth": 3, "log": {"every": 10}})
    ),
    Case(
        "configuration of logging changed",
        {"config": I},
        "log.every",
        build=_facts(config={"depth": 2, "log": {"every": 20}}),
    ),
    Case("code changed", {"code": W}, "commit", build=_facts(code="commit-b")),
    Case("seed of the sampler changed", {"load": "refused"}, "seed", build={"sampler": {"seed": 4}}),
    Case("data set of another size", {"load": "refused"}, "size", build={"sampler": {"dataset": 900}}),
    Case("shuffling switched off", {"load": "refused"}, "shuffle", build={"sampler": {"shuffle": False}}),
    Case(
        "another order of the samples", {"load": "refused"}, "order", act=_resealed(lambda m: _other_order_version(m))
    ),
    Case("short last steps", {"data_order": C}, "tail", build={"sampler": {"tail": "short"}}),
    Case("position in the data moved", {"data_order": C}, "position", _earlier),
    Case("position in the data lost", {"data_order": C}, "position", _beyond),
    Case(
        "position behind the data",
        {"data_order": C},
        "behind its end",
        act=_resealed(lambda m: changed_facts(data={"": {**m.facts["data"][""], "cursor": 5000}})(m)),
    ),
    Case("no data in the state", {"parts": W}, "data", act=_without("data")),
    Case("work already done", {"work_remains": C}, "no work remains", build={"max_steps": 12}),
    Case("work done by the saved limit", {"work_remains": C}, "max_steps=12", build={"max_steps": 12}, saved="short"),
    Case("hardly any work left", {"work_remains": W}, "remain", build={"max_steps": 121}, saved="long"),
    Case("count of samples wrong", {"samples": C}, "samples", saved="samples"),
    Case(
        "counter moved after the load",
        {"same_checkpoint": C},
        "stands at step 13",
        lambda r: setattr(r.progress, "step", 13),
    ),
    Case("accumulation without its gradients", {"accumulation": W}, "micro-batch", saved="lost gradients"),
    # Averages.
    Case("average missing", {"ema": C}, "missing", act=_without("ema")),
    Case("average equal to the weights", {"ema": W}, "equal to the weights", saved="ema is the weights"),
    Case(
        "average made again after the load",
        FINGERPRINTS,
        "averaged",
        lambda r: r.ema.module.load_state_dict(r.model.state_dict()),
    ),
    Case("average's counter reset", {"ema": C}, "updates", lambda r: r.ema.n_averaged.zero_()),
    # Environment and history.
    Case(
        "TF32 allowed",
        {"precision": W},
        "matmul",
        act=_switched(
            lambda: torch.set_float32_matmul_precision("high"), lambda: torch.set_float32_matmul_precision("highest")
        ),
    ),
    Case(
        "determinism switched on",
        {"precision": W},
        "deterministic",
        act=_switched(
            lambda: torch.use_deterministic_algorithms(True), lambda: torch.use_deterministic_algorithms(False)
        ),
    ),
    Case(
        "another default dtype",
        {"precision": W},
        "default_dtype",
        act=_switched(lambda: torch.set_default_dtype(torch.bfloat16), lambda: torch.set_default_dtype(torch.float32)),
    ),
    Case("autocast", {"precision": W}, "autocast", act=_under_autocast),
    Case(
        "another major version of torch",
        {"versions": W},
        "torch 1.13.1",
        act=_resealed(changed_facts(versions={"torch": "1.13.1"})),
    ),
    Case("uncommitted changes", {"code": W}, "uncommitted", act=_uncommitted),
    Case("walked back past damage", {"walked_back": W}, "damaged", act=_walked_back),
    Case("run continued twice", {"lineage": W}, "continued twice", act=_continued_twice),
    Case("no room for the next save", {"next_save": W}, "bytes are free", act=_no_room),
    Case("values of another step", FINGERPRINTS, "parameters", act=_mixed_steps),
    Case("a part left out", {"parts": W}, "extra.notes", saved="extra"),
]
