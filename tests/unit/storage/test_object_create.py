"""What a conditional create says is true, whatever becomes of its answer; a commit and a sweep never both win."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dckpt import failpoint
from dckpt.errors import KeyExistsError, UnknownOutcomeError
from dckpt.storage import object_create
from dckpt.storage.memory import MemoryClient
from dckpt.storage.object_client import Put
from dckpt.storage.object_create import ExclusiveCreator
from dckpt.storage.object_store import ObjectStorage

ATTEMPT, NAME = "a" * 32, "step-0000000100.g0001"


class Losing(MemoryClient):
    """A store that loses answers: of each create, `lost` requests arrive or not, and say nothing."""

    def __init__(self, *, lost: int, arrives: bool) -> None:
        super().__init__("losing")
        self.lost, self.arrives, self.sent = lost, arrives, 0

    def put_if_absent(self, key: str, data: bytes) -> Put:
        if ".new-" in key:
            return super().put_if_absent(key, data)
        self.sent += 1
        if self.sent > self.lost:
            return super().put_if_absent(key, data)
        if self.arrives:
            super().put_if_absent(key, data)
        return Put.UNCLEAR


class Lying(MemoryClient):
    """A store that ignores the condition."""

    def put_if_absent(self, key: str, data: bytes) -> Put:
        self.put(key, data)
        return Put.CREATED


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_create, "_PAUSE_S", 0.0)


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoint.disarm()


@pytest.mark.parametrize("arrives", [True, False])
def test_a_create_whose_answer_was_lost_is_no_conflict(arrives: bool):
    client = Losing(lost=2, arrives=arrives)
    ExclusiveCreator(client, "").create("manifest", b"ours")

    assert client.get("manifest")[1] == b"ours"
    assert client.sent == (1 if arrives else 3)


def test_a_lost_answer_does_not_hide_that_another_was_faster():
    client = Losing(lost=1, arrives=True)
    client.put("manifest", b"theirs")

    with pytest.raises(KeyExistsError):
        ExclusiveCreator(client, "").create("manifest", b"ours")

    assert client.get("manifest")[1] == b"theirs"


def test_a_create_that_never_gets_an_answer_is_unknown():
    client = Losing(lost=10**9, arrives=False)

    with pytest.raises(UnknownOutcomeError, match="no clear answer"):
        ExclusiveCreator(client, "", patience_s=0).create("manifest", b"ours")


def test_a_store_that_ignores_the_condition_is_noticed_once_and_said(caplog: pytest.LogCaptureFixture):
    client = Lying("lying")
    creator = ExclusiveCreator(client, "run/")
    creator.create("run/one", b"1")
    creator.create("run/two", b"2")
    with pytest.raises(KeyExistsError):
        creator.create("run/one", b"other")

    assert client.get("run/one")[1] == b"1"
    assert [record.message for record in caplog.records if "ignores the condition" in record.message] == [
        caplog.records[0].message
    ]
    assert [item.key for item in client.list("", deep=True).objects] == ["run/one", "run/two"]


def staged(client: MemoryClient) -> tuple[ObjectStorage, str]:
    storage = ObjectStorage(client, "run", url="memory://x/run")
    storage.ensure_root()
    staging = storage.staging_key(NAME, ATTEMPT)
    storage.make_dirs(f"{staging}/{ATTEMPT}")
    writer = storage.create_file(f"{staging}/{ATTEMPT}/rank00000.safetensors")
    writer.write_at(0, memoryview(b"tensors"))
    writer.finish(7)
    storage.stage_manifest(staging, ATTEMPT.encode())
    return storage, staging


@pytest.mark.parametrize("point", ["before_rename", "after_rename"])
def test_an_attempt_that_is_swept_while_it_commits_is_never_committed_with_files_missing(point: str):
    client = MemoryClient("swept")
    storage, staging = staged(client)
    other = ObjectStorage(client, "run", url="memory://x/run")
    failpoint.arm({point: lambda: other.discard(staging)})

    with pytest.raises(UnknownOutcomeError, match="swept"):
        storage.publish(staging, NAME, ATTEMPT.encode())

    assert failpoint.hits(point) == 1
    if point == "after_rename":
        assert storage.read_bytes(f"{NAME}/{ATTEMPT}/rank00000.safetensors", limit=7) == b"tensors"


def test_an_attempt_that_commits_while_it_is_swept_keeps_its_files_or_says_unknown():
    client = MemoryClient("committed")
    storage, staging = staged(client)
    other = ObjectStorage(client, "run", url="memory://x/run")
    said: list[str] = []

    def publish() -> None:
        failpoint.disarm()
        try:
            storage.publish(staging, NAME, ATTEMPT.encode())
        except Exception as error:
            said.append(type(error).__name__)

    failpoint.arm({"mid_prune": publish})
    other.discard(staging)

    assert said == ["StorageMissingError"]
    assert storage.list_dir() == []


def test_a_deletion_that_stops_in_the_middle_shows_as_an_attempt_that_can_be_swept():
    client = MemoryClient("stopped")
    storage, staging = staged(client)
    storage.publish(staging, NAME, ATTEMPT.encode())

    def stop() -> None:
        failpoint.disarm()
        raise KeyboardInterrupt

    failpoint.arm({"mid_prune": stop})
    with pytest.raises(KeyboardInterrupt):
        storage.discard(NAME)

    fresh = ObjectStorage(client, "run", url="memory://x/run")
    assert [entry.name for entry in fresh.list_dir()] == [staging]
    fresh.discard(staging)
    assert fresh.list_dir() == []
    assert [item.key for item in client.list("", deep=True).objects] == ["run/.directory"]
