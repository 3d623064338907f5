"""Around the validator: the probe batch, the watch over the first steps, frozen rows, the person at the terminal."""

from __future__ import annotations

import logging
import os
import pty
import random
import threading
import time

import pytest
import torch
from torch import nn

import dckpt
from dckpt.engine.abort_window import ask_to_go_on, has_person
from dckpt.resume.checks.probe import check_first_steps
from tests.support.resume_runs import SmallRun, found, open_run, save_run

BATCH = torch.linspace(-1, 1, 32).reshape(4, 8)


def probe_of(run: SmallRun, batch: torch.Tensor = BATCH, **options: bool) -> dckpt.Probe:
    return dckpt.Probe(lambda inputs: (run.model(inputs) - 1).square().mean(), batch, **options)


def save_with_probe(root, **options: bool) -> None:
    run = SmallRun()
    with open_run(root) as checkpointer:
        checkpointer.resume(run.state, probe=probe_of(run, **options))
        run.train(8)
        checkpointer.save(run.state, blocking=True)


def resume_with_probe(root, run: SmallRun, probe: dckpt.Probe, *, allow: tuple[str, ...] = ()) -> dckpt.ResumeReport:
    with open_run(root) as checkpointer:
        report = checkpointer.resume(run.state, probe=probe, policy=dckpt.ResumePolicy(allow=allow))
        assert report is not None
        return report


def test_the_probe_loss_of_an_unchanged_model_is_the_saved_one(tmp_path):
    save_with_probe(tmp_path / "run", gradient=True)
    run = SmallRun()
    report = resume_with_probe(tmp_path / "run", run, probe_of(run, gradient=True))

    assert found(report) == {}
    assert "probe_loss" not in {finding.check for finding in report.findings}
    assert report.loaded.manifest.facts["probe"]["gradient_norm"] > 0


def test_a_program_that_computes_something_else_is_found_by_the_probe(tmp_path):
    save_with_probe(tmp_path / "run")
    run = SmallRun()
    other = dckpt.Probe(lambda inputs: (run.model(inputs) - 1).abs().mean(), BATCH)
    report = resume_with_probe(tmp_path / "run", run, other, allow=("probe_loss",))

    assert found(report) == {"probe_loss": "warning"}


def test_another_probe_batch_is_not_compared(tmp_path):
    save_with_probe(tmp_path / "run")
    run = SmallRun()
    report = resume_with_probe(tmp_path / "run", run, probe_of(run, BATCH + 1))

    assert "probe_loss" in {finding.check for finding in report.not_checked}


def test_a_probe_changes_neither_modes_nor_gradients_nor_random_streams(tmp_path):
    run = SmallRun()
    run.model[2].eval()
    modes, streams = [module.training for module in run.model.modules()], torch.get_rng_state()
    run.model[1].track_running_stats = True
    stats = run.model[1].running_mean.clone()

    facts = probe_of(run, gradient=True).measure(run.state)

    assert facts["loss"] > 0
    assert [module.training for module in run.model.modules()] == modes
    assert all(parameter.grad is None for parameter in run.model.parameters())
    assert torch.equal(torch.get_rng_state(), streams)
    assert torch.equal(run.model[1].running_mean, stats)


# The first steps.

FALLING = [2.0 - 0.01 * step + 0.02 * (-1) ** step for step in range(40)]


def test_losses_that_go_on_are_no_alarm():
    after = [FALLING[-1] - 0.01 * step + 0.02 * (-1) ** step for step in range(20)]

    assert list(check_first_steps(FALLING, after, rates=[1e-3] * 20, saved_rate=1e-3, samples=8, saved_samples=8)) == []


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"after": [2.5]}, "the loss rose to"),
        ({"after": [1.6, float("nan")]}, "the loss is nan"),
        ({"after": [1.6], "rates": [1e-2], "saved_rate": 1e-3}, "the learning rate is 0.01"),
        ({"after": [1.6], "samples": 64, "saved_samples": 8}, "a step takes 64 samples"),
    ],
    ids=["spike", "nan", "rate", "samples"],
)
def test_a_break_in_the_first_steps_is_told(options, text):
    (finding,) = check_first_steps(FALLING, **options)

    assert finding.severity == "warning"
    assert text in finding.message


