"""What an error of boto3 means for the caller. No text of a request gets into a message: it could hold a signature."""

from __future__ import annotations

import enum

from dckpt.errors import (
    StorageError,
    StorageFullError,
    StorageMissingError,
    StorageReadOnlyError,
    TransientStorageError,
)

_MISSING = frozenset(("404", "NoSuchKey", "NoSuchBucket", "NoSuchUpload", "NotFound"))
_CONDITION = frozenset(("412", "PreconditionFailed"))
_FULL = frozenset(("QuotaExceeded", "InsufficientStorage", "EntityTooLarge"))
_REFUSED = frozenset(
    (
        "401",
        "403",
        "AccessDenied",
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "ExpiredToken",
        "InvalidToken",
        "AllAccessDisabled",
    )
)
_PASSING = frozenset(
    (
        *("RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "TooManyRequests", "429"),
        *("InternalError", "ServiceUnavailable", "BadDigest", "OperationAborted", "ConditionalRequestConflict", "409"),
        *("RequestTimeTooSkewed",),
    )
)


class Trouble(enum.Enum):
    """What went wrong, by what can be done about it."""

    MISSING = "expected it there, found nothing. It was deleted or never written, or the bucket does not exist."
    CONDITION = "the condition does not hold."
    FULL = "the store is full, or the quota is used up. Free space there; the previous checkpoint stands."
    REFUSED = (
        "the store refused the credentials, or these may not do this. Check the credentials and the bucket's policy."
    )
    PASSING = "the store failed, or did not answer in time, at each of several tries. The previous checkpoint stands; try later."
    OTHER = "the store refused it."

    def error(self, operation: str, place: str, cause: BaseException) -> StorageError:
        """The typed error for `operation` on `place`, one sentence."""
        kinds: dict[Trouble, type[StorageError]] = {
            Trouble.MISSING: StorageMissingError,
            Trouble.FULL: StorageFullError,
            Trouble.REFUSED: StorageReadOnlyError,
            Trouble.PASSING: TransientStorageError,
        }
        kind = kinds.get(self, StorageError)
        return kind(f"{operation} {place}: {self.value} (Its answer: {describe(cause)}.)", key=place)


def judge(error: BaseException) -> Trouble:
    """What `error`, raised by boto3 while a request ran, means. Raises it again if it is none of the store's."""
    import botocore.exceptions as known
    import urllib3.exceptions

    if isinstance(error, known.ClientError):
        return _judge_answer(code_of(error), status_of(error))
    if isinstance(error, known.NoCredentialsError | known.PartialCredentialsError | known.CredentialRetrievalError):
        return Trouble.REFUSED
    passing = (
        known.HTTPClientError,
        known.ResponseStreamingError,
        known.ConnectionError,
        urllib3.exceptions.HTTPError,
        OSError,
    )
    if isinstance(error, passing):
        return Trouble.PASSING
    if isinstance(error, known.BotoCoreError):
        return Trouble.OTHER
    raise error


def _judge_answer(code: str, status: int) -> Trouble:
    if code in _CONDITION or status == 412:
        return Trouble.CONDITION
    if code in _FULL or status == 507:
        return Trouble.FULL
    if code in _MISSING:
        return Trouble.MISSING
    if code in _REFUSED:
        return Trouble.REFUSED
    if code in _PASSING or status >= 500 or status in (200, 409, 429):
        # 200: an error in the body of an answer that began well.
        return Trouble.PASSING
    return Trouble.REFUSED if status in (401, 403) else Trouble.OTHER


def code_of(error: BaseException) -> str:
    """The store's own word for the error, '' if there is none."""
    answer = getattr(error, "response", None)
    return str(answer.get("Error", {}).get("Code", "")) if isinstance(answer, dict) else ""


def status_of(error: BaseException) -> int:
    """The HTTP status of the answer, 0 if there was none."""
    answer = getattr(error, "response", None)
    return int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) if isinstance(answer, dict) else 0


def describe(error: BaseException) -> str:
    """The kind of the error, and the store's word and status: nothing that could hold a secret."""
    code, status = code_of(error), status_of(error)
    return f"{code or 'no code'}, HTTP status {status}" if code or status else type(error).__name__
