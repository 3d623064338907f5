"""The error tree: its shape, its builtin bases, and the way of each error through a pickle and over the wire."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

from dckpt import errors
from dckpt.errors import DckptError, StorageError, from_wire, to_wire

# Error -> (parent in the tree, builtin that `except` clauses may know it by).
TREE: dict[str, tuple[str, type[BaseException]]] = {
    "ConfigError": ("DckptError", ValueError),
    "CheckpointNotFoundError": ("DckptError", FileNotFoundError),
    "CommitConflictError": ("DckptError", FileExistsError),
    "CorruptCheckpointError": ("DckptError", Exception),
    "FormatVersionError": ("DckptError", Exception),
    "IncompatibleStateError": ("DckptError", Exception),
    "ResumeRejectedError": ("DckptError", Exception),
    "PoisonedStateError": ("DckptError", Exception),
    "StorageError": ("DckptError", OSError),
    "StorageFullError": ("StorageError", OSError),
    "StorageReadOnlyError": ("StorageError", OSError),
    "StorageMissingError": ("StorageError", OSError),
    "KeyExistsError": ("StorageError", OSError),
    "TransientStorageError": ("StorageError", OSError),
    "UnknownOutcomeError": ("StorageError", OSError),
    "PeerFailedError": ("DckptError", Exception),
    "CoordinationTimeoutError": ("DckptError", TimeoutError),
    "SaveNotFinishedError": ("DckptError", Exception),
}
SENTENCE = "Save of step 100: expected 4 ranks, found 3. Start rank 2; \u2028 100 % {braces} 'quotes'."
VALUES = {
    "key": "step-0000000100.g0001/rank00000.safetensors",
    "field": "files[3].size",
    "expected": "4096",
    "found": "17",
    "differences": ["model.a: missing", "model.b: shape [2] != [3]"],
    "report": {"findings": [{"check": "global_batch", "severity": "critical"}]},
    "code": 28,
    "rank": 3,
    "phase": "write",
    "cause": "StorageFullError",
    "ranks": [1, 2, 3],
    "step": 100,
}


def tree_of(kind: type[DckptError]) -> list[type[DckptError]]:
    return [kind, *(found for child in kind.__subclasses__() for found in tree_of(child))]


def make(name: str) -> DckptError:
    kind = getattr(errors, name)
    return kind(SENTENCE, **{field: VALUES[field] for field in kind.field_names})


def test_the_tree_holds_exactly_these_errors() -> None:
    ours = {kind.__name__ for kind in tree_of(DckptError) if kind.__module__ == "dckpt.errors"}

    assert ours == {"DckptError", *TREE}


@pytest.mark.parametrize("name", TREE)
def test_each_error_has_its_place_and_its_builtin_base(name: str) -> None:
    kind = getattr(errors, name)
    parent, builtin = TREE[name]

    assert kind.__bases__[0] is getattr(errors, parent)
    assert issubclass(kind, builtin)
    assert kind.__doc__


@pytest.mark.parametrize("name", ["DckptError", *TREE])
def test_an_error_survives_pickling_and_copying_with_its_fields(name: str) -> None:
    """User code and launchers pickle exceptions; an error that does not unpickle leaves the others hanging."""
    error = make(name)

    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is type(error)
        assert str(again) == again.message == SENTENCE
        assert again.fields() == error.fields()


@pytest.mark.parametrize("name", ["DckptError", *TREE])
def test_an_error_survives_the_wire_with_its_fields(name: str) -> None:
    error = make(name)

    again = from_wire(json.loads(json.dumps(to_wire(error))))

    assert type(again) is type(error)
    assert str(again) == SENTENCE
    assert again.fields() == error.fields()


@pytest.mark.parametrize("name", ["DckptError", *TREE])
def test_fields_that_are_not_given_are_none(name: str) -> None:
    kind = getattr(errors, name)

    assert all(value is None for value in kind(SENTENCE).fields().values())


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(AssertionError, match="rank"):
        StorageError(SENTENCE, rank=3)


def test_a_foreign_exception_keeps_its_type_in_the_sentence() -> None:
    again = from_wire(json.loads(json.dumps(to_wire(KeyError("weight")))))

    assert type(again) is DckptError
    assert str(again) == "KeyError: 'weight'"


def test_an_error_of_a_newer_version_keeps_its_sentence() -> None:
    """Ranks may run different patch versions for a moment: an unknown type must not hide the message."""
    again = from_wire({"type": "QuotaError", "message": SENTENCE, "fields": {"quota": 5}})

    assert type(again) is DckptError
    assert str(again) == SENTENCE


def test_a_field_of_a_newer_version_is_left_out() -> None:
    again = from_wire({"type": "StorageFullError", "message": SENTENCE, "fields": {"key": "a", "quota": 5}})

    assert again.fields() == {"key": "a", "code": None}


def test_builtin_handlers_catch_what_they_should() -> None:
    for name, builtin in (("StorageFullError", OSError), ("CoordinationTimeoutError", TimeoutError)):
        with pytest.raises(builtin) as caught:
            raise make(name)
        assert str(caught.value) == SENTENCE
