"""Foreign checkpoints: read without executing anything, judged, imported so that the run goes on bit for bit, never changed."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from dckpt.catalog.catalog import Catalog
from dckpt.catalog.generations import list_generations
from dckpt.cli.main import main
from dckpt.errors import ConfigError, CorruptCheckpointError
from dckpt.storage.local import LocalStorage
from dckpt.tools import foreign_torch
from dckpt.tools.foreign import read_foreign
from dckpt.tools.foreign_import import ImportRequest, apply_import, prepare_import
from dckpt.tools.foreign_torch import order_by_config, read_pickled
from dckpt.tools.foreign_verdict import verify_foreign
from dckpt.tools.verify import verify_checkpoint
from tests.support.foreign import ForeignRun, Kind, Net, losses_after_resume
from tests.support.repairs import read_tensor

KINDS: tuple[Kind, ...] = ("bin", "safetensors", "sharded", "bundle", "bundle beside weights")


def dckpt(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def content(place: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def options_for(run: ForeignRun, kind: Kind, place: Path) -> dict[str, Any]:
    """Safetensors do not keep the model's order and know no ties."""
    if kind not in ("safetensors", "sharded"):
        return {}
    order = place.parent / "order.txt"
    order.write_text("\n".join(run.names_in_order))
    return {"order": str(order), "ties": ("head.weight=embed.weight",)}


def imported(source: Path, root: Path, **options: Any) -> None:
    prepared = prepare_import(ImportRequest(str(source), str(root), **options))
    assert prepared.plan.refusals == ()
    apply_import(prepared)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_grouped", [True, False])
def test_an_imported_run_goes_on_bit_for_bit(tmp_path: Path, kind: Kind, is_grouped: bool) -> None:
    run = ForeignRun(is_grouped=is_grouped)
    run.train(5)
    source = run.write(tmp_path / "old", kind)
    before = content(source)
    straight = run.train(4)

    assert verify_foreign(str(source)).verdict == "COMPLETE"
    imported(source, tmp_path / "run", **options_for(run, kind, source))
    losses, step = losses_after_resume(tmp_path / "run", 4, is_grouped=is_grouped)

    assert step == 5
    assert losses == straight
    assert content(source) == before, "foreign files are only read"
    report = verify_checkpoint(LocalStorage(str(tmp_path / "run")), "step-0000000005.g0001", is_run=True)
    assert report.damages == ()
    assert [row.name for row in report.components if not row.is_present] == ["data"]


def test_the_manifest_says_where_it_comes_from(tmp_path: Path) -> None:
    run = ForeignRun()
    run.train(3)
    source = run.write(tmp_path / "old", "bin")

    imported(source, tmp_path / "run", batch=4)

    manifest, _ = Catalog(LocalStorage(str(tmp_path / "run"))).read_manifest("step-0000000003.g0001")
    assert manifest.lineage is not None
    assert (manifest.lineage.how, manifest.lineage.checkpoint, manifest.lineage.step) == ("import", "old", 3)
    state = manifest.values["progress"]["state"]  # type: ignore[index,call-overload]
    assert (state["samples"], state["epoch"], len(state["loss_history"])) == (12, 1, 3)  # type: ignore[index,call-overload]
    assert manifest.facts["max_steps"] == 100