def test_a_loss_spike_after_a_real_resume_is_logged(tmp_path, caplog):
    save_run(tmp_path / "run", steps=30)
    run = SmallRun()
    with caplog.at_level(logging.WARNING, "dckpt"), open_run(tmp_path / "run") as checkpointer:
        checkpointer.resume(run.state)
        with torch.no_grad():
            run.model[4].weight.mul_(30)
        for _ in range(5):
            run.train(1)
            checkpointer.step(run.state)

    assert "[first_steps] the loss rose to" in caplog.text


def test_a_quiet_continuation_logs_nothing(tmp_path, caplog):
    save_run(tmp_path / "run", steps=30)
    run = SmallRun()
    with caplog.at_level(logging.WARNING, "dckpt"), open_run(tmp_path / "run") as checkpointer:
        checkpointer.resume(run.state)
        for _ in range(20):
            run.train(1)
            checkpointer.step(run.state)

    assert "first_steps" not in caplog.text


# Frozen rows.

BASE = 6


class Vocabulary:
    """An embedding of which the first rows must not train."""

    def __init__(self, *, masks: bool = True, weight_decay: float = 0.0) -> None:
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
        if masks:
            mask = (torch.arange(9) >= BASE).float().unsqueeze(1)
            self.model[0].weight.register_hook(lambda gradient: gradient * mask)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, weight_decay=weight_decay)
        self.progress = dckpt.TrainProgress(max_steps=100, batch=dckpt.Batch(9))
        self.state = dckpt.TrainState(
            model=self.model, optimizer=self.optimizer, progress=self.progress, frozen_rows={"0.weight": BASE}
        )

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.model(torch.arange(9)).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.progress.advance(loss=0.0)


def _save_vocabulary(root, **options) -> None:
    run = Vocabulary(**options)
    with open_run(root) as checkpointer:
        checkpointer.resume(run.state)
        run.train(3)
        checkpointer.save(run.state, blocking=True)


def _report_on_vocabulary(root) -> dckpt.ResumeReport:
    run = Vocabulary()
    with open_run(root) as checkpointer:
        return checkpointer.validate(run.state, checkpointer.load(run.state))


def test_rows_that_stayed_frozen_are_no_finding(tmp_path):
    _save_vocabulary(tmp_path / "run")

    assert found(_report_on_vocabulary(tmp_path / "run")) == {}


def test_a_mask_that_did_not_hold_is_found_by_rows_and_moments(tmp_path):
    _save_vocabulary(tmp_path / "run", masks=False)
    report = _report_on_vocabulary(tmp_path / "run")

    assert [finding.check for finding in report.critical] == ["frozen_rows", "frozen_rows"]
    assert "are not what they were at the start" in report.critical[0].message
    assert "have moments" in report.critical[1].message


def test_weight_decay_on_masked_rows_is_found(tmp_path):
    _save_vocabulary(tmp_path / "run", weight_decay=0.1)
    report = _report_on_vocabulary(tmp_path / "run")

    assert {finding.check for finding in report.critical} == {"frozen_rows"}, "decay has moved the rows already"


def test_the_base_is_that_of_the_start_also_after_several_resumes(tmp_path):
    _save_vocabulary(tmp_path / "run")
    run = Vocabulary()
    with open_run(tmp_path / "run") as checkpointer:
        checkpointer.resume(run.state)
        with torch.no_grad():
            run.model[0].weight[0] += 1
        run.train(1)
        checkpointer.save(run.state, blocking=True)

    assert "frozen_rows" in found(_report_on_vocabulary(tmp_path / "run"))


