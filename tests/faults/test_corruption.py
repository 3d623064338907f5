"""Any flipped, missing, short or swapped byte of a real checkpoint is reported by `verify` and by every load, by file name."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from dckpt.catalog.catalog import Catalog
from dckpt.catalog.generations import read_generation
from dckpt.cli.main import main
from dckpt.storage.local import LocalStorage
from dckpt.tools.target import open_target
from dckpt.tools.verify_run import verify_target
from tests.support.damage_jobs import (
    Flip,
    flip,
    load_and_tell,
    load_each_flip,
    resume_with_faults,
    save_steps,
)

pytestmark = [pytest.mark.distributed, pytest.mark.crash]

NEWER, OLDER = "step-0000000004.g0001", "step-0000000002.g0001"
SMALL_BYTES = 16 * 1024
FLIPS_A_FILE = 48


@pytest.fixture(scope="module")
def made(ranks, tmp_path_factory):
    """A run of two steps by two ranks of FSDP2, and the digests at each: never changed."""
    root = tmp_path_factory.mktemp("pristine") / "run"
    return root, ranks.run(save_steps, 2, str(root), "fsdp", (2, 4))


@pytest.fixture
def run(made, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made[0], tmp_path / "run"))


def files_of(root: Path) -> list[Path]:
    """What belongs to the newer step: its own files and the run's records."""
    return sorted(p for d in (NEWER, "generations") for p in (root / d).rglob("*") if p.is_file())


def shard(root: Path, rank: int = 0, step: str = NEWER) -> Path:
    return next(root.glob(f"{step}/*/rank{rank:05d}.safetensors"))


def sums(root: Path, rank: int = 0, step: str = NEWER) -> Path:
    return shard(root, rank, step).with_suffix(".sums")


