"""Every error that dckpt raises, grouped by what the caller does next.

::

    DckptError
      ConfigError (ValueError)                    fix the argument that the message names
      CheckpointNotFoundError (FileNotFoundError) start fresh, or name another step
      CommitConflictError (FileExistsError)       stop: another job writes into this run
      CorruptCheckpointError                      use an older step; `dckpt verify` shows the damage
      FormatVersionError                          upgrade dckpt
      IncompatibleStateError                      fix the model, or load partially and say so
      ResumeRejectedError                         read the report; allow the finding by name, or stop
      PoisonedStateError                          load again: the live tensors are half old, half new
      StorageError (OSError)                      see the subclass
        StorageFullError                          free space
        StorageReadOnlyError                      mount or permissions
        StorageMissingError                       the file or directory is not there
        KeyExistsError                            the name is taken
        TransientStorageError                     retried already; try later
        UnknownOutcomeError                       the commit may or may not have happened; nothing is cleaned up
      PeerFailedError                             another rank failed; the previous checkpoint stands
      CoordinationTimeoutError (TimeoutError)     ranks did not come; they are named
      SaveNotFinishedError                        a pending save outlived the wait

Errors cross ranks as text (`to_wire`, `from_wire`), never as pickles: an exception that does not unpickle leaves the
other ranks hanging (torch/distributed/checkpoint/utils.py does that).
"""

from __future__ import annotations

from typing import Any


class DckptError(Exception):
    """Base of all errors. `message` is one line: what failed, expected, found, what to do."""

    field_names: tuple[str, ...] = ()

    def __init__(self, message: str, **fields: Any) -> None:
        unknown = set(fields) - set(self.field_names)
        assert not unknown, f"{type(self).__name__} has no fields {sorted(unknown)}"
        super().__init__(message)
        self.message = message
        for name in self.field_names:
            setattr(self, name, fields.get(name))

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.message, self.fields()))

    def fields(self) -> dict[str, Any]:
        """The error's facts by name, as given to the constructor."""
        return {name: getattr(self, name) for name in self.field_names}


def _rebuild(kind: type[DckptError], message: str, fields: dict[str, Any]) -> DckptError:
    return kind(message, **fields)


class ConfigError(DckptError, ValueError):
    """An argument is wrong; the message names it and the remedy."""


class CheckpointNotFoundError(DckptError, FileNotFoundError):
    """No such committed checkpoint."""


class CommitConflictError(DckptError, FileExistsError):
    """Another writer owns this run or this name, proven by its generation or attempt."""


class CorruptCheckpointError(DckptError):
    """A checksum, a size or a structure differs. `key` is the file, `field` the place in it."""

    field_names = ("key", "field", "expected", "found")
    key: str | None
    field: str | None


class FormatVersionError(DckptError):
    """The file's major version is newer than this dckpt reads."""


class IncompatibleStateError(DckptError):
    """The checkpoint does not fit the live state; `differences` lists every one of them."""

    field_names = ("differences",)
    differences: list[str]


class ResumeRejectedError(DckptError):
    """The validator refused to continue; `report` is the JSON form of the `ResumeReport`."""

    field_names = ("report",)


class PoisonedStateError(DckptError):
    """A load failed after it touched live tensors; saving them is refused until a load succeeds."""


class StorageError(DckptError, OSError):
    """The storage failed. `code` is the errno, `key` the file."""

    field_names = ("key", "code")
    key: str | None
    code: int | None


class StorageFullError(StorageError):
    """No space, no inodes or no quota left."""


class StorageReadOnlyError(StorageError):
    """The place cannot be written: read-only file system, or permissions."""


class StorageMissingError(StorageError):
    """The file or directory is not there."""


class KeyExistsError(StorageError):
    """An exclusive create found the name taken."""


class TransientStorageError(StorageError):
    """The storage failed in a way that may pass; it was already retried."""


class UnknownOutcomeError(StorageError):
    """The commit may or may not have taken effect. Nothing may be cleaned up on its account."""


class PeerFailedError(DckptError):
    """Another rank failed. `rank` and `phase` say which and where; `cause` is its error's type name."""

    field_names = ("rank", "phase", "cause")
    rank: int | None
    phase: str | None
    cause: str | None


class CoordinationTimeoutError(DckptError, TimeoutError):
    """Ranks did not arrive before the deadline. `ranks` and `phase` say who and where."""

    field_names = ("ranks", "phase")
    ranks: list[int]
    phase: str | None


class SaveNotFinishedError(DckptError):
    """A pending save outlived the wait. `step` says which."""

    field_names = ("step",)


def _tree(kind: type[DckptError]) -> list[type[DckptError]]:
    return [kind, *(found for child in kind.__subclasses__() for found in _tree(child))]


def to_wire(error: BaseException) -> dict[str, Any]:
    """The JSON form of `error`, for another rank to read. Errors that are not ours keep their type's name in the text."""
    if isinstance(error, DckptError):
        return {"type": type(error).__name__, "message": error.message, "fields": error.fields()}
    text = str(error)
    return {"type": "", "message": f"{type(error).__name__}: {text}" if text else type(error).__name__, "fields": {}}


def from_wire(record: dict[str, Any]) -> DckptError:
    """The error that `to_wire` described; an unknown type becomes a plain `DckptError` with the same sentence."""
    kinds = {kind.__name__: kind for kind in _tree(DckptError)}
    kind = kinds.get(record["type"], DckptError)
    known = {name: value for name, value in record["fields"].items() if name in kind.field_names}
    return kind(record["message"], **known)
