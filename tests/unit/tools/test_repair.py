"""A repair proves what it gives back, derives what a rule gives, says what is lost, and never touches the old checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import dckpt
from dckpt import failpoint
from dckpt.catalog.catalog import Catalog
from dckpt.catalog.generations import list_generations
from dckpt.cli.main import main
from dckpt.errors import CommitConflictError, CorruptCheckpointError, StorageError
from dckpt.format.fingerprint import box_runs, fold_box
from dckpt.format.streams import rekey_stream
from dckpt.format.values import dump_json, load_json
from dckpt.storage.local import LocalStorage
from dckpt.tools import restore
from dckpt.tools.repair import Prepared, prepare_repair
from dckpt.tools.repair_run import apply_repair
from dckpt.tools.target import open_target
from dckpt.tools.verify import verify_checkpoint
from tests.support import runs
from tests.support.repairs import AXES, REPAIRED, STEP, VALUES, WORLD, read_tensor, save, streams_of, tensors
from tests.support.runs import FULL_PARTS, write_checkpoint


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 10 and 20 of two ranks; step 20 is the one to damage."""
    root = tmp_path_factory.mktemp("pristine") / "run"
    storage = LocalStorage(str(root))
    save(storage, 10, seed=1)
    save(storage, 20, seed=2)
    return root


@pytest.fixture
def run(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "run"))


@pytest.fixture
def copy(pristine: Path, tmp_path: Path) -> Path:
    """The same run on another disk."""
    return Path(shutil.copytree(pristine, tmp_path / "copy"))


@pytest.fixture(autouse=True)
def _disarmed():
    yield
    failpoint.disarm()


