"""An object that only one of several writers creates: the conditional create, and what its answers mean."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable

from dckpt.errors import KeyExistsError, StorageError, StorageMissingError, UnknownOutcomeError
from dckpt.storage.base import TEMPORARY_PREFIX
from dckpt.storage.object_client import ObjectClient, Put

logger = logging.getLogger(__name__)

_PAUSE_S = 0.3


class ExclusiveCreator:
    """Creates objects exclusively. Whether the store honours the condition is asked once, before the first one."""

    def __init__(self, client: ObjectClient, prefix: str, *, patience_s: float = 60.0) -> None:
        """`prefix` is where a probe object may lie for a moment; `patience_s` how long an unclear answer is looked into."""
        self._client = client
        self._prefix = prefix
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._is_honest: bool | None = None

    def create(self, key: str, data: bytes) -> None:
        """The object holds `data`, durably.

        `KeyExistsError` if the key is taken by something else, and what is there stays (with a store that ignores the
        condition: most probably). `UnknownOutcomeError` if it could not be established.
        """
        if not self._honours_condition() and self._client.head(key) is not None:
            raise self._taken(key)
        deadline = time.monotonic() + self._patience_s
        was_unclear = False
        while True:
            answer = self._client.put_if_absent(key, data)
            if answer is Put.CREATED and self._is_honest:
                return
            if answer is Put.TAKEN and not was_unclear:
                raise self._taken(key)
            # An earlier request of ours may have arrived although its answer was lost: the content decides.
            was_unclear = True
            found = self._read_back(key, deadline)
            if found is not None:
                if found == data:
                    return
                raise self._taken(key)
            if time.monotonic() >= deadline:
                raise self._unknown(key, "nothing is there yet, but a request may still be under way")
            time.sleep(_PAUSE_S)

    def _honours_condition(self) -> bool:
        with self._lock:
            if self._is_honest is None:
                self._is_honest = self._probe()
            return self._is_honest

    def _probe(self) -> bool:
        key = f"{self._prefix}{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
        try:
            answers = [self._client.put_if_absent(key, data) for data in (b"first", b"second")]
            if Put.UNCLEAR in answers:
                # Tells nothing, and reading back is right with any store; the next process asks again.
                return False
            is_honest = answers == [Put.CREATED, Put.TAKEN]
        finally:
            self._forget(key)
        if not is_honest:
            logger.warning(
                "%s ignores the condition of a create (If-None-Match: *). Checkpoints stay whole, but two jobs that write "
                "into one run at the same moment may both be told that they committed: let only one job write.",
                self._client.locate(self._prefix),
            )
        return is_honest

    def _forget(self, key: str) -> None:
        try:
            self._client.delete([key])
        except StorageError as error:
            # A temporary name that stays is ignored by every reader and swept later.
            logger.warning("left behind %s: %s", self._client.locate(key), error)

    def _read_back(self, key: str, deadline: float) -> bytes | None:
        while True:
            try:
                return self._client.get(key)[1]
            except StorageMissingError:
                return None
            except StorageError as error:
                if time.monotonic() >= deadline:
                    raise self._unknown(key, f"and what is there could not be read ({error})") from error
            time.sleep(_PAUSE_S)

    def _taken(self, key: str) -> KeyExistsError:
        place = self._client.locate(key)
        return KeyExistsError(
            f"Create {place}: expected a free name, found an object there. It was not changed; choose another name.",
            key=place,
        )

    def _unknown(self, key: str, what: str) -> UnknownOutcomeError:
        place = self._client.locate(key)
        return UnknownOutcomeError(
            f"Create {place}: the store gave no clear answer within {self._patience_s:g} s, {what}. Nothing is cleaned up; "
            "the next save is a new attempt.",
            key=place,
        )


def quietly(call: Callable[[], object], what: str) -> None:
    """Runs `call`, tidying that no promise hangs on; a failure is logged, and a sweep finds what is left."""
    try:
        call()
    except StorageError as error:
        # Where this is called, the outcome is settled already and must not be changed by the tidying.
        logger.warning("%s: %s", what, error)
