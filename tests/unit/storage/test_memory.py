"""memory:// stores as an object store does, in one process; whole runs work on it."""

from __future__ import annotations

import uuid
from collections.abc import Mapping

import pytest
import torch
import torch.distributed.checkpoint as dcp

import dckpt
from dckpt.errors import ConfigError, StorageMissingError
from dckpt.storage.memory import MemoryClient, memory_client
from dckpt.storage.object_store import ObjectStorage
from dckpt.storage.opening import open_storage
from tests.support.fault_jobs import SmallRun
from tests.support.models import digests


@pytest.fixture
def root() -> str:
    return f"memory://test-{uuid.uuid4().hex}/deep/run"


def train(root: str, steps: int, **options) -> tuple[dict[str, str], dckpt.ResumeReport | None]:
    run = SmallRun("plain")
    with dckpt.Checkpointer(root, signals=(), **options) as checkpointer:
        report = checkpointer.resume(run.state)
        for _ in range(steps):
            run.step()
            checkpointer.save(run.state, blocking=True)
    return digests(run.state), report


def test_a_run_resumes_bit_for_bit_and_keeps_what_its_retention_says(root: str):
    saved, nothing = train(root, 4, retention=dckpt.Retention(last=2))
    run = SmallRun("plain")
    with dckpt.Checkpointer(root, signals=()) as checkpointer:
        report = checkpointer.resume(run.state)
        steps = sorted(checkpointer.steps())

    assert nothing is None
    assert report is not None
    assert digests(run.state) == saved
    assert steps == [3, 4]
    assert {entry.name for entry in open_storage(root).list_dir()} == {
        "generations",
        "reports",
        "step-0000000003.g0001",
        "step-0000000004.g0001",
    }


def test_nothing_of_a_checkpoint_stays_when_it_is_deleted(root: str):
    train(root, 1)
    storage = open_storage(root)
    for entry in storage.list_dir():
        storage.discard(entry.name)

    client = memory_client(root.split("/")[2])
    assert [item.key for item in client.list("", deep=True).objects if not item.key.endswith(".directory")] == []


def test_a_stand_alone_checkpoint_is_saved_and_loaded_by_dcp(root: str):
    saved, loaded = {"weight": torch.arange(12.0)}, {"weight": torch.zeros(12)}
    dcp.save(saved, storage_writer=dckpt.DckptWriter(f"{root}/mine"), no_dist=True)
    dcp.load(loaded, storage_reader=dckpt.DckptReader(f"{root}/mine"), no_dist=True)

    assert torch.equal(saved["weight"], loaded["weight"])
    assert dckpt.DckptWriter.validate_checkpoint_id(f"{root}/mine")


def test_several_processes_are_refused_by_name():
    with pytest.raises(ConfigError, match="all 2 processes share"):
        open_storage("memory://x/run", processes=2)


@pytest.mark.parametrize("url", ["memory://", "memory:///run", "memory://x/a//b", "memory://x/../y"])
def test_urls_without_a_name_or_with_tricks_are_refused(url: str):
    with pytest.raises(ConfigError, match="expected scheme"):
        open_storage(url)


def test_a_file_that_needs_more_parts_than_there_may_be_gets_larger_ones(monkeypatch: pytest.MonkeyPatch):
    client = MemoryClient("limits")
    monkeypatch.setattr(client, "parts_max", 3)
    sent: list[int] = []
    put_part = client.put_part
    monkeypatch.setattr(client, "put_part", lambda *part: (sent.append(len(part[3])), put_part(*part))[1])
    storage = ObjectStorage(client, "run", url="memory://limits/run", part_bytes=1000)
    writer = storage.create_file("file", size=4500)
    writer.write_at(0, memoryview(bytes(4500)))
    writer.finish(4500)

    assert sent == [2000, 2000, 500]
    assert storage.size("file") == 4500


def test_a_file_of_many_parts_is_whole_and_an_abandoned_one_leaves_nothing():
    client = MemoryClient("parts")
    storage = ObjectStorage(client, "run", url="memory://parts/run", part_bytes=1000)
    data = bytes(range(256)) * 20
    storage.ensure_root()
    writer = storage.create_file("file")
    for begin in (3500, 0, 1200, 2100):
        end = {0: 1200, 1200: 2100, 2100: 3500, 3500: len(data)}[begin]
        writer.write_at(begin, memoryview(data)[begin:end])
    writer.finish(len(data))
    left = storage.create_file("other")
    left.write_at(0, memoryview(data))
    left.abandon()

    assert storage.read_bytes("file", limit=len(data)) == data
    assert client.abort_uploads("") == 0
    assert [entry.name for entry in storage.list_dir()] == ["file"]


class Forgetful(MemoryClient):
    """A store that loses its answer to the last request of an upload; the repeated one finds no upload any more."""

    def __init__(self, *, arrives: bool) -> None:
        super().__init__("forgetful")
        self.arrives = arrives

    def complete_upload(self, key: str, upload: str, tags: Mapping[int, str]) -> None:
        if self.arrives:
            super().complete_upload(key, upload, tags)
        self.abort_upload(key, upload)
        super().complete_upload(key, upload, tags)


@pytest.mark.parametrize("arrives", [True, False])
def test_an_upload_whose_last_answer_was_lost_is_a_file_if_it_is_there(arrives: bool):
    storage = ObjectStorage(Forgetful(arrives=arrives), "run", url="memory://forgetful/run", part_bytes=10)
    storage.ensure_root()
    writer = storage.create_file("file")
    writer.write_at(0, memoryview(b"x" * 25))

    if arrives:
        writer.finish(25)
        assert storage.read_bytes("file", limit=25) == b"x" * 25
    else:
        with pytest.raises(StorageMissingError):
            writer.finish(25)
        assert storage.list_dir() == []