@pytest.fixture(autouse=True)
def _no_long_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking for one wrong byte in a block takes half a minute; `tests/unit/cli/test_repair.py` does it once."""
    monkeypatch.setattr(restore, "BYTES_MAX", 0)


def shard(root: Path, rank: int = 0, name: str = STEP) -> Path:
    return next(root.glob(f"{name}/*/rank{rank:05d}.safetensors"))


def sums(root: Path, rank: int = 0) -> Path:
    return shard(root, rank).with_suffix(".sums")


def overwrite(path: Path, begin: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[begin : begin + len(data)] = data
    path.write_bytes(content)


def place_of(root: Path, tensor: str, rank: int = 0, name: str = STEP) -> tuple[int, int]:
    """Where a tensor's chunk lies in a rank's file."""
    catalog = Catalog(LocalStorage(str(root)))
    index = catalog.read_index(name, catalog.read_manifest(name)[0])
    number = index.files.index(f"rank{rank:05d}.safetensors")
    return next((begin, end) for found, begin, end in index.chunks_in_file(number) if found == tensor)


def content(root: Path, below: str = "") -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in (root / below).rglob("*") if path.is_file()}


def prepare(root: Path, *, at: str = "@20", copies: tuple[Path, ...] = ()) -> Prepared:
    return prepare_repair(open_target(f"{root}{at}"), copies=[str(item) for item in copies])


def repair(root: Path, *, copies: tuple[Path, ...] = (), expected: str = "COMPLETE") -> Prepared:
    """Repairs step 20, and holds what holds of every repair."""
    before = content(root)
    prepared = prepare(root, copies=copies)
    assert not prepared.plan.refusals, prepared.plan.refusals
    assert prepared.plan.is_needed
    assert prepared.plan.outcome == expected
    apply_repair(prepared)

    after = content(root)
    assert {path: after.get(path) for path in before} == before, "the old checkpoint is the backup"
    report = verify_checkpoint(LocalStorage(str(root)), REPAIRED, is_run=True)
    assert report.damages == ()
    assert report.verdict == expected
    assert Catalog(LocalStorage(str(root))).line()[0].name == REPAIRED
    assert not list(root.glob(".tmp-*"))
    return prepared


def told(prepared: Prepared) -> str:
    return "\n".join(str(change) for change in prepared.plan.changes)


def ensure_same_state(root: Path, reference: Path, but: tuple[str, ...] = ()) -> None:
    catalog = Catalog(LocalStorage(str(reference)))
    index = catalog.read_index(STEP, catalog.read_manifest(STEP)[0])
    for tensor in index.names():
        if tensor not in but:
            assert read_tensor(root, REPAIRED, tensor) == read_tensor(reference, STEP, tensor), tensor


def test_a_good_checkpoint_needs_nothing(run: Path) -> None:
    prepared = prepare(run)

    assert not prepared.plan.is_needed
    assert prepared.plan.changes == ()


def remove_files(directory: Path) -> None:
    for path in [path for path in directory.rglob("*") if path.is_file()]:
        path.unlink()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "bytes": lambda root: overwrite(shard(root), 70_000, bytes(300)),
    "header": lambda root: overwrite(shard(root), 40, b"x" * 10),
    "cut short": lambda root: shard(root).write_bytes(shard(root).read_bytes()[:150_000]),
    "too long": lambda root: shard(root).write_bytes(shard(root).read_bytes() + bytes(70_000)),
    "gone": lambda root: shard(root, 1).unlink(),
    "empty": lambda root: shard(root, 1).write_bytes(b""),
    "sums": lambda root: overwrite(sums(root), 60, b"abc"),
    "sums gone": lambda root: sums(root).unlink(),
    "sums and bytes": lambda root: (sums(root).unlink(), overwrite(shard(root), 70_000, bytes(300)))[0],
    "swapped": lambda root: shard(root).write_bytes(shard(root, 1).read_bytes()),
    "index": lambda root: overwrite(next((root / STEP).glob("layout-*.index")), 100, b"abcd"),
    "index gone": lambda root: next((root / STEP).glob("layout-*.index")).unlink(),
    "manifest": lambda root: overwrite(root / STEP / "manifest.json", 40, b"abcd"),
    "manifest gone": lambda root: (root / STEP / "manifest.json").unlink(),
    "everything but the directory": lambda root: remove_files(root / STEP),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_whatever_is_damaged_comes_back_from_a_copy(run: Path, copy: Path, kind: str) -> None:
    DAMAGES[kind](run)

    repair(run, copies=(copy,))

    ensure_same_state(run, copy)


@pytest.mark.parametrize("kind", ["bytes", "cut short", "gone", "sums and bytes"])
def test_another_checkpoint_of_the_run_with_the_same_file_is_a_copy_too(run: Path, copy: Path, kind: str) -> None:
    parent = save(LocalStorage(str(run)), 30, seed=2)
    DAMAGES[kind](run)

    prepared = prepare(run)

    assert f"from {parent.id.name if parent.id else ''}" in told(prepared)
    assert prepared.plan.superseded == ("step-0000000030.g0001",)
    apply_repair(prepared)
    ensure_same_state(run, copy)


@pytest.mark.parametrize("kind", ["sums", "sums gone", "index", "index gone", "header", "too long"])
def test_what_follows_from_the_rest_needs_no_copy(run: Path, copy: Path, kind: str) -> None:
    shutil.rmtree(run / "step-0000000010.g0001")  # It has the same index.
    DAMAGES[kind](run)

    repair(run)

    ensure_same_state(run, copy)


def test_one_flipped_bit_is_turned_back_without_any_copy(run: Path, copy: Path) -> None:
    position = place_of(run, "model.weight")[0] + 66_000
    data = bytearray(shard(run).read_bytes())
    data[position] ^= 0x20
    shard(run).write_bytes(data)

    prepared = repair(run)

    assert f"one flipped bit of rank00000.safetensors turned back, in byte {position:,}" in told(prepared)
    ensure_same_state(run, copy)


def test_a_tensor_that_did_not_change_comes_back_from_an_older_step(run: Path, copy: Path) -> None:
    """The files of step 10 are others: only this tensor in them is the same."""
    begin, end = place_of(run, "model.embedding")
    overwrite(shard(run), begin + 70_000, bytes(range(1, 201)))
    assert begin + 70_200 < end

    prepared = repair(run)

    assert "put together from equal bytes in step-0000000010.g0001" in told(prepared)
    ensure_same_state(run, copy)


def test_weights_that_nobody_has_are_a_refusal_and_nothing_is_written(run: Path) -> None:
    begin, _ = place_of(run, "model.weight")
    overwrite(shard(run), begin + 66_000, bytes(range(1, 201)))
    before = content(run)

    prepared = prepare(run)

    assert len(prepared.plan.refusals) == 1
    assert "model.weight in rank00000.safetensors" in prepared.plan.refusals[0]
    assert content(run) == before


@pytest.mark.parametrize("damage", ["a page of zeros", "a bit elsewhere, too"])
def test_damage_that_leaves_the_fingerprint_as_it_was_is_no_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """An even number of equal words that became zeros: the XOR over them is the same."""
    monkeypatch.setattr(restore, "FLIPS_MAX", 0)
    root, at = tmp_path / "run", "step-0000000001.g0001"
    slots = np.full(65_536, -1, np.int64)
    model = torch.nn.Linear(2, 2)
    model.register_buffer("slots", torch.from_numpy(slots.copy()))
    progress = dckpt.TrainProgress()
    with dckpt.Checkpointer(str(root)) as checkpointer:
        progress.advance(loss=1.0)
        checkpointer.save(dckpt.TrainState(model=model, progress=progress), blocking=True)
    begin, end = place_of(root, "model.slots", name=at)
    page = -(-begin // 65_536) * 65_536 + 8192
    assert page + 4096 < end
    path = shard(root, name=at)
    overwrite(path, page, bytes(4096))
    changed = slots.copy()
    changed[(page - begin) // 8 :][:512] = 0
    runs = box_runs(slots.shape, (0,), slots.shape, 8)
    assert fold_box(memoryview(changed.tobytes()), 0, runs) == fold_box(memoryview(slots.tobytes()), 0, runs)
    if damage != "a page of zeros":
        overwrite(path, path.stat().st_size - 5, b"\x7f")

    prepared = prepare(root, at=f"/{at}")

    assert any("model.slots" in sentence for sentence in prepared.plan.refusals), prepared.plan


def test_lost_moments_are_not_invented_and_given_up_only_with_consent(run: Path, copy: Path) -> None:
    begin, _ = place_of(run, "optim.weight.exp_avg")
    overwrite(shard(run), begin + 66_000, bytes(range(1, 201)))

    prepared = prepare(run)

    assert prepared.plan.needs_consent == ("optim",)
    assert prepared.plan.outcome == "PARTIAL"
    assert "moments are lost and are not invented" in told(prepared) and "spike" in told(prepared)
    apply_repair(prepared)
    manifest, _ = Catalog(LocalStorage(str(run))).read_manifest(REPAIRED)
    record = manifest.values["optim"]["optimizers"][""]  # type: ignore[index,call-overload]
    assert [template["params"] for template in record["states"]] == [["bias"]]
    assert verify_checkpoint(LocalStorage(str(run)), REPAIRED, is_run=True).damages == ()
    ensure_same_state(run, copy, but=("optim.weight.exp_avg", "optim.weight.step"))


def rng_place(run: Path, rank: int) -> tuple[Path, int, int]:
    begin, end = place_of(run, f"rank.{rank}.values.rng", rank)
    return shard(run, rank), begin, end


def streams_in(root: Path, rank: int, name: str = REPAIRED) -> Any:
    key = f"rank.{rank}.values.rng"
    return load_json(read_tensor(root, name, key), key=key, limit=2**20)


def test_a_lost_record_of_one_rank_is_copied_where_equal_and_derived_where_not(tmp_path: Path) -> None:
    """Records in files of their own: in the last block of a rank's file its neighbours would be lost with it."""
    root = tmp_path / "run"
    storage = LocalStorage(str(root))
    # Small weights are of rank 0: rank 1's file holds its record alone.
    save(storage, 20, seed=2, tensors=tensors(2, size=1))
    path, begin, _ = rng_place(root, 1)
    overwrite(path, begin, bytes(range(1, 201)))

    prepared = repair(root)

    assert "random streams of rank 1: restored: equal on ranks whose records are good: python" in told(prepared)
    assert "numpy, torch, by the rule for another mesh (seed of rank 0)" in told(prepared)
    found = streams_in(root, 1)
    assert found["python"] == streams_of(0)["python"]
    seed = int.from_bytes(_torch_state(streams_of(0)["torch"])[:8], "little")
    for stream in ("numpy", "torch"):
        assert found[stream] == rekey_stream(stream, run_seed=seed, generation=1, step=20, coordinates={"rank": 1})
    assert streams_in(root, 0) == streams_of(0)
    manifest, _ = Catalog(storage).read_manifest(REPAIRED)
    assert manifest.lineage is not None and manifest.lineage.how == "repair"
    assert any("random streams" in sentence for sentence in manifest.lineage.changes)