def test_rows_that_do_not_exist_are_refused(tmp_path):
    run = Vocabulary()
    run.state.frozen_rows = {"0.weight": (0, 99)}
    with open_run(tmp_path / "run") as checkpointer, pytest.raises(dckpt.DckptError, match="rows 0 to 99"):
        checkpointer.resume(run.state)


# The person at the terminal.


class Terminal:
    """A pseudo-terminal: what a person types, and what the program shows."""

    def __init__(self) -> None:
        self.person, program = pty.openpty()
        self.stdin, self.stderr = os.fdopen(program, "r"), os.fdopen(os.dup(program), "w")
        self.shown = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            while data := os.read(self.person, 4096):
                self.shown += data
        except OSError:
            return

    def text_until(self, end: str) -> str:
        """What was shown, once `end` was."""
        for _ in range(500):
            if end.encode() in self.shown:
                break
            time.sleep(0.01)
        return self.shown.decode()

    def close(self) -> None:
        self.stdin.close()
        self.stderr.close()
        self._reader.join(5)
        os.close(self.person)


@pytest.fixture
def terminal():
    made = Terminal()
    yield made
    made.close()


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    root = tmp_path_factory.mktemp("refused") / "run"
    save_run(root)
    run = SmallRun(batch=dckpt.Batch(64))
    with open_run(root) as checkpointer:
        return checkpointer.validate(run.state, checkpointer.load(run.state))


def test_a_person_who_says_yes_goes_on(terminal, refused):
    assert has_person(terminal.stdin, terminal.stderr)
    os.write(terminal.person, b"y\n")

    assert ask_to_go_on(refused, 10, terminal.stdin, terminal.stderr)


@pytest.mark.parametrize("answer", [b"n\n", b"\n", b""], ids=["no", "enter", "nothing"])
def test_without_a_yes_the_run_stops(terminal, refused, answer):
    if answer:
        os.write(terminal.person, answer)

    assert not ask_to_go_on(refused, 0.6, terminal.stdin, terminal.stderr)
    assert "global_batch" in terminal.text_until("Stopped.")
    assert "Stopping in" in terminal.text_until("Stopped.")


def test_a_pipe_is_nobody(tmp_path):
    with open(tmp_path / "empty", "w+") as nobody:
        assert not has_person(nobody, nobody)


# Programs that the report must not stop, and failures that must reach every rank as one.


def _resumes_quietly(root, build) -> None:
    """Saves a run that `build` makes (state, one step of it), and resumes a second one without a warning."""
    for is_second in (False, True):
        state, step = build()
        with open_run(root) as checkpointer:
            report = checkpointer.resume(state)
            if is_second:
                assert report is not None
                assert found(report) == {}
                return
            for _ in range(8):
                step()
            assert checkpointer.save(state, blocking=True).outcome == "committed"


def _built(make_schedulers, optimizer=torch.optim.Adam, max_steps: int = 50, by_hand: bool = False):
    def build():
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        made = optimizer(model.parameters(), lr=1e-2)
        schedulers = make_schedulers(made)
        progress = dckpt.TrainProgress(max_steps=max_steps, batch=dckpt.Batch(1))
        each = schedulers if isinstance(schedulers, dict) else {"": schedulers}
        state = dckpt.TrainState(model=model, optimizer=made, scheduler=schedulers, progress=progress)

        def step() -> None:
            model(torch.ones(1, 4)).sum().backward()
            made.step()
            made.zero_grad()
            for scheduler in each.values():
                scheduler.step()
            if by_hand:
                made.param_groups[0]["lr"] = 1e-4 * (progress.step + 1)
            progress.advance(loss=1.0)

        return state, step

    return build


TABLE = [1.0 - step / 10 for step in range(9)]

SCHEDULES = {
    "two on one optimizer": _built(
        lambda o: {
            "decay": torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
            "drops": torch.optim.lr_scheduler.MultiStepLR(o, [3, 30], 0.1),
        }
    ),
    "warm-up by hand": _built(lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.99**step), by_hand=True),
    "one cycle that moves betas": _built(lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, total_steps=40)),
    "one cycle at its end": _built(lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, total_steps=8)),
    "restarts": _built(lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3, T_mult=2)),
    "a table that ends": _built(lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: TABLE[step])),
}


