"""What the plan of a repair says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dckpt.catalog.catalog import Catalog
from dckpt.storage.local import LocalStorage
from dckpt.tools import restore
from dckpt.tools.repair import prepare_repair
from dckpt.tools.target import open_target
from tests.support.repairs import save, tensors


def place_of(root: Path, tensor: str) -> tuple[int, Path]:
    """Where the first chunk of a tensor begins, and in which file."""
    catalog = Catalog(LocalStorage(str(root)))
    name = catalog.line()[0].name
    index = catalog.read_index(name, catalog.read_manifest(name)[0])
    chunk = index.chunks(tensor)[0]
    return chunk.begin, next(root.glob(f"{name}/*/{index.files[chunk.file]}"))


def test_lost_progress_that_is_filled_in_is_not_said_to_restart_at_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restore, "BYTES_MAX", 0)  # looking for one wrong byte takes long
    facts = {"progress": {"step": 20, "samples": 640, "epoch": 2}}
    held = {**tensors(2), "progress.losses": np.zeros(65_536, np.float32)}
    save(LocalStorage(str(tmp_path / "run")), 20, seed=2, facts=facts, tensors=held)
    begin, path = place_of(tmp_path / "run", "progress.losses")
    with path.open("r+b") as file:
        file.seek(begin + 66_000)
        file.write(bytes(range(1, 201)))

    prepared = prepare_repair(open_target(f"{tmp_path / 'run'}@20"))

    rows = [(row.action, row.how) for row in prepared.plan.changes if row.what == "progress"]
    assert [action for action, _ in rows] == ["lost", "filled in"]
    assert not any("restart at zero" in how for _, how in rows)
    assert prepared.plan.needs_consent == ("progress",)
