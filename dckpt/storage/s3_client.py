"""Objects on S3 and everything that speaks its protocol, by boto3 from worker threads.

boto3 and not a faster client, because a file is written in numbered parts in any order, straight from the thread that
filled a part, uploads that were left behind can be listed and aborted, it works in a forked process, and credentials,
profiles and endpoints come from where every AWS tool looks for them. Retries are ours: the library tries once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from dckpt.errors import ConfigError, CorruptCheckpointError, StorageError, StorageMissingError, TransientStorageError
from dckpt.storage.object_client import Listing, Put, StoredObject
from dckpt.storage.s3_errors import Trouble, judge
from dckpt.storage.s3_retry import Backoff

T = TypeVar("T")

_OPTIONS = ("endpoint", "region", "profile", "addressing")
_DELETED_AT_ONCE = 1000
_SLICE_BYTES = 2**20
_CONNECTIONS_MAX = 32


class S3Client:
    """An `ObjectClient` for one bucket."""

    part_bytes_min = 5 * 2**20
    parts_max = 10_000
    copy_bytes_max = 5 * 2**30

    def __init__(
        self, bucket: str, options: Mapping[str, str], *, request_s: float = 30.0, patience_s: float = 180.0
    ) -> None:
        """`request_s`: silence of the store after which a request is given up; `patience_s`: for all tries of a call."""
        unknown = sorted(set(options) - set(_OPTIONS))
        if unknown:
            # The name alone: what follows it may be a secret that somebody put into the URL.
            raise ConfigError(
                f"s3://{bucket}: expected the options {', '.join(_OPTIONS)}, found {unknown[0]!r}. Credentials come from the "
                "environment, a profile or the machine's role, never from a URL."
            )
        if options.get("addressing", "auto") not in ("auto", "path", "virtual"):
            raise ConfigError(
                f"s3://{bucket}: expected addressing=path, virtual or auto, found {options['addressing']!r}."
            )
        self._bucket = bucket
        self._options = dict(options)
        self._request_s = request_s
        self._backoff = Backoff(patience_s)
        self._lock = threading.Lock()
        self._made: tuple[int, Any] | None = None

    def locate(self, key: str) -> str:
        return f"s3://{self._bucket}/{key}" if key else f"s3://{self._bucket}"

    # --- reading

    def head(self, key: str) -> StoredObject | None:
        try:
            found = self._call("look at", key, lambda s3: s3.head_object(Bucket=self._bucket, Key=key))
        except StorageMissingError:
            return None
        return _stored(key, found, found["ContentLength"])

    def get(self, key: str) -> tuple[StoredObject, bytes]:
        def read(s3: Any) -> tuple[StoredObject, bytes]:
            found = s3.get_object(Bucket=self._bucket, Key=key)
            with found["Body"] as body:
                data = body.read()
            return _stored(key, found, len(data)), data

        return self._call("read", key, read)

    def get_into(self, item: StoredObject, offset: int, target: memoryview) -> int:
        done = 0
        while done < len(target):
            # A body that broke off is taken up where it ended; only a call without any progress counts as a failed try.
            count = self._call("read", item.key, lambda s3: self._get_some(s3, item, offset + done, target[done:]))  # noqa: B023
            if count == 0:
                break
            done += count
        return done

    def _get_some(self, s3: Any, item: StoredObject, offset: int, target: memoryview) -> int:
        import botocore.exceptions

        if offset >= item.size:
            return 0
        wanted = f"bytes={offset}-{offset + len(target) - 1}"
        found = s3.get_object(Bucket=self._bucket, Key=item.key, Range=wanted, IfMatch=item.tag)
        done = 0
        with found["Body"] as body:
            try:
                while done < len(target):
                    count = body.readinto(target[done : done + _SLICE_BYTES])
                    if not count:
                        break
                    done += count
            except (botocore.exceptions.BotoCoreError, OSError):
                if not done:
                    raise
        return done

    def list(self, prefix: str, *, deep: bool = False) -> Listing:
        objects: list[StoredObject] = []
        prefixes: list[str] = []
        for page in self._pages(prefix, "" if deep else "/"):
            objects += [_stored(item["Key"], item, item["Size"]) for item in page.get("Contents", ())]
            prefixes += [item["Prefix"] for item in page.get("CommonPrefixes", ())]
        return Listing(tuple(objects), tuple(prefixes))

    def _pages(self, prefix: str, delimiter: str) -> Iterator[dict[str, Any]]:
        more: dict[str, str] = {"Delimiter": delimiter} if delimiter else {}
        while True:
            page = self._call("list", prefix, lambda s3: s3.list_objects_v2(Bucket=self._bucket, Prefix=prefix, **more))
            yield page
            if not page.get("IsTruncated"):
                return
            more["ContinuationToken"] = page["NextContinuationToken"]

    def has_any(self, prefix: str) -> bool:
        found = self._call("list", prefix, lambda s3: s3.list_objects_v2(Bucket=self._bucket, Prefix=prefix, MaxKeys=1))
        return bool(found.get("Contents"))

    # --- writing

    def put(self, key: str, data: bytes) -> None:
        self._call("write", key, lambda s3: s3.put_object(Bucket=self._bucket, Key=key, Body=data))

    def put_if_absent(self, key: str, data: bytes) -> Put:
        try:
            self._client().put_object(Bucket=self._bucket, Key=key, Body=data, IfNoneMatch="*")
        except Exception as error:
            trouble = judge(error)
            if trouble is Trouble.CONDITION:
                return Put.TAKEN
            if trouble is Trouble.PASSING:
                return Put.UNCLEAR
            raise trouble.error("create", self.locate(key), error) from error
        return Put.CREATED

    def copy(self, source: str, target: str) -> None:
        place = {"Bucket": self._bucket, "Key": source}
        self._call("copy", source, lambda s3: s3.copy_object(Bucket=self._bucket, Key=target, CopySource=place))

    def delete(self, keys: Iterable[str]) -> None:
        rest = list(keys)
        while rest:
            batch, rest = rest[:_DELETED_AT_ONCE], rest[_DELETED_AT_ONCE:]
            wanted = {"Objects": [{"Key": key} for key in batch], "Quiet": True}
            found = self._call("delete", batch[0], lambda s3: s3.delete_objects(Bucket=self._bucket, Delete=wanted))  # noqa: B023
            failed = found.get("Errors", ())
            if failed:
                place = self.locate(failed[0].get("Key", ""))
                raise TransientStorageError(
                    f"Delete {place}: the store answered {failed[0].get('Code', 'with an error')} ({len(failed):,} objects "
                    "stay). Try again; check that the credentials may delete.",
                    key=place,
                )

    def begin_upload(self, key: str) -> str:
        found = self._call("begin", key, lambda s3: s3.create_multipart_upload(Bucket=self._bucket, Key=key))
        return str(found["UploadId"])

    def put_part(self, key: str, upload: str, number: int, data: bytearray) -> str:
        where = {"Bucket": self._bucket, "Key": key, "UploadId": upload, "PartNumber": number}
        return str(self._call("write", key, lambda s3: s3.upload_part(**where, Body=data))["ETag"])

    def complete_upload(self, key: str, upload: str, tags: Mapping[int, str]) -> None:
        parts = {"Parts": [{"PartNumber": number, "ETag": tags[number]} for number in sorted(tags)]}
        where = {"Bucket": self._bucket, "Key": key, "UploadId": upload}
        self._call("finish", key, lambda s3: s3.complete_multipart_upload(**where, MultipartUpload=parts))

    def abort_upload(self, key: str, upload: str) -> None:
        where = {"Bucket": self._bucket, "Key": key, "UploadId": upload}
        try:
            self._call("abort", key, lambda s3: s3.abort_multipart_upload(**where))
        except StorageMissingError:
            # Completed or aborted by a request whose answer was lost.
            return

    def abort_uploads(self, prefix: str) -> int:
        count = 0
        more: dict[str, str] = {}
        while True:
            page = self._call(
                "list",
                prefix,
                lambda s3: s3.list_multipart_uploads(Bucket=self._bucket, Prefix=prefix, **more),  # noqa: B023
            )
            for item in page.get("Uploads", ()):
                if item["Key"].startswith(prefix):
                    self.abort_upload(item["Key"], item["UploadId"])
                    count += 1
            if not page.get("IsTruncated"):
                return count
            more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    # --- parts

    def _call(self, operation: str, key: str, request: Callable[[Any], T]) -> T:
        """The result of `request`, repeated while it fails in a way that may pass and there is time."""
        place = self.locate(key)
        for attempt in self._backoff.tries():
            try:
                result = request(self._client())
            except StorageError:
                raise
            except Exception as error:
                trouble = judge(error)
                if trouble is Trouble.CONDITION:
                    raise _replaced(place) from error
                if trouble is not Trouble.PASSING or not attempt.wait(error):
                    raise trouble.error(operation, place, error) from error
            else:
                return result
        raise AssertionError("the last try returns or raises")

    def _client(self) -> Any:
        """One client a process: connections that were opened before a fork belong to the parent."""
        with self._lock:
            if self._made is None or self._made[0] != os.getpid():
                self._made = (os.getpid(), self._make())
            return self._made[1]

    def _make(self) -> Any:
        try:
            import boto3
            import botocore.config
        except ImportError as error:
            raise ConfigError(
                f"s3://{self._bucket}: expected the package boto3, found it missing. Install it with `pip install 'dckpt[s3]'`."
            ) from error
        config = botocore.config.Config(
            retries={"total_max_attempts": 1, "mode": "standard"},
            connect_timeout=min(10.0, self._request_s),
            read_timeout=self._request_s,
            max_pool_connections=_CONNECTIONS_MAX,
            # Several stores refuse the trailers of the default; blocks have checksums of ours.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": self._options.get("addressing", "auto"), "payload_signing_enabled": False},
        )
        session = boto3.session.Session(
            profile_name=self._options.get("profile"), region_name=self._options.get("region")
        )
        return session.client("s3", endpoint_url=self._options.get("endpoint"), config=config)


def _stored(key: str, answer: Mapping[str, Any], size: int) -> StoredObject:
    return StoredObject(key, size, answer["LastModified"].timestamp(), answer["ETag"])


def _replaced(place: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"{place}: expected the object that was opened, found another one. Somebody overwrites checkpoints.",
        key=place,
        field="tag",
        expected="the same ETag",
        found="another ETag",
    )


_clients: dict[tuple[str, tuple[tuple[str, str], ...]], S3Client] = {}
_clients_lock = threading.Lock()


def s3_client(bucket: str, options: Mapping[str, str]) -> S3Client:
    """The client of this process for the bucket and options; its connections serve everything that is opened there."""
    with _clients_lock:
        key = (bucket, tuple(sorted(options.items())))
        if key not in _clients:
            _clients[key] = S3Client(bucket, options)
        return _clients[key]
