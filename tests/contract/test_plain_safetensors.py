"""No lock-in, and nothing that executes: shard files are plain safetensors for readers that have never heard of dckpt."""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.support.dcp_jobs import save_run, save_state
from tests.support.stock_reader import digest

pytestmark = pytest.mark.distributed

PROGRAM = Path(__file__).parents[1] / "support" / "stock_reader.py"


@pytest.fixture(scope="module", params=[2, 3])
def attempt(request, ranks, tmp_path_factory):
    """The directory with the shard files of a run that FSDP2 saved on 2 and on 3 ranks; dead attempts lie around it."""
    root = tmp_path_factory.mktemp("run") / "gpt"
    name = ranks.run(save_run, request.param, str(root), "fsdp", 2)[0]
    (found,) = [path for path in (root / name).iterdir() if path.is_dir()]
    for number, leftover in enumerate((".tmp-", ".trash-")):
        dead = root / f"{leftover}{number:032x}" / f"{number:032x}"
        shutil.copytree(found, dead)
        (dead / "rank00000.safetensors").write_bytes(b"torn")
    return found


def assembled(directory: Path) -> dict[str, torch.Tensor]:
    """Whole tensors, put together from nothing but the files' own headers."""
    chunks: dict[str, list[tuple[list[int], torch.Tensor]]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            assert metadata["format"] == "pt"
            info = json.loads(metadata.get("DCP_SHARDING_INFO", "null"))
            assert info is None or set(info) == set(file.keys())
            for name in file.keys():  # noqa: SIM118 - not a dict
                part = file.get_tensor(name)
                offsets = [0] * part.dim() if info is None else info[name]["saved_offsets"]
                chunks.setdefault(name, []).append((offsets, part))
    whole = {}
    for name, parts in chunks.items():
        shape = [max(offsets[dim] + part.shape[dim] for offsets, part in parts) for dim in range(parts[0][1].dim())]
        whole[name] = torch.zeros(shape, dtype=parts[0][1].dtype)
        for offsets, part in parts:
            whole[name][tuple(slice(o, o + s) for o, s in zip(offsets, part.shape, strict=True))] = part
    return whole


def stock_load(directory: Path, world_size: int, tmp_path: Path) -> dict[str, str]:
    command = [sys.executable, "-I", str(PROGRAM), str(directory)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world_size), str(tmp_path / "rendezvous")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    told = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * world_size, told
    found: dict[str, str] = json.loads(told[0][0])
    return found


def test_the_files_of_an_attempt_open_with_safetensors_alone(attempt):
    whole = assembled(attempt)
    manifest = json.loads((attempt.parent / "manifest.json").read_bytes())
    files = sorted(path.name for path in attempt.glob("*.safetensors"))
    assert files == sorted(
        Path(entry["path"]).name for entry in manifest["files"] if entry["path"].endswith(".safetensors")
    )
    for name in ("model.embed.weight", "model.blocks.0.up.weight", "optim.embed.weight.exp_avg", "model.eighth"):
        assert name in whole
    assert whole["model.embed.weight"].shape == (11, 6)
    assert all(tensor.numel() for tensor in whole.values()), "tensors without elements are in the index only"


@pytest.mark.parametrize("world_size", [1, 2])
def test_torchs_own_reader_loads_and_reshards_an_attempt_without_dckpt(attempt, tmp_path, world_size):
    expected = {name: digest(tensor) for name, tensor in assembled(attempt).items()}
    assert stock_load(attempt, world_size, tmp_path) == expected


def test_the_program_that_reads_without_dckpt_really_cannot_import_it():
    code = (
        f"import runpy, sys; blocker = runpy.run_path({str(PROGRAM)!r})['Blocker']; "
        "sys.meta_path.insert(0, blocker()); import dckpt"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert told.returncode == 1
    assert "dckpt is blocked here" in told.stderr


@pytest.fixture(scope="module")
def standalone(ranks, tmp_path_factory):
    """A checkpoint of the DCP plug-in, with every kind of value in it."""
    url = tmp_path_factory.mktemp("alone") / "step-7"
    ranks.run(save_state, 2, str(url), 7)
    return url


def test_no_file_of_a_checkpoint_is_a_pickle(attempt, standalone):
    run = attempt.parents[1]
    files = [path for root in (run, standalone) for path in root.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".index", ".safetensors", ".sums"}
    for path in files:
        data = path.read_bytes()
        assert b"PK\x03\x04" not in data, f"{path} holds a zip archive"
        with pytest.raises(Exception):  # noqa: B017 - any refusal will do
            torch.load(io.BytesIO(data), weights_only=False)
        with pytest.raises(Exception):  # noqa: B017
            pickle.loads(data)
        with pytest.raises(Exception):  # noqa: B017
            list(pickletools.genops(data))
