"""What the commands say of files that were taken over: damage is seen from every checkpoint, sizes count each byte once."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dckpt.catalog.catalog import Catalog
from dckpt.catalog.retention import Retention
from dckpt.cli.main import main
from dckpt.format.manifest import encode_manifest
from dckpt.storage.local import LocalStorage
from dckpt.storage.posix import Posix
from dckpt.tools.inspect import list_run
from dckpt.tools.prune import PruneRequest, apply_prune, plan_prune
from dckpt.tools.sharing import StoredFile, find_copies, freed_bytes, shared_bytes, total_bytes
from dckpt.tools.target import open_target
from dckpt.tools.verify_run import verify_target
from tests.support.commits import Base, commit, start_generation

FIRST, SECOND, THIRD = (f"step-0000000{step}00.g0001" for step in (1, 2, 3))
NOW = 1_700_000_060.0
WAYS = pytest.mark.parametrize("way", ["links", "references"])


class NoLinks(Posix):
    """Finished files get no second name; small files are still created by one."""

    def link(self, source: str, target: str) -> None:
        if ".new-" not in source:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        super().link(source, target)


def make_run(root: Path, way: str) -> LocalStorage:
    """Three checkpoints; rank 0's second file is the first one's in all of them."""
    storage = LocalStorage(root, Posix() if way == "links" else NoLinks())
    start_generation(storage)
    commit(storage, 100, 1, base=Base())
    commit(storage, 200, 1, base=Base(FIRST))
    commit(storage, 300, 1, base=Base(SECOND))
    return storage


def base_of(root: Path, name: str) -> Path:
    (path,) = (root / name).glob("*/rank00000-1.safetensors")
    return path


def damages(root: Path) -> dict[str, list[tuple[str, str, tuple[int, ...]]]]:
    report = verify_target(open_target(str(root)), is_all=True)
    return {one.checkpoint: [(d.file, d.what, d.ranks) for d in one.damages] for one in report.checkpoints}


@WAYS
def test_whole_ones_are_whole(tmp_path: Path, way: str) -> None:
    make_run(tmp_path / "run", way)

    assert damages(tmp_path / "run") == {FIRST: [], SECOND: [], THIRD: []}


@WAYS
@pytest.mark.parametrize("suffix", [".safetensors", ".sums"])
def test_a_flipped_byte_is_seen_from_every_checkpoint_that_shares_it(tmp_path: Path, way: str, suffix: str) -> None:
    root = tmp_path / "run"
    make_run(root, way)
    path = base_of(root, FIRST).with_suffix(suffix)
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))

    found = damages(root)

    assert found.keys() == {FIRST, SECOND, THIRD}
    for name, told in found.items():
        place = name if way == "links" else FIRST
        assert told, f"{name} shares it"
        assert {file for file, _, _ in told} == {str(next((root / place).glob(f"*/{path.name}")).relative_to(root))}


def test_a_deleted_checkpoint_is_reported_by_those_that_refer_to_it(tmp_path: Path) -> None:
    root = tmp_path / "run"
    make_run(root, "references")
    lost = base_of(root, FIRST).relative_to(root)
    shutil.rmtree(root / FIRST)

    for told in damages(root).values():
        assert (f"{FIRST}/manifest.json", "missing: 2 files of", (0,)) in [(f, w[:19], r) for f, w, r in told]
        assert str(lost) in {file for file, _, _ in told}
    report = verify_target(open_target(str(root)))
    assert report.verdict == "CORRUPT"
    assert any("model.base" in damage.tensors for damage in report.checkpoints[0].damages)


def test_a_deleted_checkpoint_does_not_matter_where_files_were_linked(tmp_path: Path) -> None:
    root = tmp_path / "run"
    make_run(root, "links")
    shutil.rmtree(root / FIRST)

    assert damages(root) == {SECOND: [], THIRD: []}


def test_a_reference_must_name_the_checkpoint_that_holds_the_file_itself(tmp_path: Path) -> None:
    """One that refers to a checkpoint which only refers to the file breaks when that one goes: it is damage now."""
    root = tmp_path / "run"
    storage = make_run(root, "references")
    manifest, _ = Catalog(storage).read_manifest(THIRD)
    files = tuple(replace(f, checkpoint=SECOND) if f.checkpoint else f for f in manifest.files)
    (root / THIRD / "manifest.json").write_bytes(encode_manifest(replace(manifest, files=files)))

    told = [what for _, what, _ in damages(root)[THIRD]]

    assert f"{THIRD} refers to it, and it is no file of {SECOND}" in told


@WAYS
def test_sizes_count_shared_bytes_once_and_say_so(tmp_path: Path, way: str) -> None:
    root = tmp_path / "run"
    storage = make_run(root, way)
    base = base_of(root, FIRST).stat().st_size

    listing = list_run(storage, now_unix_s=NOW)

    shared = base + (base_of(root, FIRST).with_suffix(".sums").stat().st_size if way == "references" else 0)
    assert [row.shared_bytes for row in listing.checkpoints] == [shared, shared, 0]
    sizes = [row.size_bytes or 0 for row in listing.checkpoints]
    # Within one index: its content, and so its name, may be the same or another.
    assert listing.total_bytes == sum(sizes) - 2 * shared
    told = CliRunner().invoke(main, ["ls", str(root)], terminal_width=200).output
    assert "of unchanged files are shared and stored once" in told
    assert told.splitlines()[2].split()[:5] == ["step", "gen", "saved", "size", "shared"]


def test_show_says_where_a_file_lies_and_for_how_long(tmp_path: Path) -> None:
    root = tmp_path / "run"
    make_run(root, "references")

    told = CliRunner().invoke(main, ["show", str(root)], terminal_width=300).output
    rows = json.loads(CliRunner().invoke(main, ["show", str(root), "--json"]).output)["files"]

    (line,) = [line for line in told.splitlines() if "rank00000-1.safetensors" in line and FIRST in line]
    assert line.endswith("2 saves")
    (row,) = [row for row in rows if row["path"].endswith("rank00000-1.safetensors")]
    assert (row["checkpoint"], row["reused"]) == (FIRST, 2)


@WAYS
def test_a_plan_keeps_what_is_referred_to_and_counts_what_is_really_freed(tmp_path: Path, way: str) -> None:
    root = tmp_path / "run"
    storage = make_run(root, way)
    sizes = {row.name: row.size_bytes or 0 for row in list_run(storage, now_unix_s=NOW).checkpoints}
    base = base_of(root, FIRST).stat().st_size
    sums = base_of(root, FIRST).with_suffix(".sums").stat().st_size

    plan = plan_prune(storage, PruneRequest(Retention(last=1)), now_unix_s=NOW)

    if way == "references":
        assert [row.name for row in plan.remove] == [SECOND]
        kept = {row.name: row.reasons for row in plan.keep}
        assert kept[FIRST] == (f"files of {THIRD} lie in it", "no rule keeps it: not among the last 1")
        assert plan.freed_bytes == sizes[SECOND] - base - sums
        assert apply_prune(storage, plan) == 1
        assert damages(root) == {FIRST: [], THIRD: []}
    else:
        assert [row.name for row in plan.remove] == [SECOND, FIRST]
        assert plan.freed_bytes == sizes[FIRST] + sizes[SECOND] - 2 * base
        assert apply_prune(storage, plan) == 2
        assert damages(root) == {THIRD: []}


def test_a_stale_plan_removes_nothing_that_is_referred_to_meanwhile(tmp_path: Path) -> None:
    root = tmp_path / "run"
    storage = LocalStorage(root, NoLinks())
    start_generation(storage)
    commit(storage, 100, 1, base=Base())
    commit(storage, 200, 1, base=Base())
    plan = plan_prune(storage, PruneRequest(Retention(last=1)), now_unix_s=NOW)
    assert [row.name for row in plan.remove] == [FIRST]
    commit(storage, 300, 1, base=Base(FIRST))

    assert apply_prune(storage, plan) == 0
    assert damages(root) == {FIRST: [], SECOND: [], THIRD: []}


def test_copies_follow_rewrites_lost_beginnings_and_references():
    def linked(reused: int) -> StoredFile:
        return StoredFile("base", 100, reused, None)

    files = {
        "1": [linked(1)],  # what it was taken over from is gone
        "2": [linked(2), StoredFile("own", 7, 0, None)],
        "3": [linked(0)],  # written anew
        "4": [linked(1)],
        "5": [StoredFile("base", 100, 2, "2")],
        "6": [StoredFile("base", 100, 3, "0")],  # in a checkpoint that is gone or cannot be read
    }

    copies = find_copies(files)

    assert total_bytes(copies) == 100 + 7 + 100 + 100
    assert shared_bytes(copies) == {"1": 0, "2": 100, "3": 0, "4": 100, "5": 100, "6": 0}
    assert freed_bytes(copies, ["1"]) == 0
    assert freed_bytes(copies, ["3", "4"]) == 100
    assert freed_bytes(copies, ["1", "2"]) == 7, "5 lies on the first copy"
    assert freed_bytes(copies, list(files)) == total_bytes(copies)


@WAYS
def test_a_repair_writes_a_file_of_its_own_where_the_shared_one_is_damaged(tmp_path: Path, way: str) -> None:
    """What the others refer to, or share by a link, is left as it is; from then on they have a place to be repaired from."""
    root = tmp_path / "run"
    make_run(root, way)
    shared = base_of(root, FIRST)
    data = bytearray(shared.read_bytes())
    data[-1] ^= 4
    with shared.open("r+b") as file:
        file.write(data)

    assert repair_of(root, THIRD).exit_code in (0, 1)

    repaired = THIRD.replace("g0001", "g0002")
    assert shared.read_bytes() == bytes(data)
    found = damages(root)
    assert found[repaired] == [] and found[FIRST] and found[THIRD]
    assert base_of(root, repaired).stat().st_ino != shared.stat().st_ino
    told = repair_of(root, FIRST)
    assert f"from {repaired}" in told.output
    assert damages(root)[FIRST.replace("g0001", "g0003")] == []


def repair_of(root: Path, name: str) -> Result:
    return CliRunner().invoke(main, ["repair", f"{root}@{name}", "--yes"])