def _torch_state(record: Any) -> bytes:
    from dckpt.format.streams import decode_stream

    found = decode_stream("torch", record)["state"]
    assert isinstance(found, bytes)
    return found


def test_a_checkpoint_without_random_streams_gets_them_by_the_rule_and_its_files_stay(tmp_path: Path) -> None:
    root = tmp_path / "run"
    parts = [part for part in FULL_PARTS if part != "rng"]
    save(LocalStorage(str(root)), 20, seed=2, tensors=tensors(2, has_rng=False), parts=parts, rng={})
    assert verify_checkpoint(LocalStorage(str(root)), STEP, is_run=True).verdict == "PARTIAL"

    prepared = repair(root)

    assert prepared.plan.num_linked == WORLD
    assert shard(root).stat().st_ino == shard(root, name=REPAIRED).stat().st_ino
    states = [streams_in(root, rank) for rank in range(WORLD)]
    assert all(set(state) == {"python", "numpy", "torch"} for state in states)
    assert all(states[0][stream] != states[1][stream] for stream in states[0])
    again = prepare(root, at="@" + STEP)
    assert again.plan.changes == prepared.plan.changes, "the rule gives the same each time"


def test_missing_streams_are_laid_out_as_in_another_checkpoint_of_the_run(tmp_path: Path) -> None:
    root = tmp_path / "run"
    parts = [part for part in FULL_PARTS if part != "rng"]
    save(LocalStorage(str(root)), 10, seed=1)
    save(LocalStorage(str(root)), 20, seed=2, tensors=tensors(2, has_rng=False), parts=parts, rng={})

    prepared = repair(root)

    assert "seed of step-0000000010.g0001" in told(prepared)
    states = [streams_in(root, rank) for rank in range(WORLD)]
    assert states[0]["python"] == states[1]["python"]
    assert states[0]["torch"] != states[1]["torch"]
    assert Catalog(LocalStorage(str(root))).read_manifest(REPAIRED)[0].rng == AXES