def positions(path: Path) -> list[int]:
    """Both ends, the parts of a shard file's frame, and steps or samples over the rest: different ones per file."""
    size = path.stat().st_size
    chosen = random.Random(path.name)
    found = {0, 1, size // 2, size - 1}
    if path.suffix == ".safetensors":
        header = int.from_bytes(path.read_bytes()[:8], "little")
        padding = len(path.read_bytes()[: 8 + header].rstrip(b" "))
        found |= {7, 8, 9, 8 + header - 1, 8 + header, *range(padding, 8 + header, max(1, (8 + header - padding) // 4))}
    if size <= SMALL_BYTES:
        step = max(1, size // FLIPS_A_FILE)
        found |= set(range(chosen.randrange(step), size, step))
    else:
        found |= {chosen.randrange(size) for _ in range(FLIPS_A_FILE)}
    return sorted(place for place in found if 0 <= place < size)


def flips_of(root: Path) -> list[Flip]:
    chosen = random.Random(1)
    return [(str(path), position, 1 << chosen.randrange(8)) for path in files_of(root) for position in positions(path)]


def named(path: Path | str, root: Path) -> str:
    return os.path.relpath(path, root)


def verified(root: Path) -> tuple[str, str]:
    """The verdict and all damages as text."""
    report = verify_target(open_target(f"{root}@4"))
    damages = [*report.run_damages, *(d for checkpoint in report.checkpoints for d in checkpoint.damages)]
    return report.verdict, "\n".join(f"{damage.file}: {damage.what}" for damage in damages)


def test_every_flipped_byte_is_reported_by_verify_with_its_file(run):
    verdict, _ = verified(run)
    assert verdict in ("COMPLETE", "PARTIAL")
    seen = set()
    for path, position, mask in flips_of(run):
        flip(path, position, mask)
        verdict, told = verified(run)
        flip(path, position, mask)
        assert verdict == "CORRUPT", (path, position, mask)
        assert named(path, run) in told, (path, position, mask, told)
        seen.add(Path(path).suffix)
    assert seen == {".json", ".index", ".safetensors", ".sums"}


def test_every_flipped_byte_is_reported_by_load_with_its_file(ranks, run):
    flips = flips_of(run)
    told = ranks.run(load_each_flip, 1, str(run), 4, flips, has_group=False)[0]
    for (path, position, mask), text in zip(flips, told, strict=True):
        assert named(path, run) in text, (path, position, mask, text)
        # A generation's record says what came before it: the step itself is whole, so it loads, with a warning.
        assert text.startswith("CorruptCheckpointError") or "/generations/" in path, (path, position, mask, text)


def test_the_command_line_reports_a_flip_in_each_file(run):
    for path in files_of(run):
        flip(str(path), path.stat().st_size // 3, 0x04)
        told = CliRunner().invoke(main, ["verify", f"{run}@4"])
        as_json = CliRunner().invoke(main, ["verify", "--json", f"{run}@4"])
        flip(str(path), path.stat().st_size // 3, 0x04)
        assert told.exit_code == as_json.exit_code == 4, told.output
        assert path.name in told.output
        assert named(path, run) in json.dumps(json.loads(as_json.output))


def _cut(count: int) -> Callable[[Path], None]:
    def cut(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[: len(data) - count] if count else b"")

    return cut


LOST: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "one byte short": _cut(1),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": _cut(0),
    "one byte long": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


def test_missing_short_and_long_files_are_reported_by_verify_and_by_load(ranks, run):
    root = run
    for path, (kind, damage) in itertools.product(files_of(root), LOST.items()):
        data = path.read_bytes()
        damage(path)
        verdict, told = verified(root)
        text = ranks.run(load_and_tell, 1, str(root), 4, has_group=False)[0]
        path.write_bytes(data)
        if "generations" in path.parts:
            # The only record of the run: nothing hangs on it for this step, and verify reports it.
            assert verdict == "CORRUPT" or kind == "missing", (path, kind, told)
            continue
        assert verdict == "CORRUPT", (path, kind)
        assert path.name in told, (path, kind, told)
        assert text.startswith("CorruptCheckpointError"), (path, kind, text)
        assert path.name in text, (path, kind, text)


def exchange(a: Path, b: Path) -> None:
    left, right = a.read_bytes(), b.read_bytes()
    assert left != right, "the exchange must change something"
    a.write_bytes(right)
    b.write_bytes(left)


def overwrite(target: Path, source: Path) -> None:
    assert target.read_bytes() != source.read_bytes()
    target.write_bytes(source.read_bytes())


SWAPS: dict[str, tuple[Callable[[Path], object], str]] = {
    "two shard files": (lambda r: exchange(shard(r, 0), shard(r, 1)), "rank0000"),
    "two shard files with their sums": (
        lambda r: [exchange(of(r, 0), of(r, 1)) for of in (shard, sums)],
        "rank0000",
    ),
    "two sums files": (lambda r: exchange(sums(r, 0), sums(r, 1)), ".sums"),
    "a shard file of another step": (lambda r: overwrite(shard(r), shard(r, 0, OLDER)), "rank00000.safetensors"),
    "a sums file of another step": (lambda r: overwrite(sums(r), sums(r, 0, OLDER)), "rank00000.sums"),
    "a shard file of another step with its sums": (
        lambda r: [overwrite(of(r), of(r, 0, OLDER)) for of in (shard, sums)],
        "rank00000",
    ),
    "the manifest of another step": (
        lambda r: overwrite(r / NEWER / "manifest.json", r / OLDER / "manifest.json"),
        "manifest.json",
    ),
}


@pytest.mark.parametrize("case", SWAPS)
def test_swapped_files_are_reported_by_verify_and_by_load(ranks, run, case):
    damage, name = SWAPS[case]
    damage(run)
    verdict, told = verified(run)
    assert verdict == "CORRUPT"
    assert name in told
    text = ranks.run(load_and_tell, 1, str(run), 4, has_group=False)[0]
    assert text.startswith("CorruptCheckpointError")
    assert name in text


# -- walking back ------------------------------------------------------------------------------------------------------


def _flip_in_the_middle(path: Path) -> None:
    flip(str(path), path.stat().st_size // 2, 0x10)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a byte of rank 1's shard": lambda r: flip(str(shard(r, 1)), shard(r, 1).stat().st_size - 1, 0x01),
    "a byte of rank 0's header": lambda r: flip(str(shard(r, 0)), 20, 0x01),
    "a byte of the sums": lambda r: _flip_in_the_middle(sums(r)),
    "a byte of the index": lambda r: _flip_in_the_middle(next((r / NEWER).glob("*.index"))),
    "a byte of the manifest": lambda r: _flip_in_the_middle(r / NEWER / "manifest.json"),
    "no manifest": lambda r: (r / NEWER / "manifest.json").unlink(),
    "no shard file": lambda r: shard(r, 1).unlink(),
    "a short shard file": lambda r: _cut(7)(shard(r, 1)),
    "swapped shard files": lambda r: exchange(shard(r, 0), shard(r, 1)),
}


@pytest.mark.parametrize(
    ("case", "world_size"), [*((case, 2) for case in DAMAGES), ("a byte of rank 1's shard", 3), ("no manifest", 1)]
)
def test_resume_walks_back_past_a_damaged_step_on_all_ranks_together(ranks, made, run, case, world_size):
    DAMAGES[case](run)
    before = made[1][0][0]  # of rank 0, at the older step
    for rank, found in enumerate(ranks.run(resume_with_faults, world_size, str(run), "fsdp", None, 0, 1)):
        assert found.error == ""
        assert (found.report["step"], found.report["damaged"]) == (2, [NEWER])
        expected = made[1][rank][0] if world_size == 2 else before
        for name, value in expected.items():
            if world_size == 2 or not name.startswith(("rng:", "values:progress")):
                assert found.digests[name] == value, name
        assert found.checkpoint == "step-0000000003.g0002"
        told = any(NEWER in line and "walking back" in line for line in found.warnings)
        assert told == (rank == 0), "said once, by the coordinator"
    storage = LocalStorage(str(run))
    record = read_generation(storage, 2)
    assert record.reason == "walk-back"
    assert record.parent is not None
    assert record.parent.checkpoint == OLDER
    assert [item.name for item in Catalog(storage).line()] == ["step-0000000003.g0002", OLDER]
    assert [item.name for item in Catalog(storage).superseded()] == [NEWER]


def test_resume_raises_when_every_candidate_is_damaged_and_saves_are_refused_then(ranks, run):
    for step in (NEWER, OLDER):
        # In the first block, which holds no records: this damage shows when live tensors are already being filled.
        path = max(run.glob(f"{step}/*/*.safetensors"), key=lambda path: path.stat().st_size)
        flip(str(path), 5000, 0x01)
    for found in ranks.run(resume_with_faults, 2, str(run), "fsdp"):
        assert found.error.startswith("CorruptCheckpointError")
        assert "all 2 checkpoints on the current line are damaged" in found.error
        assert NEWER in found.error
        assert OLDER in found.error
        assert found.is_poisoned
    assert sorted(path.name for path in (run / "generations").iterdir()) == ["000001.json"]


@pytest.mark.parametrize(
    ("suffix", "at_rank"),
    [("rank00001.safetensors", 1), ("rank00000.safetensors", 0), (".sums", 1), (".index", 0), ("manifest.json", 0)],
)
def test_an_error_of_the_storage_is_raised_on_all_ranks_and_does_not_walk_back(ranks, run, suffix, at_rank):
    results = ranks.run(resume_with_faults, 2, str(run), "fsdp", (suffix, "eio", 10**9), at_rank)
    assert results[at_rank].hits > 0, "the fault did not happen"
    for found in results:
        assert found.error
        assert "CorruptCheckpointError" not in found.error
        assert "Input/output error" in found.error
        assert suffix in found.error
        assert found.report is None
    again = ranks.run(resume_with_faults, 2, str(run), "fsdp")
    assert [found.report["step"] for found in again] == [4, 4], "with the storage well again the newest step is good"


@pytest.mark.parametrize(
    ("suffix", "at_rank"),
    [
        *(("rank00001.safetensors", 1), ("rank00000.safetensors", 0), (".sums", 0), (".sums", 1)),
        # The others hear of these from rank 0.
        *((".index", 0), ("manifest.json", 0), ("000001.json", 0)),
    ],
)
def test_a_first_read_that_a_second_uncached_one_contradicts_is_no_damage(ranks, made, run, suffix, at_rank):
    results = ranks.run(resume_with_faults, 2, str(run), "fsdp", (suffix, "flip", 1), at_rank)
    assert results[at_rank].hits == 1, "the fault did not happen"
    for rank, found in enumerate(results):
        assert found.error == ""
        assert (found.report["step"], found.report["damaged"]) == (4, [])
        assert found.digests == made[1][rank][1]


def test_load_never_walks_back(ranks, run):
    flip(str(shard(run)), 4096, 0x01)
    for text in ranks.run(load_and_tell, 2, str(run), 4, "fsdp"):
        assert text.startswith("CorruptCheckpointError")
        assert "rank00000.safetensors" in text
    assert ranks.run(load_and_tell, 2, str(run), 2, "fsdp") == ["", ""]