@pytest.mark.parametrize("build", SCHEDULES.values(), ids=SCHEDULES)
def test_an_ordinary_schedule_is_no_finding(tmp_path, build):
    _resumes_quietly(tmp_path / "run", build)


def test_a_rate_function_that_draws_numbers_moves_no_stream(tmp_path):
    build = _built(lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda _: 1.0 + 0.0 * random.random()))
    state, step = build()
    with open_run(tmp_path / "run") as checkpointer:
        checkpointer.resume(state)
        step()
        before = random.getstate()
        checkpointer.save(state, blocking=True)
        assert random.getstate() == before
        loaded = checkpointer.load(state)
        before = random.getstate()
        checkpointer.validate(state, loaded)
        assert random.getstate() == before


def test_a_probe_that_fails_is_a_failed_save_and_training_goes_on(tmp_path):
    run = SmallRun()

    def fail(_: object) -> torch.Tensor:
        raise RuntimeError("out of memory")

    with open_run(tmp_path / "run") as checkpointer:
        checkpointer.resume(run.state, probe=dckpt.Probe(fail, BATCH))
        run.train(1)
        pending = checkpointer.save(run.state, blocking=True)

    assert pending.outcome == "failed"
    assert "out of memory" in str(pending.error)


def test_a_probe_loss_that_is_no_number_costs_no_save(tmp_path):
    run = SmallRun()
    with open_run(tmp_path / "run") as checkpointer:
        checkpointer.resume(run.state, probe=dckpt.Probe(lambda _: torch.tensor(float("nan")), BATCH))
        run.train(1)
        assert checkpointer.save(run.state, blocking=True).outcome == "committed"


def test_facts_of_an_object_that_means_something_else_by_it_are_left_out(tmp_path, caplog):
    class Odd:
        def facts(self) -> str:
            return "of life"

        def state_dict(self) -> dict[str, int]:
            return {}

        def load_state_dict(self, _: dict[str, int]) -> None: ...

    run = SmallRun()
    state = dckpt.TrainState(model=run.model, optimizer=run.optimizer, progress=run.progress, data=Odd())
    with open_run(tmp_path / "run") as checkpointer:
        checkpointer.resume(state)
        run.train(1)
        checkpointer.save(state, blocking=True)
        report = checkpointer.validate(state, checkpointer.load(state))

    assert found(report) == {}


def test_the_base_of_frozen_rows_is_carried_through_a_plain_load(tmp_path):
    _save_vocabulary(tmp_path / "run")
    run = Vocabulary()
    with open_run(tmp_path / "run") as checkpointer:
        loaded = checkpointer.load(run.state)
        run.train(1)
        checkpointer.save(run.state, blocking=True)
        again = checkpointer.load(run.state)

    assert again.manifest.facts["frozen_rows"] == loaded.manifest.facts["frozen_rows"]


def test_a_person_may_think_longer_than_the_deadline(terminal, refused):
    ticks: list[float] = []
    assert not ask_to_go_on(
        refused, 0.9, terminal.stdin, terminal.stderr, on_tick=lambda: ticks.append(time.monotonic())
    )

    assert len(ticks) >= 3


def test_a_checkpoint_saved_in_eval_mode_is_told_at_the_save_and_does_not_stop_a_run_that_trains(tmp_path, caplog):
    run = SmallRun()
    with caplog.at_level(logging.WARNING, "dckpt"), open_run(tmp_path / "run") as checkpointer:
        checkpointer.resume(run.state)
        run.train(2)
        run.model.eval()
        checkpointer.save(run.state, blocking=True)
    assert "in eval mode" in caplog.text

    run = SmallRun()
    with open_run(tmp_path / "run") as checkpointer:
        report = checkpointer.resume(run.state)
    assert report is not None
    assert found(report) == {"train_mode": "warning"}