def without(*left_out: str) -> dict[str, Any]:
    return {
        "parts": [part for part in FULL_PARTS if part not in left_out],
        "values": {name: value for name, value in VALUES.items() if name not in left_out},
    }


def test_progress_and_scheduler_are_filled_in_from_facts(tmp_path: Path) -> None:
    facts = {
        "progress": {"step": 20, "samples": 640, "epoch": 2},
        "scheduler": {"": {"class": "CosineAnnealingLR", "last_epoch": 20, "last_lr": [0.001]}},
    }
    save(LocalStorage(str(tmp_path / "run")), 20, seed=2, facts=facts, **without("progress", "scheduler"))

    repair(tmp_path / "run")

    values = Catalog(LocalStorage(str(tmp_path / "run"))).read_manifest(REPAIRED)[0].values
    progress, scheduler = values["progress"]["state"], values["scheduler"]["state"]  # type: ignore[index,call-overload]
    assert (progress["step"], progress["samples"], progress["epoch"]) == (20, 640, 2)  # type: ignore[index,call-overload]
    assert scheduler == {"last_epoch": 20, "_step_count": 21, "_last_lr": [0.001]}


def test_a_scheduler_is_moved_on_from_an_earlier_checkpoint(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path / "run"))
    state = {"T_max": 100, "base_lrs": [0.01], "last_epoch": 10, "_step_count": 11, "_last_lr": [0.005]}
    save(storage, 10, seed=1, values={**VALUES, "scheduler": {"kind": "stateful", "state": state}})
    save(storage, 20, seed=2, **without("scheduler"))

    repair(tmp_path / "run")

    scheduler = Catalog(storage).read_manifest(REPAIRED)[0].values["scheduler"]["state"]  # type: ignore[index,call-overload]
    assert scheduler == {**state, "last_epoch": 20, "_step_count": 21, "_last_lr": [0.001]}


@pytest.mark.parametrize("key", ["_schedulers", "num_bad_epochs"])
def test_a_scheduler_with_a_memory_of_its_own_is_not_guessed(tmp_path: Path, key: str) -> None:
    storage = LocalStorage(str(tmp_path / "run"))
    state = {"last_epoch": 10, "_last_lr": [0.005], key: 1}
    save(storage, 10, seed=1, values={**VALUES, "scheduler": {"kind": "stateful", "state": state}})
    save(storage, 20, seed=2, **without("scheduler"))

    prepared = prepare(tmp_path / "run")

    assert not prepared.plan.is_needed
    assert "scheduler: not possible" in told(prepared)


