"""The public face: these names, each with a docstring and the parameters that the design promises."""

from __future__ import annotations

import inspect

import pytest

import dckpt

# What the design's public face names, as far as it is built.
FACE = {
    "Batch",
    "Best",
    "Checkpointer",
    "DckptReader",
    "DckptWriter",
    "ElasticDistributedSampler",
    "Every",
    "LoadResult",
    "PendingSave",
    "Probe",
    "ResumePolicy",
    "ResumeReport",
    "Retention",
    "RngState",
    "Stop",
    "TrainProgress",
    "TrainState",
    "evaluating",
    "split_indices",
}
# Further names, with what they are for.
ADDED = {
    "Continue": "what Checkpointer.step returns when it is not Stop",
    "StepAction": "the type of both, for annotations",
    "EXIT_REJECTED": "the exit code of a training script whose resume was refused",
    "EXIT_STOPPED": "the exit code of a training script after Stop",
    "DckptLoadPlanner": "planner for torch.distributed.checkpoint.load",
    "DckptSavePlanner": "planner for torch.distributed.checkpoint.save",
    "adapt_loader": "a torchdata StatefulDataLoader under dckpt's rules",
    "Split": "what split_indices returns",
    "fingerprint_files": "what identifies a data set in files",
    "SampleIndex": "an index that carries its epoch, for randomness that is keyed by sample",
    "SampleRandom": "generators of one sample",
    "SeededDataset": "a data set whose augmentation does not depend on the number of ranks and workers",
    "rng_slot": "dropout that does not depend on the number of ranks",
    "seeded_sample": "the same as a context",
    "Finding": "an entry of ResumeReport",
    "__version__": "the version",
}
PARAMETERS = {
    "Checkpointer": (
        *("root", "save", "retention", "on_save_error", "give_up_after", "deadline_s", "signals", "overlap"),
        "rewrite_every",
    ),
    "Checkpointer.step": ("state",),
    "Checkpointer.save": ("state", "step", "metrics", "blocking", "gradients"),
    "Checkpointer.resume": ("state", "policy"),
    "Checkpointer.load": ("state", "step", "parts", "allow_missing", "allow_unexpected", "cast"),
    "Checkpointer.start_leg": ("state", "scheduler", "name"),
    "Checkpointer.validate": ("state", "loaded"),
    "Checkpointer.steps": (),
    "Checkpointer.pin": ("step",),
    "Checkpointer.unpin": ("step",),
    "Checkpointer.rollback": ("step",),
    "Checkpointer.wait": (),
    "Checkpointer.close": (),
    "ResumePolicy": ("walk_back", "gradients", "rng"),
    "RngState.capture": ("generators",),
    "RngState.restore": ("generators",),
    "rng_slot": ("progress", "seed", "micro_batch"),
    "TrainProgress.accumulate": (),
    "TrainProgress.unconsumed": ("micro_batches",),
    "TrainState.epoch_start_rng": (),
    "PendingSave.wait": ("timeout_s",),
    "TrainProgress": ("max_steps", "batch"),
    "TrainProgress.advance": ("loss",),
    "Batch": ("micro", "accumulation", "data_parallel"),
    "Every": ("steps", "minutes"),
    "Retention": ("last", "every", "best", "daily"),
    "Best": ("metric",),
    "TrainState": (
        "model",
        "optimizer",
        "scheduler",
        "scaler",
        "data",
        "progress",
        "ema",
        "generators",
        "extra",
        "mesh",
        "facts",
    ),
    "evaluating": ("models", "preserve_rng"),
    "adapt_loader": ("loader", "batch"),
    "split_indices": ("items", "validation", "seed", "among"),
    "fingerprint_files": ("paths", "content"),
    "ElasticDistributedSampler": ("dataset", "batch", "seed", "rank", "shuffle", "tail", "dataset_fingerprint"),
    "DckptWriter": ("url",),
    "DckptReader": ("url",),
}


def resolve(name: str) -> object:
    found: object = dckpt
    for part in name.split("."):
        found = getattr(found, part)
    return found


def test_the_public_names_are_these() -> None:
    """A new public name is a promise: it is entered here on purpose."""
    errors = {name for name in dckpt.__all__ if name.endswith("Error")}

    assert set(dckpt.__all__) == FACE | set(ADDED) | errors
    assert len(dckpt.__all__) == len(set(dckpt.__all__))


def test_every_error_is_public() -> None:
    from dckpt import errors

    ours = {
        name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.DckptError)
    }
    assert ours == {name for name in dckpt.__all__ if name.endswith("Error")}


@pytest.mark.parametrize("name", dckpt.__all__)
def test_a_public_name_resolves_and_is_listed(name: str) -> None:
    assert getattr(dckpt, name) is getattr(dckpt, name)
    assert name in dir(dckpt)


@pytest.mark.parametrize("name", [name for name in dckpt.__all__ if name[0].isupper() and not name.startswith("EXIT_")])
def test_a_public_class_has_a_docstring_of_its_own(name: str) -> None:
    found = getattr(dckpt, name)
    kind = found if isinstance(found, type) else type(found)

    doc = kind.__dict__.get("__doc__")
    assert doc and not doc.startswith(f"{kind.__name__}("), f"{name} has no docstring, or only a dataclass's own"


@pytest.mark.parametrize("name", [name for name in PARAMETERS if "." in name or name.islower()])
def test_a_public_function_has_a_docstring(name: str) -> None:
    assert inspect.getdoc(resolve(name))


@pytest.mark.parametrize(
    "name", ["Checkpointer", "ElasticDistributedSampler", "PendingSave", "TrainProgress", "TrainState"]
)
def test_every_public_method_has_a_docstring(name: str) -> None:
    for member, found in vars(getattr(dckpt, name)).items():
        if not member.startswith("_") and (inspect.isfunction(found) or isinstance(found, property)):
            assert inspect.getdoc(found), f"{name}.{member} has no docstring"


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_promised_parameters_are_taken(name: str) -> None:
    taken = inspect.signature(resolve(name)).parameters  # type: ignore[arg-type]

    missing = [parameter for parameter in PARAMETERS[name] if parameter not in taken]
    assert not missing, f"{name}({', '.join(taken)}) does not take {missing}"


def test_settings_are_keyword_only() -> None:
    """A positional setting could never be reordered or dropped."""
    for name in ("Checkpointer", "ElasticDistributedSampler", "TrainState", "TrainProgress", "Every"):
        kinds = list(inspect.signature(getattr(dckpt, name)).parameters.values())
        settings = kinds[1:] if name in ("Checkpointer", "ElasticDistributedSampler") else kinds
        assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in settings), name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Checkpointr'"):
        _ = dckpt.Checkpointr
