"""`dckpt doctor`: the verdict before a run starts, from manifests and file sizes alone."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

import dckpt
from dckpt.cli.main import main
from dckpt.tools.doctor import Settings, diagnose
from dckpt.tools.target import open_target
from tests.support.resume_runs import SmallRun, open_run, save_run

FACTS = {"dataset": "a", "tokenizer": "t"}


@pytest.fixture
def root(tmp_path) -> Path:
    save_run(tmp_path / "run", facts=FACTS, batch=dckpt.Batch(4, 2, 1))
    return tmp_path / "run"


def severities(root: Path, **settings) -> dict[str, str]:
    diagnosis = diagnose(open_target(str(root)), Settings(**settings))
    return {item.check: item.severity for item in diagnosis.findings if item.severity != "not checked"}


def test_the_same_settings_resume_cleanly(root):
    assert severities(root, facts=FACTS) == {}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"world_size": 2}, {"world_size": "info", "global_batch": "critical"}),
        ({"world_size": 2, "accumulation": 1}, {"world_size": "info", "global_batch": "info"}),
        ({"micro": 64}, {"global_batch": "critical"}),
        ({"max_steps": 12}, {"work_remains": "critical"}),
        ({"max_steps": 13}, {}),
        ({"facts": {"dataset": "b"}}, {"dataset": "critical"}),
        ({"facts": {"tokenizer": "u"}}, {"tokenizer": "critical"}),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_found(root, settings, expected):
    assert severities(root, **{"facts": FACTS, **settings}) == expected


def test_the_remedy_names_the_accumulation_that_keeps_the_batch(root):
    diagnosis = diagnose(open_target(str(root)), Settings(micro=1, facts=FACTS))

    assert "set accumulation to 8" in diagnosis.findings[0].remedy


def test_a_missing_file_is_critical_and_a_damaged_manifest_walks_back(root):
    run = SmallRun(batch=dckpt.Batch(4, 2, 1), facts=FACTS)
    with open_run(root) as checkpointer:
        checkpointer.resume(run.state)
        run.train(1)
        checkpointer.save(run.state, blocking=True)
    (root / "step-0000000013.g0002" / "manifest.json").write_text("{}")
    assert severities(root, facts=FACTS) == {"walked_back": "warning"}

    next((root / "step-0000000012.g0001").glob("*/*.safetensors")).unlink()
    assert severities(root, facts=FACTS) == {"walked_back": "warning", "files": "critical"}


def test_a_missing_file_of_the_newest_walks_back_as_resume_does(root):
    run = SmallRun(batch=dckpt.Batch(4, 2, 1), facts=FACTS)
    with open_run(root) as checkpointer:
        checkpointer.resume(run.state)
        run.train(1)
        checkpointer.save(run.state, blocking=True)
    next((root / "step-0000000013.g0002").glob("*/*.safetensors")).unlink()

    diagnosis = diagnose(open_target(str(root)), Settings(facts=FACTS))
    asked = diagnose(open_target(f"{root}@13"), Settings(facts=FACTS))
    again = SmallRun(batch=dckpt.Batch(4, 2, 1), facts=FACTS)
    with open_run(root) as checkpointer:
        resumed = checkpointer.resume(again.state)

    assert diagnosis.checkpoint == resumed.loaded.checkpoint == "step-0000000012.g0001"
    assert diagnosis.walked_past == resumed.loaded.damaged == ("step-0000000013.g0002",)
    walked = next(item for item in diagnosis.findings if item.check == "walked_back")
    assert ".safetensors: missing" in walked.message
    assert (diagnosis.exit_code, asked.exit_code) == (1, 2)
    assert [item.check for item in asked.findings if item.severity == "critical"] == ["files"]


def test_weights_alone_are_no_training_state(tmp_path):
    run = SmallRun()
    state = dckpt.TrainState(model=run.model)
    with open_run(tmp_path / "run") as checkpointer:
        checkpointer.resume(state)
        checkpointer.save(state, step=5, blocking=True)

    assert severities(tmp_path / "run")["training_parts"] == "critical"


def test_the_code_is_compared_with_a_work_tree(root, tmp_path):
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "train.py").write_text("pass\n")
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", "-C", str(tree), *command], check=True, capture_output=True)
    commit = subprocess.run(["git", "-C", str(tree), "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    facts = {**FACTS, "code": commit.stdout.strip()}
    save_run(tmp_path / "coded", facts=facts)

    assert severities(tmp_path / "coded", facts=facts, code=tree) == {}
    assert severities(tmp_path / "coded", facts={**facts, "code": "another"}, code=tree) == {"code": "warning"}


def invoke(*arguments: str):
    return CliRunner().invoke(main, ["doctor", *arguments], terminal_width=200)


def test_the_command_says_the_verdict_first_and_exits_with_it(root, tmp_path):
    (tmp_path / "facts.json").write_text(json.dumps(FACTS))
    clean = invoke(str(root), "--facts", str(tmp_path / "facts.json"))
    warned = invoke(str(root), "--max-steps", "1300", "--mesh", "tp=1", "--facts", str(tmp_path / "facts.json"))
    refused = invoke(f"{root}@12", "--micro-batch", "64")

    assert (clean.exit_code, clean.output.splitlines()[0][:24]) == (0, "It would resume cleanly.")
    assert warned.exit_code == 0
    assert (refused.exit_code, refused.output.splitlines()[0][:20]) == (2, "It would be refused.")
    assert "critical [global_batch]" in refused.output


def test_the_command_as_json(root):
    record = json.loads(invoke(str(root), "--micro-batch", "64", "--json").output)

    assert record["exit_code"] == 2
    assert record["findings"][0]["check"] == "global_batch"


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--mesh", "dp4"], 2, "expected axes and sizes"),
        (["--world-size", "0"], 2, "0 is not in the range"),
    ],
    ids=["mesh", "size"],
)
def test_wrong_options_are_refused(root, arguments, code, text):
    done = invoke(str(root), *arguments)

    assert done.exit_code == code
    assert text in done.output


def test_no_run_is_not_found(tmp_path):
    assert invoke(str(tmp_path)).exit_code == 3
