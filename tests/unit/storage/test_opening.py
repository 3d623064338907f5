"""Which URLs open which storage."""

from __future__ import annotations

from pathlib import Path

import pytest

from dckpt.errors import ConfigError
from dckpt.storage.opening import open_storage, split_url


@pytest.mark.parametrize("url", ["/data/run one", "file:///data/run%20one", "file://localhost/data/run%20one"])
def test_paths_and_file_urls_name_the_same_directory(url: str):
    assert open_storage(url).url == "/data/run one"


def test_a_path_object_is_a_path(tmp_path: Path):
    assert open_storage(tmp_path / "run").url == str(tmp_path / "run")


def test_opening_touches_nothing(tmp_path: Path):
    storage = open_storage(tmp_path / "run")

    assert not storage.exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["gs://bucket", "HTTP://host/x"])
def test_other_schemes_are_refused_with_what_is_supported(url: str):
    with pytest.raises(ConfigError, match="file systems"):
        open_storage(url)


@pytest.mark.parametrize(
    ("url", "parent", "name"),
    [
        ("/data/run?/step", "/data/run?", "step"),
        ("s3://bucket/run/step/", "s3://bucket/run", "step"),
        (
            "s3://bucket/run/step?endpoint=http://host:1/&region=x",
            "s3://bucket/run?endpoint=http://host:1/&region=x",
            "step",
        ),
        ("s3://bucket", "s3://bucket", ""),
    ],
)
def test_a_url_is_split_into_the_directory_above_and_a_name(url: str, parent: str, name: str):
    assert split_url(url) == (parent, name)


@pytest.mark.parametrize("url", ["", "a\0b", "file://host/run", "file://run", "file:///run?x=1", "file:///run#x"])
def test_urls_that_name_no_directory_are_refused(url: str):
    with pytest.raises(ConfigError):
        open_storage(url)
