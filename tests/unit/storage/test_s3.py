"""The S3 client: what its errors mean, how long it tries, what it never says; over a real server where there is one."""

from __future__ import annotations

import itertools
import os
import socket
import uuid

import pytest

from dckpt.errors import ConfigError, StorageError, StorageReadOnlyError, TransientStorageError
from dckpt.storage.opening import open_storage
from dckpt.storage.s3_client import S3Client
from dckpt.storage.s3_retry import Backoff
from tests.support.object_server import BUCKET, SECRET, ObjectServer


class Answer(Exception):
    """An error with an answer of the store, as boto3 raises it."""

    def __init__(self, code: str, status: int, headers: dict[str, str] | None = None) -> None:
        self.response = {
            "Error": {"Code": code},
            "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": headers or {}},
        }


class Time:
    def __init__(self) -> None:
        self.now, self.slept = 0.0, []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def pauses(error: BaseException, *, patience_s: float = 100.0, count: int = 100) -> list[float]:
    time = Time()
    backoff = Backoff(patience_s, clock=time.clock, sleep=time.sleep, draw=lambda: 1.0)
    for attempt in itertools.islice(backoff.tries(), count):
        if not attempt.wait(error):
            break
    return time.slept


def test_pauses_double_up_to_a_bound_and_end_before_the_deadline():
    slept = pauses(Answer("InternalError", 500))

    assert slept[:4] == [0.1, 0.2, 0.4, 0.8]
    assert max(slept) == 10.0
    assert sum(slept) < 100


def test_retry_after_is_respected_within_a_bound():
    assert pauses(Answer("SlowDown", 503, {"retry-after": "7"}), count=1) == [7.0]
    assert pauses(Answer("SlowDown", 503, {"retry-after": "100000"}), count=1) == [60.0]
    assert pauses(Answer("SlowDown", 503, {"retry-after": "soon"}), count=1) == [0.1]


def test_one_call_that_is_told_to_slow_down_holds_back_all_others():
    time = Time()
    backoff = Backoff(100, clock=time.clock, sleep=lambda _: None, draw=lambda: 1.0)
    next(iter(backoff.tries())).wait(Answer("SlowDown", 503, {"retry-after": "5"}))
    backoff.sleep = time.sleep
    next(iter(backoff.tries()))

    assert time.slept == [5.0]


@pytest.mark.parametrize("option", ["secret=hunter2", "aws_secret_access_key=hunter2", "addressing=odd&region=hunter2"])
def test_options_that_are_none_are_refused_without_their_values(option: str):
    with pytest.raises(ConfigError) as caught:
        open_storage(f"s3://bucket/run?{option}")

    assert "hunter2" not in str(caught.value)


def test_the_url_keeps_its_options():
    url = "s3://bucket/run?endpoint=http%3A%2F%2F127.0.0.1%3A9&region=us-east-1&addressing=path"

    assert open_storage(url).url == url


def test_a_store_that_does_not_listen_or_answer_is_an_error_by_the_deadline():
    pytest.importorskip("boto3", reason="pip install 'dckpt[s3]'")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        refused = silent.getsockname()[1]
        options = {"endpoint": f"http://127.0.0.1:{refused}", "region": "us-east-1", "addressing": "path"}
        with pytest.raises(TransientStorageError, match="s3://bucket/key"):
            S3Client("bucket", options, request_s=0.5, patience_s=1).head("key")
        silent.listen()
        with pytest.raises(TransientStorageError):
            S3Client("bucket", options, request_s=0.5, patience_s=1).head("key")


def test_a_wrong_secret_is_refused_at_once_and_never_shown(object_server: ObjectServer, caplog, monkeypatch):
    if object_server.kind == "moto":
        pytest.skip("moto checks no signature")
    caplog.set_level("DEBUG", logger="dckpt")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-right-one")
    client = S3Client(BUCKET, {"endpoint": object_server.endpoint, "region": "us-east-1", "addressing": "path"})

    with pytest.raises(StorageReadOnlyError) as caught:
        client.put("key", b"data")

    assert "SignatureDoesNotMatch" in str(caught.value)
    for text in (str(caught.value), caplog.text):
        assert "not-the-right-one" not in text
        assert SECRET not in text


def test_a_missing_bucket_is_an_error_that_names_it(object_server: ObjectServer):
    client = S3Client(
        "nowhere-at-all", {"endpoint": object_server.endpoint, "region": "us-east-1", "addressing": "path"}
    )

    with pytest.raises(StorageError, match="nowhere-at-all"):
        client.put("key", b"data")


def test_a_file_of_many_parts_is_whole_in_any_order_and_an_abandoned_one_leaves_no_upload(object_server: ObjectServer):
    storage = open_storage(object_server.url(uuid.uuid4().hex))
    storage.ensure_root()
    part = 16 * 2**20
    data = os.urandom(2**20) * 35
    writer = storage.create_file("file", is_large=True)
    for begin in (2 * part, 0, part):
        writer.write_at(begin, memoryview(data)[begin : begin + part])
    writer.finish(len(data))
    left = storage.create_file("left", is_large=True)
    left.write_at(0, memoryview(data)[:part])
    left.abandon()
    target = bytearray(len(data))
    with storage.open_reader("file") as reader:
        reader.read_into(0, memoryview(target))

    assert target == data
    assert [entry.name for entry in storage.list_dir()] == ["file"]
    assert storage._client.abort_uploads("") == 0


def test_a_forked_process_uses_connections_of_its_own(object_server: ObjectServer):
    storage = open_storage(object_server.url(uuid.uuid4().hex))
    storage.create("note", b"before")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if storage.read_bytes("note", limit=6) == b"before" else 1
        finally:
            os._exit(code)

    assert os.waitpid(child, 0)[1] == 0
    assert storage.read_bytes("note", limit=6) == b"before"
