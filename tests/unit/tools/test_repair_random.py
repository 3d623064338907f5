"""Whatever is done to a checkpoint's files: a repair gives back exactly what was saved, says what is lost, or refuses."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dckpt.catalog.catalog import Catalog
from dckpt.errors import CorruptCheckpointError
from dckpt.storage.local import LocalStorage
from dckpt.tools import restore
from dckpt.tools.repair import prepare_repair
from dckpt.tools.repair_run import apply_repair
from dckpt.tools.target import open_target
from dckpt.tools.verify import verify_checkpoint
from tests.support.repairs import REPAIRED, STEP, read_tensor, save, tensors

SEEDS = range(16)

Damage = Callable[[random.Random, Path, list[Path]], None]


def flip(rng: random.Random, path: Path, _: list[Path]) -> None:
    data = bytearray(path.read_bytes())
    for _number in range(rng.choice((1, 1, 3, 50)) if data else 0):
        data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
    path.write_bytes(data)


def zero(rng: random.Random, path: Path, _: list[Path]) -> None:
    data = bytearray(path.read_bytes())
    begin = rng.randrange(len(data) or 1)
    end = min(len(data), begin + rng.choice((16, 4096, 100_000)))
    data[begin:end] = bytes(end - begin)
    path.write_bytes(data)


def cut(rng: random.Random, path: Path, _: list[Path]) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size or 1)])


def grow(rng: random.Random, path: Path, _: list[Path]) -> None:
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randrange(1, 70_000)))


def delete(_rng: random.Random, path: Path, _: list[Path]) -> None:
    path.unlink()


def swap(rng: random.Random, path: Path, others: list[Path]) -> None:
    path.write_bytes(rng.choice(others).read_bytes())


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pristine") / "run"
    storage = LocalStorage(str(root))
    save(storage, 10, seed=1, tensors=tensors(1, size=4096))
    save(storage, 20, seed=2, tensors=tensors(2, size=4096))
    return root


@pytest.fixture(autouse=True)
def _no_long_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restore, "BYTES_MAX", 0)
    monkeypatch.setattr(restore, "FLIPS_MAX", 1)


def damage(rng: random.Random, root: Path) -> list[str]:
    """Does something to one to four files of step 20; says what."""
    files = sorted(path for path in (root / STEP).rglob("*") if path.is_file())
    told = []
    for path in rng.sample(files, rng.choice((1, 1, 2, 4))):
        kind: Damage = rng.choice((flip, flip, zero, cut, grow, delete, swap))
        others = [other for other in files if other != path and other.exists()]
        kind(rng, path, others)
        told.append(f"{kind.__name__} {path.name}")
    return told


def told_manifest(told: list[str]) -> bool:
    """Whether the manifest was damaged; cutting nothing off, or zeros over zeros, cannot happen to it."""
    return any("manifest.json" in line for line in told)


def content(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def names_in(root: Path, name: str) -> tuple[str, ...]:
    catalog = Catalog(LocalStorage(str(root)))
    return catalog.read_index(name, catalog.read_manifest(name)[0]).names()


@pytest.mark.parametrize("seed", SEEDS)
def test_with_a_copy_everything_comes_back(pristine: Path, tmp_path: Path, seed: int) -> None:
    run = Path(shutil.copytree(pristine, tmp_path / "run"))
    told = damage(random.Random(seed), run)
    before = content(run)

    prepared = prepare_repair(open_target(f"{run}/{STEP}"), copies=[str(pristine)])
    if not prepared.plan.is_needed:
        assert content(run) == {path.replace(str(pristine), str(run)): data for path, data in content(pristine).items()}
        return
    assert prepared.plan.refusals == () and prepared.plan.needs_consent == (), told
    apply_repair(prepared)

    assert {path: data for path, data in content(run).items() if path in before} == before
    report = verify_checkpoint(LocalStorage(str(run)), REPAIRED, is_run=True)
    assert (report.verdict, report.damages) == ("COMPLETE", ()), told
    for name in names_in(pristine, STEP):
        assert read_tensor(run, REPAIRED, name) == read_tensor(pristine, STEP, name), (name, told)


@pytest.mark.parametrize("seed", SEEDS)
def test_without_a_copy_nothing_is_ever_made_up(pristine: Path, tmp_path: Path, seed: int) -> None:
    run = Path(shutil.copytree(pristine, tmp_path / "run"))
    told = damage(random.Random(1000 + seed), run)

    if told_manifest(told):
        with pytest.raises(CorruptCheckpointError, match="manifest"):
            prepare_repair(open_target(f"{run}/{STEP}"))
        return
    prepared = prepare_repair(open_target(f"{run}/{STEP}"))
    if prepared.plan.refusals or not prepared.plan.is_needed:
        return
    apply_repair(prepared)

    report = verify_checkpoint(LocalStorage(str(run)), REPAIRED, is_run=True)
    assert report.damages == (), told
    kept, saved = set(names_in(run, REPAIRED)), set(names_in(pristine, STEP))
    derived = any(change.action == "derived" and "random streams" in change.what for change in prepared.plan.changes)
    for name in kept:
        if not (derived and name.endswith(".values.rng")):
            assert read_tensor(run, REPAIRED, name) == read_tensor(pristine, STEP, name), (name, told)
    assert all(name.startswith("optim.") for name in saved - kept), told
    assert bool(saved - kept) == bool(prepared.plan.needs_consent), told
