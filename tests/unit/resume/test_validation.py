"""The validator on one process: silent on clean resumes, loud on spoiled ones, and it changes nothing."""

from __future__ import annotations

import json
import logging

import pytest
import torch

import dckpt
from tests.support.resume_runs import SmallRun, found, open_run, report_on, save_run


@pytest.fixture
def root(tmp_path):
    save_run(tmp_path / "run")
    return tmp_path / "run"


def test_a_clean_resume_has_nothing_to_say(root):
    report = report_on(root)

    assert found(report) == {}
    assert report.passed > 30
    assert report.exit_code == 0


def test_a_validation_changes_nothing(root):
    run = SmallRun()
    with open_run(root) as checkpointer:
        loaded = checkpointer.load(run.state)
        before, streams = _bytes_of(run), torch.get_rng_state()
        checkpointer.validate(run.state, loaded)

        assert _bytes_of(run) == before
        assert torch.equal(torch.get_rng_state(), streams)


def _bytes_of(run: SmallRun) -> dict[str, object]:
    tensors = {f"model.{k}": v.numpy().tobytes() for k, v in run.model.state_dict().items()}
    for number, held in enumerate(run.optimizer.state.values()):
        tensors |= {f"optim.{number}.{k}": v.numpy().tobytes() for k, v in held.items()}
    modes = {f"mode.{name}": module.training for name, module in run.model.named_modules()}
    options = [{k: v for k, v in group.items() if k != "params"} for group in run.optimizer.param_groups]
    return {**tensors, **modes, "options": repr(options), "scheduler": repr(run.scheduler.state_dict())}


def _zero_moments(run):
    for held in run.optimizer.state.values():
        held["exp_avg"].zero_()
        held["exp_avg_sq"].zero_()


def _swap_moments(run):
    first, second = [held for param, held in run.optimizer.state.items() if param.ndim == 2][:2]
    flat_first, flat_second = first["exp_avg_sq"].view(-1), second["exp_avg_sq"].view(-1)
    count = min(flat_first.numel(), flat_second.numel())
    kept = flat_first[:count].clone()
    flat_first[:count] = flat_second[:count]
    flat_second[:count] = kept


def _nan_moment(run):
    next(iter(run.optimizer.state.values()))["exp_avg"].view(-1)[3] = float("nan")


def _negative_square(run):
    next(iter(run.optimizer.state.values()))["exp_avg_sq"].view(-1)[0] = -1.0


def _nan_weight(run):
    run.model[0].weight.data[0, 0] = float("inf")


def _negative_variance(run):
    run.model[1].running_var[0] = -1.0


def _eval(run):
    run.model.eval()


def _freeze(run):
    run.model[0].weight.requires_grad_(False)


def _scale_rate(run):
    run.optimizer.param_groups[0]["lr"] *= 1.01


def _step_scheduler(run):
    run.scheduler.step()


def _change_betas(run):
    run.optimizer.param_groups[0]["betas"] = (0.9, 0.999)


def _leave_gradient(run):
    run.model[0].weight.grad = torch.ones_like(run.model[0].weight)


def _step_counter(run):
    for held in run.optimizer.state.values():
        held["step"].fill_(1.0)


def _counter(run):
    run.progress.step += 1


SPOILED = {
    _zero_moments: {"moments_lost": "critical"},
    _swap_moments: {"moments_coherent": "critical"},
    _nan_moment: {"moments_valid": "critical"},
    _negative_square: {"moments_valid": "critical"},
    _nan_weight: {"finite_weights": "critical"},
    _negative_variance: {"buffers": "critical"},
    _eval: {"train_mode": "critical"},
    _freeze: {"trainable": "critical"},
    _scale_rate: {"learning_rate": "critical"},
    _step_scheduler: {"scheduler": "critical", "learning_rate": "critical", "schedule_continues": "warning"},
    _change_betas: {"optimizer_options": "critical"},
    _leave_gradient: {"gradients": "critical"},
    _step_counter: {"optimizer_steps": "critical"},
    _counter: {"same_checkpoint": "critical"},
}


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__.lstrip("_"))
def test_what_is_spoiled_after_the_load_is_found(root, spoil):
    report = report_on(root, spoil)

    assert SPOILED[spoil].items() <= found(report).items(), report.text()
    for finding in report.critical:
        assert finding.expected
        assert finding.found
        assert finding.remedy.rstrip(".").lower() in finding.message.lower()


BUILT = [
    ({"batch": dckpt.Batch(64)}, {"global_batch": "critical"}),
    ({"total": 50}, {"schedule": "critical", "scheduler": "warning"}),
    ({"lr": 2e-2}, {"schedule": "critical"}),
    ({"weight_decay": 0.2}, {"param_groups": "warning"}),
    ({"dropout": 0.0}, {"dropout": "warning"}),
    ({"max_steps": 12}, {"work_remains": "critical"}),
    ({"facts": {"dataset": "b", "split": 2, "tokenizer": "y", "vocab_size": 6, "seed": 4, "config": {"depth": 2}}},
     {"dataset": "critical", "split": "critical", "tokenizer": "critical", "vocab_size": "critical", "seed": "warning",
      "config": "warning"}),
]  # fmt: skip


@pytest.mark.parametrize(("options", "expected"), BUILT, ids=lambda value: "-".join(value))
def test_what_the_program_builds_otherwise_is_found(tmp_path, options, expected):
    facts = {"dataset": "a", "split": 1, "tokenizer": "x", "vocab_size": 5, "seed": 3, "config": {"depth": 1}}
    save_run(tmp_path / "run", facts=facts)

    assert expected.items() <= found(report_on(tmp_path / "run", **{"facts": facts, **options})).items()


def test_a_missing_fact_is_not_checked_and_no_pass(root):
    report = report_on(root)

    assert {"dataset", "split", "tokenizer", "config"} <= {finding.check for finding in report.not_checked}
    assert found(report) == {}


def test_a_critical_finding_stops_the_resume_and_names_itself(root):
    run = SmallRun(batch=dckpt.Batch(64))
    with open_run(root) as checkpointer:
        with pytest.raises(dckpt.ResumeRejectedError, match="global batch was 4") as refused:
            checkpointer.resume(run.state)
        with pytest.raises(dckpt.ConfigError, match="resume"):
            checkpointer.save(run.state)

    assert [item["check"] for item in refused.value.report["findings"] if item["severity"] == "critical"] == [
        "global_batch"
    ]


def test_an_allowed_finding_lets_pass_and_the_next_checkpoint_says_so(root):
    run = SmallRun(batch=dckpt.Batch(64))
    with open_run(root) as checkpointer:
        report = checkpointer.resume(run.state, policy=dckpt.ResumePolicy(allow=["global_batch"]))
        run.train(1)
        checkpointer.save(run.state, blocking=True)
        loaded = checkpointer.load(run.state)

    assert found(report) == {"global_batch": "warning"}
    assert loaded.manifest.facts["resumed"]["allowed"] == ["global_batch"]


def test_a_name_that_no_check_has_is_refused():
    with pytest.raises(dckpt.ConfigError, match="globalbatch"):
        dckpt.ResumePolicy(allow=["globalbatch"])


def test_the_report_is_kept_beside_the_run_and_logged_once(root, caplog):
    run = SmallRun()
    with caplog.at_level(logging.INFO), open_run(root) as checkpointer:
        report = checkpointer.resume(run.state)
    (kept,) = (root / "reports").iterdir()

    assert json.loads(kept.read_text()) == json.loads(json.dumps(report.to_json()))
    assert sum("checks passed" in record.getMessage() for record in caplog.records) == 1