def test_the_order_of_parameters_is_never_guessed(tmp_path: Path) -> None:
    """query and key have one shape: without an order their moments could be swapped, and training would go on."""
    run = ForeignRun()
    run.train(3)
    source = run.write(tmp_path / "old", "safetensors")

    prepared = prepare_import(ImportRequest(str(source), str(tmp_path / "run")))

    assert len(prepared.plan.refusals) == 1
    assert "nothing tells apart" in prepared.plan.refusals[0] and "--order" in prepared.plan.refusals[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", ["missing name", "unknown name", "other shapes"])
def test_an_order_that_does_not_fit_is_refused(tmp_path: Path, change: str) -> None:
    run = ForeignRun()
    run.train(3)
    source = run.write(tmp_path / "old", "safetensors")
    names = run.names_in_order
    changed = {
        "missing name": names[1:],
        "unknown name": [*names[1:], "nothing.weight"],
        "other shapes": [names[1], names[0], *names[2:]],
    }[change]
    order = tmp_path / "order.txt"
    order.write_text("\n".join(changed))

    prepared = prepare_import(ImportRequest(str(source), str(tmp_path / "run"), order=str(order)))

    assert prepared.plan.refusals


LEFT_OUT = {
    "optimizer.pt": ("optim", "moments are lost and are not invented"),
    "scheduler.pt": ("scheduler", "learning rate restarts"),
    "trainer_state.json": ("progress", "step and sample counts restart"),
    "rng_state.pth": ("rng", "random streams restart"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_is_missing_is_said_with_what_it_does(tmp_path: Path, name: str) -> None:
    run = ForeignRun()
    run.train(3)
    source = run.write(tmp_path / "old", "bin")
    (source / name).unlink()
    part, effect = LEFT_OUT[name]

    result = dckpt("verify", source)

    assert result.exit_code == 1
    assert f"No {part}" in result.stdout and effect in result.stdout and "PARTIAL" in result.stdout
    report = json.loads(dckpt("verify", source, "--json").stdout)
    assert [row[0] for row in report["components"] if not row[1]] == [part]


def test_repair_makes_a_run_with_random_streams_and_leaves_the_files(tmp_path: Path) -> None:
    run = ForeignRun()
    run.train(3)
    source = run.write(tmp_path / "old", "bin")
    (source / "rng_state.pth").unlink()
    before = content(source)

    result = dckpt("verify", source, "--fix", "--yes")

    assert result.exit_code == 0, result.output
    assert "random streams of rank 0  derived" in result.stdout
    assert content(source) == before
    _, step = losses_after_resume(tmp_path / "old-dckpt", 2)
    assert step == 3


def test_two_ranks_keep_their_streams_and_one_that_is_missing_is_derived(tmp_path: Path) -> None:
    run = ForeignRun()
    run.train(3)
    source = run.write(tmp_path / "old", "bin", ranks=2)
    whole = read_foreign(str(source))
    assert whole.ranks == 2 and whole.streams[0] == whole.streams[1]
    (source / "rng_state_0.pth").unlink()
    assert verify_foreign(str(source)).verdict == "PARTIAL"

    imported(source, tmp_path / "run", fill=True)

    manifest, _ = Catalog(LocalStorage(str(tmp_path / "run"))).read_manifest("step-0000000003.g0001")
    assert manifest.world_size == 2
    assert all(axes == ("rank",) for axes in manifest.rng.values())


def test_an_import_goes_into_an_empty_place_only(tmp_path: Path) -> None:
    run = ForeignRun()
    run.train(3)
    source = run.write(tmp_path / "old", "bin")
    imported(source, tmp_path / "run")

    with pytest.raises(ConfigError, match="another run"):
        prepare_import(ImportRequest(str(source), str(tmp_path / "run")))
    assert dckpt("import", source, tmp_path / "run", "--yes").exit_code == 2


def test_the_command_shows_its_plan_and_asks(tmp_path: Path) -> None:
    run = ForeignRun()
    run.train(3)
    source = run.write(tmp_path / "old", "bin")

    shown = dckpt("import", source, tmp_path / "run", "--dry-run")
    assert shown.exit_code == 0 and "moments of 13 parameters as AdamW" in shown.stdout
    assert not (tmp_path / "run").exists()
    assert dckpt("import", source, tmp_path / "run").exit_code == 2
    done = dckpt("import", source, tmp_path / "run", "--yes")

    assert done.exit_code == 0 and "step-0000000003.g0001 is committed" in done.stdout
    assert dckpt("import", tmp_path / "nothing", tmp_path / "other", "--yes").exit_code == 3


class Evil:
    def __reduce__(self) -> Any:
        return (os.system, ("touch executed",))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"])
def test_nothing_in_a_file_is_executed(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = ForeignRun()
    run.train(2)
    source = run.write(tmp_path / "old", "bin")
    torch.save({"state": Evil()}, source / name)

    result = dckpt("verify", source)

    assert result.exit_code == 4
    assert "could execute" in result.stdout and "Nothing in a file is ever executed" in result.stdout
    assert dckpt("import", source, tmp_path / "run", "--yes").exit_code == 4
    assert not (tmp_path / "executed").exists() and not (tmp_path / "run").exists()


def test_an_array_of_objects_is_not_read(tmp_path: Path) -> None:
    torch.save({"numpy": np.array([Evil()], dtype=object)}, tmp_path / "x.pt")

    with pytest.raises(CorruptCheckpointError):
        read_pickled(tmp_path / "x.pt")


@pytest.mark.parametrize("size", [0, 10, 200, 5000])
@pytest.mark.parametrize("name", ["optimizer.pt", "pytorch_model.bin", "model.safetensors", "trainer_state.json"])
def test_a_file_that_is_cut_short_is_named(tmp_path: Path, name: str, size: int) -> None:
    run = ForeignRun()
    run.train(2)
    source = run.write(tmp_path / "old", "safetensors" if name.endswith("safetensors") else "bin")
    data = (source / name).read_bytes()
    (source / name).write_bytes(data[: min(size, len(data) // 2)])

    report = verify_foreign(str(source))

    assert report.verdict == "CORRUPT"
    assert name in report.damages[0]
    assert dckpt("verify", source).exit_code == 4


STREAM = {"torch": torch.get_rng_state()}


def doubled(times: int) -> list[Any]:
    """A list that names itself 2^times times, in a few bytes."""
    found: list[Any] = [1]
    for _ in range(times):
        found = [found, found]
    return found


def nested_in_itself() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


HOSTILE: dict[str, Callable[[], dict[str, Any]]] = {
    "expanded to a terabyte": lambda: {"model": {"w": torch.zeros(1).expand(2**38)}},
    "expanded often": lambda: {"model": {str(n): torch.zeros(1).expand(64, 64) for n in range(20)}},
    "doubled forty times": lambda: {"x": doubled(40)},
    "nested in itself": lambda: {"x": nested_in_itself()},
    "nested deep": lambda: {"x": functools.reduce(lambda inner, _: [inner], range(80), 1)},
    "three billion ranks": lambda: {"rng": {"3000000000": STREAM}},
    "a rank of a million": lambda: {"rng": {"0": STREAM, "999999": STREAM}},
    "a digit that is no number": lambda: {"rng": {"\u00b2": STREAM}},
    "a rank without a state": lambda: {"rng": [None] * 1000},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_small_file_that_asks_for_much_is_refused(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign_torch, "NODES_MAX", 20_000)
    torch.save({"model": {"w": torch.zeros(1)}, **HOSTILE[kind]()}, tmp_path / "x.pt")
    assert (tmp_path / "x.pt").stat().st_size < 40_000

    report = verify_foreign(str(tmp_path / "x.pt"))

    assert report.verdict == "CORRUPT"
    assert len(report.damages) == 1 and "x.pt" in report.damages[0]
    with pytest.raises(CorruptCheckpointError):
        prepare_import(ImportRequest(str(tmp_path / "x.pt"), str(tmp_path / "run")))


def weights_file(place: Path, weights: dict[str, torch.Tensor]) -> Path:
    place.mkdir()
    torch.save(weights, place / "pytorch_model.bin")
    return place


def test_only_the_same_elements_in_the_same_order_are_a_tied_tensor(tmp_path: Path) -> None:
    """A transposed view begins at the same address and has the same shape."""
    held = torch.arange(16.0).reshape(4, 4)
    weights = {"enc": held, "tied": held, "dec": held.t()}
    source = weights_file(tmp_path / "old", weights)

    imported(str(source), tmp_path / "run", fill=True)

    manifest, _ = Catalog(LocalStorage(str(tmp_path / "run"))).read_manifest("step-0000000000.g0001")
    assert manifest.aliases == {"model.tied": "model.enc"}
    for name in ("enc", "dec"):
        data = read_tensor(tmp_path / "run", "step-0000000000.g0001", f"model.{name}")
        assert data == weights[name].contiguous().numpy().tobytes(), name


@pytest.mark.parametrize("change", ["replaced", "gone", "one more"])
def test_files_that_change_between_plan_and_import_are_noticed(tmp_path: Path, change: str) -> None:
    run = ForeignRun()
    run.train(2)
    source = run.write(tmp_path / "old", "bin")
    prepared = prepare_import(ImportRequest(str(source), str(tmp_path / "run")))
    if change == "replaced":
        (source / "scheduler.pt").write_bytes((source / "optimizer.pt").read_bytes())
    elif change == "gone":
        (source / "scheduler.pt").unlink()
    else:
        (source / "scaler.pt").write_bytes(b"x")

    with pytest.raises(CorruptCheckpointError, match="plan again"):
        apply_import(prepared)

    assert Catalog(LocalStorage(str(tmp_path / "run"))).checkpoints() == []
    assert list_generations(LocalStorage(str(tmp_path / "run"))) == []


def test_a_tensor_that_has_no_place_in_a_schedulers_state_is_an_error_with_its_path(tmp_path: Path) -> None:
    source = weights_file(tmp_path / "old", {"w": torch.zeros(2)})
    torch.save({"last_epoch": 3, "rates": [{"table": torch.arange(3.0)}]}, source / "scheduler.pt")

    with pytest.raises(ConfigError, match=r"scheduler\.rates\[0\]\.table: .* F32 \[3\]"):
        prepare_import(ImportRequest(str(source), str(tmp_path / "run")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int16, torch.uint32, torch.bool])
def test_a_tensor_with_one_number_is_that_number(tmp_path: Path, dtype: torch.dtype) -> None:
    source = weights_file(tmp_path / "old", {"w": torch.zeros(2)})
    torch.save({"last_lr": torch.tensor([1.0]).to(dtype)}, source / "scheduler.pt")

    prepared = prepare_import(ImportRequest(str(source), str(tmp_path / "run")))

    state = prepared.manifest.values["scheduler"]["state"]  # type: ignore[index,call-overload]
    assert state == {"last_lr": 1}


@pytest.mark.parametrize(
    "kind", ["Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adadelta", "RMSprop", "Adagrad", "SGD", "Rprop"]
)
def test_the_class_of_an_optimizer_is_told_or_asked_for(tmp_path: Path, kind: str) -> None:
    model = torch.nn.Linear(2, 2)
    options = {"momentum": 0.9} if kind == "SGD" else {}
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.01, **options)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    source = weights_file(tmp_path / "old", model.state_dict())
    torch.save(optimizer.state_dict(), source / "optimizer.pt")

    prepared = prepare_import(ImportRequest(str(source), str(tmp_path / "run")))

    if kind == "Rprop":
        assert "--optimizer" in prepared.plan.refusals[0]
    else:
        assert prepared.manifest.values["optim"]["optimizers"][""]["class"] == kind  # type: ignore[index,call-overload]


CONFIGS: dict[str, Any] = {
    "names that are none": {"architectures": [["Net"]]},
    "a name that is none": {"architectures": 7},
    "a billion layers": {"architectures": ["Net"], "num_hidden_layers": 10**9},
    "a billion layers in a part": {"architectures": ["Net"], "text_config": {"n_layer": 10**9}},
    "a billion experts in a list": {"architectures": ["Net"], "experts": [1, 10**9]},
    "a billion labels": {"architectures": ["Net"], "num_labels": 10**9},
    "no object": [1, 2],
    "what the class refuses": {"architectures": ["Net"], "width": "wide"},
}


class _AutoConfig:
    @staticmethod
    def from_pretrained(directory: Path, *, local_files_only: bool, trust_remote_code: bool) -> SimpleNamespace:
        assert local_files_only and not trust_remote_code
        return SimpleNamespace(**json.loads((directory / "config.json").read_text()))


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A package in place of transformers, which builds `Net`; what it was told of its attention."""
    told: list[str] = []

    class Built(Net):
        def __init__(self, config: SimpleNamespace) -> None:
            told.append(config._attn_implementation)
            super().__init__(int(config.width))

    module = ModuleType("transformers")
    module.__dict__.update(AutoConfig=_AutoConfig, Net=Built, __version__="0")
    monkeypatch.setitem(sys.modules, "transformers", module)
    return told


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_that_is_none_is_refused_before_anything_is_built(
    tmp_path: Path, kind: str, attention: list[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[kind]))

    with pytest.raises(CorruptCheckpointError, match=r"config\.json"):
        order_by_config(tmp_path, num_weights=20)

    assert attention in ([], ["eager"])


def test_an_implementation_that_lies_elsewhere_is_never_fetched(tmp_path: Path, attention: list[str]) -> None:
    config = {"architectures": ["Net"], "width": 8, "num_hidden_layers": 2, "_attn_implementation": "owner/repo"}
    (tmp_path / "config.json").write_text(json.dumps(config))

    order = order_by_config(tmp_path, num_weights=20)

    assert attention == ["eager"]
    assert order is not None
    assert order.names == tuple(name for name, _ in Net().named_parameters())


def test_adam_of_older_torch_is_not_guessed(tmp_path: Path) -> None:
    """Without `decoupled_weight_decay` Adam and AdamW look the same, and decay weights in two ways."""
    run = ForeignRun()
    run.train(2)
    source = run.write(tmp_path / "old", "bin")
    found = run.optimizer.state_dict()
    for group in found["param_groups"]:
        del group["decoupled_weight_decay"]
    torch.save(found, source / "optimizer.pt")
    request = ImportRequest(str(source), str(tmp_path / "run"), order=options_for(run, "sharded", source)["order"])

    refused, told = prepare_import(request), prepare_import(replace(request, optimizer="AdamW"))

    assert "--optimizer" in refused.plan.refusals[0]
    assert told.plan.refusals == ()


def test_a_missing_shard_of_the_weights_is_named(tmp_path: Path) -> None:
    run = ForeignRun()
    run.train(2)
    source = run.write(tmp_path / "old", "sharded")
    (source / "model-00002-of-00002.safetensors").unlink()

    report = verify_foreign(str(source))

    assert report.verdict == "CORRUPT"
    assert "model-00002-of-00002.safetensors" in report.damages[0]


def test_a_run_of_ours_is_not_taken_for_a_foreign_one(tmp_path: Path) -> None:
    run = ForeignRun()
    run.train(2)
    imported(run.write(tmp_path / "old", "bin"), tmp_path / "run")

    assert "step-0000000002.g0001" in dckpt("verify", tmp_path / "run").stdout


def test_the_files_of_the_real_trainer_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments by name are those that the trainer's own optimizer has after its own load."""
    missing = [name for name in ("transformers", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed: the files are imitated in the other tests")
    from tests.support.trainer import resume_imported, train

    source, moments, rates = train(tmp_path)
    imported(source, tmp_path / "run", batch=8)

    found, found_rates, step = resume_imported(tmp_path / "run")

    assert step == 4
    assert found_rates == rates
    assert found.keys() == moments.keys()
    for name, value in moments.items():
        assert torch.equal(found[name], value), name


KILLED = """
import os, signal, sys
from dckpt import failpoint
from dckpt.cli.main import main
failpoint.arm({sys.argv.pop(1): lambda: os.kill(os.getpid(), signal.SIGKILL)})
main()
"""


@pytest.mark.crash
@pytest.mark.parametrize("point", ["mid_shard_write", "after_manifest", "after_generation"])
def test_an_import_that_is_killed_is_as_if_it_had_not_been(tmp_path: Path, point: str) -> None:
    run = ForeignRun()
    run.train(2)
    source = run.write(tmp_path / "old", "bin")
    root = tmp_path / "run"

    command = [sys.executable, "-c", KILLED, point, "import", str(source), str(root), "--yes"]
    killed = subprocess.run(command, capture_output=True, timeout=60, check=False)

    assert killed.returncode == -signal.SIGKILL
    assert Catalog(LocalStorage(str(root))).checkpoints() == []
    assert dckpt("import", source, root, "--yes").exit_code == 0
    assert losses_after_resume(root, 1)[1] == 2
