"""A data set in files is known again wherever it lies, and another one is told apart."""

from __future__ import annotations

import shutil

import pytest

from dckpt.data.fingerprint import SAMPLE_BYTES, SAMPLES, fingerprint_files
from dckpt.errors import ConfigError


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.bin").write_bytes(b"a" * 10)
    (folder / "deep" / "b.bin").write_bytes(bytes(range(256)) * (SAMPLES * SAMPLE_BYTES // 64))
    return folder


@pytest.mark.parametrize("content", ["full", "sampled"])
def test_a_copy_elsewhere_is_the_same_data(data, tmp_path, content):
    copy = shutil.copytree(data, tmp_path / "elsewhere")
    assert fingerprint_files(data, content=content) == fingerprint_files([str(copy)], content=content)
    assert fingerprint_files(data, content="full") == fingerprint_files(data, content="full")


def test_names_sizes_and_contents_count(data):
    seen = {fingerprint_files(data)}
    (data / "a.bin").write_bytes(b"a" * 9 + b"b")
    seen.add(fingerprint_files(data))
    (data / "a.bin").rename(data / "c.bin")
    seen.add(fingerprint_files(data))
    (data / "c.bin").write_bytes(b"a" * 11)
    seen.add(fingerprint_files(data))
    (data / "empty").touch()
    seen.add(fingerprint_files(data))
    with (data / "deep" / "b.bin").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    seen.add(fingerprint_files(data))
    assert len(seen) == 6


def test_one_byte_between_the_samples_is_seen_by_full_alone(data):
    before = {content: fingerprint_files(data, content=content) for content in ("full", "sampled")}
    with (data / "deep" / "b.bin").open("r+b") as file:
        file.seek(SAMPLE_BYTES + 5)
        file.write(b"\xff")
    after = {content: fingerprint_files(data, content=content) for content in ("full", "sampled")}
    assert after["sampled"] == before["sampled"] and after["full"] != before["full"]


def test_nothing_to_read_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="expected a file or a folder"):
        fingerprint_files(tmp_path / "absent")
    with pytest.raises(ConfigError, match="expected files, found none"):
        fingerprint_files(tmp_path)
    with pytest.raises(ConfigError, match="content='some'"):
        fingerprint_files(tmp_path, content="some")  # type: ignore[arg-type]
