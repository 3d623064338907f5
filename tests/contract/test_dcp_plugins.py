"""`DckptWriter` and `DckptReader` under stock `dcp.save`, `dcp.async_save` and `dcp.load`, with real ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import dcp_jobs as jobs
from tests.support.jobs import train_and_save

pytestmark = pytest.mark.distributed

WORLDS = (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("world_size", "planner"), [(1, "stock"), (2, "stock"), (3, "stock"), (4, "stock"), (3, "dckpt")]
)
def test_a_state_saved_on_n_ranks_loads_on_m(ranks, tmp_path, world_size, planner):
    url = str(tmp_path / "step-100")
    ranks.run(jobs.save_state, world_size, url, 100, planner)
    for target in WORLDS:
        ranks.run(jobs.load_state, target, url, 100, planner)
    ranks.run(jobs.load_state, 1, url, 100, planner, has_group=False)


def test_a_state_saved_without_torch_distributed_loads_on_any_number_of_ranks(ranks, tmp_path):
    url = str(tmp_path / "step-100")
    ranks.run(jobs.save_state, 1, url, 100, has_group=False)
    for target in WORLDS:
        ranks.run(jobs.load_state, target, url, 100)


def test_tensors_on_a_mesh_of_two_dimensions_are_stored_once_and_reshard(ranks, tmp_path):
    ranks.run(jobs.save_and_load_on_meshes, 4, str(tmp_path))


@pytest.mark.parametrize("reuse", [True, False], ids=["one writer", "a writer each"])
@pytest.mark.parametrize("planner", ["stock", "dckpt"])
@pytest.mark.parametrize("caching", [True, False], ids=["plan caching", "no plan caching"])
def test_each_of_several_saves_holds_its_own_data_and_none_changes_later(ranks, tmp_path, caching, planner, reuse):
    ranks.run(jobs.save_series, 2, str(tmp_path), caching, planner, reuse)


def test_plan_caching_holds_on_three_ranks_too(ranks, tmp_path):
    ranks.run(jobs.save_series, 3, str(tmp_path), True, "stock", True)


@pytest.mark.parametrize("world_size", [1, 2])
def test_async_save_stores_the_state_at_the_call(ranks, tmp_path, world_size):
    ranks.run(jobs.save_async, world_size, str(tmp_path))


@pytest.mark.slow
def test_async_save_works_from_a_checkpointing_process(tmp_path):
    # The pool's ranks are daemons, which may have no children: these are processes of their own.
    rendezvous, root = tmp_path / "rendezvous", tmp_path / "checkpoints"
    command = [sys.executable, "-m", "tests.support.dcp_jobs"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), "2", str(rendezvous), str(root)],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        told = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], told


@pytest.mark.parametrize(
    ("kind", "world_size", "loads"),
    [("fsdp", 2, (1, 2, 3)), ("fsdp", 3, (2,)), ("ddp", 2, (1, 2)), ("fsdp1", 2, (2,))],
)
def test_torch_state_dict_helpers_round_trip_a_model_and_its_optimizer(ranks, tmp_path, kind, world_size, loads):
    url = str(tmp_path / "step-2")
    before = ranks.run(jobs.save_model, world_size, url, kind)[0]
    assert any(name.endswith("exp_avg") for name in before)
    for target in loads:
        after = ranks.run(jobs.load_model, target, url, kind)[0]
        assert after == before


def test_a_rank_may_hold_two_chunks_of_one_tensor(ranks, tmp_path):
    url = tmp_path / "banded"
    ranks.run(jobs.save_and_load_bands, 2, str(url))
    names = sorted(path.name for path in url.rglob("*.safetensors"))
    assert names == [f"rank{rank:05d}{part}.safetensors" for rank in range(2) for part in ("-1", "")]


REFUSED = {
    "no collectives": ("ConfigError", "use_collectives=True, found False"),
    "taken": ("CommitConflictError", "A committed checkpoint is never overwritten"),
    "tensor in a tuple": ("ConfigError", "Value pair: expected plain values, found tensors inside a tuple"),
    "object": ("ConfigError", "thing"),
    "lambda": ("ConfigError", "rule"),
    "complex128": ("ConfigError", "complex128"),
    "no url": ("ConfigError", "Give DckptWriter(url) or checkpoint_id=url"),
    "hidden url": ("ConfigError", "does not start with a dot"),
    "nothing there": ("", "expected a checkpoint's directory with a manifest.json, found none"),
    "one rank without a file": ("", "expected a checkpoint's directory with a manifest.json, found none"),
}


def test_what_cannot_be_stored_is_refused_by_name_on_every_rank(ranks, tmp_path):
    told = ranks.run(jobs.refusals, 2, str(tmp_path))
    for rank, found in enumerate(told):
        assert found.pop("visible") == "taken", "nothing that was refused became visible"
        assert set(found) == set(REFUSED)
        for case, (kind, words) in REFUSED.items():
            assert kind in found[case], (rank, case, found[case])
            assert words in found[case], (rank, case, found[case])


def test_the_load_planner_refuses_all_differences_at_once_and_changes_nothing(ranks, tmp_path):
    for told, sums in ranks.run(jobs.differences, 2, str(tmp_path)):
        for words in (
            "a: saved dtype torch.float32, live torch.int32",
            "b: saved shape [2, 2], live [2, 3]",
            "n: a tensor on one side, a value on the other",
            "new: not in the checkpoint",
            "extra: in the checkpoint, not in the state_dict",
        ):
            assert words in told
        assert sums == [0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("reuse", [True, False], ids=["the same writer", "a new writer"])
def test_a_rank_that_fails_to_write_fails_all_and_the_next_save_works(ranks, tmp_path, reuse):
    for told, visible in ranks.run(jobs.fail_then_save, 3, str(tmp_path), reuse):
        assert "CheckpointException" in told
        assert "Input/output error" in told
        assert "(RANK 1)" in told
        assert visible == []


def test_a_rank_that_fails_to_plan_does_not_put_the_writers_out_of_step(ranks, tmp_path):
    assert all("no plan" in told for told in ranks.run(jobs.fail_plan_then_save, 2, str(tmp_path)))


def test_no_dist_saves_one_checkpoint_a_rank(ranks, tmp_path):
    ranks.run(jobs.save_alone, 2, str(tmp_path))


def test_two_process_groups_save_side_by_side(ranks, tmp_path):
    ranks.run(jobs.save_in_group, 4, str(tmp_path))


def test_saving_leaves_no_threads_and_no_open_files_behind(ranks, tmp_path):
    for found in ranks.run(jobs.resources, 2, str(tmp_path)):
        assert found[1:] == found[:-1], found


@pytest.mark.parametrize(("kind", "world_size"), [("fsdp", 2), ("single", 1)])
def test_the_reader_takes_a_checkpoint_of_checkpointer_with_tied_names(ranks, tmp_path, kind, world_size):
    has_group = kind != "single"
    saved = ranks.run(train_and_save, world_size, str(tmp_path / "run"), kind, 2, has_group=has_group)[0]
    (checkpoint,) = (tmp_path / "run").glob("step-*")
    names = [name for name in saved if name.startswith(("model.", "optim.")) and ".norm." not in name]
    assert "model.embed.weight" in names
    for target in (1, 2):
        for found in ranks.run(jobs.load_checkpointer_names, target, str(checkpoint), [*names, "model.head.weight"]):
            assert found.pop("model.head.weight") == saved["model.embed.weight"], "a tied name is readable"
            assert found == {name: saved[name] for name in names}