def test_missing_moments_are_said_with_what_to_do(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path / "run"))
    save(storage, 10, seed=1)
    found = {name: array for name, array in tensors(2, has_rng=False).items() if not name.startswith("optim.")}
    save(storage, 20, seed=2, tensors=found, **{**without("optim", "rng"), "rng": {}})

    prepared = repair(tmp_path / "run", expected="PARTIAL")

    assert "optim: not possible: optimizer moments are lost and are not invented" in told(prepared)
    assert "warm the learning rate up" in told(prepared)
    assert "step-0000000010.g0001" in told(prepared)


def test_without_its_manifest_and_without_a_copy_nothing_is_guessed(run: Path) -> None:
    (run / STEP / "manifest.json").unlink()

    with pytest.raises(CorruptCheckpointError, match="--from"):
        prepare(run, at=f"/{STEP}")


def other_run(root: Path, monkeypatch: pytest.MonkeyPatch, steps: Mapping[int, dict[str, Any]]) -> None:
    """A run with an id of its own whose checkpoints have the same steps and generations."""
    monkeypatch.setattr(runs, "RUN_ID", "other")
    for step, options in steps.items():
        save(LocalStorage(str(root)), step, seed=step, **options)
    monkeypatch.undo()


@pytest.mark.parametrize("is_attempt_gone", [False, True])
def test_the_manifest_of_another_run_is_not_taken(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_attempt_gone: bool
) -> None:
    other_run(tmp_path / "other", monkeypatch, {10: {}, 20: {}})
    (run / STEP / "manifest.json").unlink()
    if is_attempt_gone:
        shutil.rmtree(shard(run).parent)

    with pytest.raises(CorruptCheckpointError, match="very checkpoint"):
        prepare(run, at=f"/{STEP}", copies=(tmp_path / "other",))


def test_scheduler_and_streams_are_not_derived_from_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"T_max": 100, "base_lrs": [0.01], "last_epoch": 10, "_step_count": 11, "_last_lr": [0.005]}
    other = {"values": {**VALUES, "scheduler": {"kind": "stateful", "state": state}}}
    other_run(tmp_path / "other", monkeypatch, {10: other})
    left_out = without("scheduler", "rng")
    save(LocalStorage(str(tmp_path / "run")), 20, seed=2, tensors=tensors(2, has_rng=False), rng={}, **left_out)

    prepared = prepare(tmp_path / "run", copies=(tmp_path / "other",))

    assert "scheduler: not possible" in told(prepared)
    assert "seed made from the run's id" in told(prepared), told(prepared)


def test_a_stand_alone_checkpoint_is_repaired_beside_itself(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    for name in ("model-a", "model-b"):
        write_checkpoint(storage, 20, 0, tensors(2), world_size=WORLD, name=name, values=VALUES, rng=AXES)
    path = next(tmp_path.glob("model-a/*/rank00000.safetensors"))
    overwrite(path, 70_000, bytes(300))
    before = content(tmp_path, "model-a")

    apply_repair(prepare_repair(open_target(str(tmp_path / "model-a")), copies=[str(tmp_path / "model-b")]))

    assert content(tmp_path, "model-a") == before
    report = verify_checkpoint(storage, "model-a-repaired", is_run=False)
    assert (report.verdict, report.damages) == ("COMPLETE", ())


def test_a_copy_that_is_damaged_at_the_same_place_helps_nobody(run: Path, copy: Path) -> None:
    begin, _ = place_of(run, "model.weight")
    for root in (run, copy):
        overwrite(shard(root), begin + 66_000, bytes(range(1, 201)))

    assert prepare(run, copies=(copy,)).plan.refusals


def test_two_damaged_copies_make_one_good_file(run: Path, copy: Path, tmp_path: Path) -> None:
    reference = Path(shutil.copytree(copy, tmp_path / "reference"))
    begin, _ = place_of(run, "model.weight")
    overwrite(shard(run), begin, bytes(range(1, 201)))
    overwrite(shard(copy), begin + 66_000, bytes(range(1, 201)))

    repair(run, copies=(copy,))

    ensure_same_state(run, reference)


def test_another_job_that_began_meanwhile_wins(run: Path, copy: Path) -> None:
    DAMAGES["bytes"](run)
    prepared = prepare(run, copies=(copy,))
    parent, _ = Catalog(LocalStorage(str(run))).read_manifest("step-0000000010.g0001")
    write_checkpoint(LocalStorage(str(run)), 11, 2, tensors(3), world_size=WORLD, parent=parent)

    with pytest.raises(CommitConflictError):
        apply_repair(prepared)

    assert not (run / REPAIRED).exists()
    assert not list(run.glob(".tmp-*"))


def test_a_source_that_changes_between_plan_and_copy_is_noticed(run: Path, copy: Path) -> None:
    DAMAGES["bytes"](run)
    prepared = prepare(run, copies=(copy,))
    overwrite(shard(copy), 70_000, bytes(300))

    with pytest.raises(CorruptCheckpointError, match="plan again"):
        apply_repair(prepared)

    assert list_generations(LocalStorage(str(run))) == [1]
    assert not list(run.glob(".tmp-*"))


def test_a_storage_that_fails_while_writing_leaves_no_checkpoint(run: Path, copy: Path) -> None:
    DAMAGES["bytes"](run)
    prepared = prepare(run, copies=(copy,))

    def fail() -> None:
        raise StorageError("no", key="x")

    failpoint.arm({"after_shard_write": fail})
    with pytest.raises(StorageError):
        apply_repair(prepared)

    assert not (run / REPAIRED).exists()
    assert list_generations(LocalStorage(str(run))) == [1]


def die_before_commit(prepared: Prepared) -> None:
    def fail() -> None:
        raise StorageError("no", key="x")

    failpoint.arm({"after_generation": fail})
    with pytest.raises(StorageError):
        apply_repair(prepared)
    failpoint.disarm()


def test_a_repair_that_dies_after_its_record_takes_no_later_checkpoint_off_the_line(run: Path, copy: Path) -> None:
    save(LocalStorage(str(run)), 30, seed=3)
    before = Catalog(LocalStorage(str(run))).line()
    DAMAGES["bytes"](run)

    prepared = prepare(run, copies=(copy,))
    die_before_commit(prepared)

    assert prepared.plan.superseded == ("step-0000000030.g0001",)
    assert list_generations(LocalStorage(str(run))) == [1, 2]
    assert Catalog(LocalStorage(str(run))).line() == before
    apply_repair(prepare(run, copies=(copy,)))
    assert Catalog(LocalStorage(str(run))).line()[0].name == "step-0000000020.g0003"


def test_a_repair_into_a_new_run_that_died_is_repeated(run: Path, copy: Path, tmp_path: Path) -> None:
    DAMAGES["bytes"](run)
    target, into = open_target(f"{run}@20"), str(tmp_path / "new")
    die_before_commit(prepare_repair(target, copies=[str(copy)], into=into))

    apply_repair(prepare_repair(target, copies=[str(copy)], into=into))

    assert [item.name for item in Catalog(LocalStorage(into)).line()] == [REPAIRED]


def test_files_that_do_not_belong_are_left_behind(run: Path) -> None:
    """A safetensors file in the attempt is loaded by stock readers like the others; `verify` calls that corrupt."""
    stray = shard(run).parent / "other.safetensors"
    shutil.copy(shard(run), stray)
    assert verify_checkpoint(LocalStorage(str(run)), STEP, is_run=True).verdict == "CORRUPT"

    prepared = repair(run)

    assert "other.safetensors: left behind" in told(prepared)
    assert prepared.plan.num_written == 0


def test_the_start_of_an_epoch_is_never_derived(tmp_path: Path) -> None:
    """Its iterators would be made anew from another state: another order than the one that was half consumed."""
    root = tmp_path / "run"
    found = tensors(2, size=1)
    for rank in range(WORLD):
        states = {**streams_of(rank), "epoch.torch": streams_of(rank)["torch"], "epoch.python": streams_of(0)["python"]}
        found[f"rank.{rank}.values.rng"] = np.frombuffer(dump_json(states), np.uint8)
    axes = {**AXES, "epoch.torch": ("rank",), "epoch.python": ()}
    save(LocalStorage(str(root)), 20, seed=2, tensors=found, rng=axes)
    path, begin, _ = rng_place(root, 1)
    overwrite(path, begin, bytes(range(1, 201)))

    prepared = repair(root)

    assert "epoch.torch: an epoch that is resumed in its middle" in told(prepared)
    assert set(streams_in(root, 1)) == {"python", "numpy", "torch", "epoch.python"}


def test_show_says_what_a_repair_did(run: Path, copy: Path) -> None:
    DAMAGES["bytes"](run)
    repair(run, copies=(copy,))

    shown = CliRunner().invoke(main, ["show", f"{run}@{REPAIRED}"]).output

    assert f"{STEP} of run" in shown and "(repair)" in shown
    assert "rank00000.safetensors: restored: 65,536 bytes from byte 65,536 on" in shown
