"""overlap=True: what is saved is the state at the call, whatever training does before the copies are done."""

from __future__ import annotations

import logging
import threading

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks, register_optimizer_step_pre_hook

import dckpt
from dckpt.dcp.chunks import copy_to_bytes
from dckpt.engine import deferred
from dckpt.engine.overlap import overlap_obstacle
from tests.support.models import RunningMean

WIDTH = 192  # 144 KiB a matrix: above what is copied at once


class Brake:
    """Lets deferred copies begin only when it is released; counts those that were held."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self.held = 0

    def copy(self, tensor, target) -> None:
        if threading.current_thread().name == "dckpt-stage":
            self.held += not self.released.is_set()
            assert self.released.wait(30)
        copy_to_bytes(tensor, target)


@pytest.fixture
def brake(monkeypatch):
    found = Brake()
    monkeypatch.setattr(deferred, "copy_to_bytes", found.copy)
    yield found
    found.released.set()


class Loop:
    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(WIDTH, WIDTH), RunningMean(WIDTH), nn.Linear(WIDTH, WIDTH))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, foreach=False)
        self.progress = dckpt.TrainProgress(max_steps=100)
        self.state = dckpt.TrainState(model=self.model, optimizer=self.optimizer, progress=self.progress)

    def backward(self) -> None:
        self.model(torch.randn(8, WIDTH)).square().mean().backward()

    def step(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.advance()

    def content(self) -> dict[str, torch.Tensor]:
        found = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for number, held in self.optimizer.state_dict()["state"].items():
            found |= {f"optim.{number}.{key}": value for key, value in held.items()}
        return {name: tensor.detach().clone() for name, tensor in found.items()}


def loaded(root) -> dict[str, torch.Tensor]:
    other = Loop(seed=1)
    with dckpt.Checkpointer(root, signals=()) as checkpointer:
        checkpointer.load(other.state)
    return other.content()


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def begun(tmp_path, loop) -> dckpt.Checkpointer:
    checkpointer = dckpt.Checkpointer(tmp_path / "run", signals=(), overlap=True)
    checkpointer.resume(loop.state)
    loop.step()
    return checkpointer


def release_soon(brake: Brake, *, after_s: float = 0.3) -> threading.Timer:
    timer = threading.Timer(after_s, brake.released.set)
    timer.start()
    return timer


def test_save_returns_while_parameters_are_copied_and_the_next_step_waits_for_them(tmp_path, brake):
    """Forward, backward and the buffers they change go on; the optimizer does not."""
    loop = Loop()
    with begun(tmp_path, loop) as checkpointer:
        expected = loop.content()
        pending = checkpointer.save(loop.state)
        assert not pending.staged
        loop.backward()
        assert not torch.equal(loop.model[1].mean, expected["model.1.mean"])
        assert not pending.staged
        release_soon(brake)
        loop.optimizer.step()
        assert pending.staged
        assert pending.wait() == "committed"
        assert pending.seconds_stalled >= 0.2

    assert brake.held
    assert_equal(loaded(tmp_path / "run"), expected)


def test_a_hook_of_the_trainer_that_came_first_runs_after_ours(tmp_path, brake):
    loop = Loop()

    def shrink(*_) -> None:
        with torch.no_grad():
            for parameter in loop.model.parameters():
                parameter.mul_(0.5)

    loop.optimizer.register_step_pre_hook(shrink)
    everyone = register_optimizer_step_pre_hook(shrink)
    try:
        with begun(tmp_path, loop) as checkpointer:
            expected = loop.content()
            pending = checkpointer.save(loop.state)
            release_soon(brake)
            loop.step()
            assert pending.wait() == "committed"
    finally:
        everyone.remove()

    assert brake.held
    assert_equal(loaded(tmp_path / "run"), expected)


class TwoOptimizers(Loop):
    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.others = torch.optim.SGD(self.model[2].parameters(), lr=0.1, momentum=0.9)
        self.optimizer = torch.optim.AdamW(self.model[0].parameters(), lr=1e-2)
        self.state = dckpt.TrainState(
            model=self.model, optimizer={"a": self.optimizer, "b": self.others}, progress=self.progress
        )

    def step(self) -> None:
        self.backward()
        self.others.step()
        self.optimizer.step()
        self.progress.advance()

    def content(self) -> dict[str, torch.Tensor]:
        momentum = self.others.state_dict()["state"]
        return super().content() | {f"b.{n}": held["momentum_buffer"].clone() for n, held in momentum.items()}


def test_either_of_two_optimizers_waits(tmp_path, brake):
    loop = TwoOptimizers()
    with begun(tmp_path, loop) as checkpointer:
        expected = loop.content()
        pending = checkpointer.save(loop.state)
        release_soon(brake)
        loop.step()
        assert pending.wait() == "committed"

    other = TwoOptimizers(seed=1)
    with dckpt.Checkpointer(tmp_path / "run", signals=()) as checkpointer:
        checkpointer.load(other.state)
    assert brake.held
    assert_equal(other.content(), expected)


def test_an_optimizer_that_is_not_saved_does_not_wait(tmp_path, brake):
    loop, stranger = Loop(), nn.Linear(3, 3)
    optimizer = torch.optim.SGD(stranger.parameters(), lr=0.1)
    with begun(tmp_path, loop) as checkpointer:
        pending = checkpointer.save(loop.state)
        stranger(torch.ones(3)).sum().backward()
        optimizer.step()
        assert not pending.staged
        brake.released.set()
        assert pending.wait() == "committed"


def test_a_parameter_that_is_changed_in_place_before_it_was_copied_fails_that_save_by_name(tmp_path, brake):
    loop = Loop()
    with begun(tmp_path, loop) as checkpointer:
        pending = checkpointer.save(loop.state)
        with torch.no_grad():
            loop.model[2].weight.clamp_(-0.01, 0.01)
        brake.released.set()
        assert pending.wait() == "failed"
        assert "model.2.weight" in str(pending.error)
        assert "overlap=False" in str(pending.error)
        loop.step()
        expected = loop.content()
        assert checkpointer.save(loop.state).wait() == "committed"

    assert_equal(loaded(tmp_path / "run"), expected)


def test_a_change_after_the_copy_is_no_fault(tmp_path, brake):
    loop = Loop()
    with begun(tmp_path, loop) as checkpointer:
        expected = loop.content()
        brake.released.set()
        pending = checkpointer.save(loop.state)
        while not pending.staged:
            pass
        with torch.no_grad():
            loop.model[2].weight.zero_()
        assert pending.wait() == "committed"

    assert_equal(loaded(tmp_path / "run"), expected)


def test_a_step_inside_a_compiled_function_waits_too(tmp_path, brake):
    loop = Loop()

    @torch.compile(backend="eager")
    def train() -> None:
        loop.model(torch.ones(8, WIDTH)).square().mean().backward()
        loop.optimizer.step()
        loop.optimizer.zero_grad()

    with dckpt.Checkpointer(tmp_path / "run", signals=(), overlap=True) as checkpointer:
        checkpointer.resume(loop.state)
        train()
        loop.progress.advance()
        expected = loop.content()
        pending = checkpointer.save(loop.state)
        release_soon(brake)
        train()
        assert pending.wait() == "committed"

    assert brake.held
    assert_equal(loaded(tmp_path / "run"), expected)


def test_without_a_thread_to_start_everything_is_copied_at_once(tmp_path, brake, monkeypatch):
    loop = Loop()
    with begun(tmp_path, loop) as checkpointer:
        expected = loop.content()
        start = threading.Thread.start

        def refuse(self) -> None:
            if self.name == "dckpt-stage":
                raise RuntimeError("can't start new thread")
            start(self)

        monkeypatch.setattr(threading.Thread, "start", refuse)
        pending = checkpointer.save(loop.state)
        assert pending.staged
        loop.step()
        assert pending.wait() == "committed"

    assert_equal(loaded(tmp_path / "run"), expected)


def test_a_load_waits_for_the_copies(tmp_path, brake):
    loop = Loop()
    with begun(tmp_path, loop) as checkpointer:
        expected = loop.content()
        checkpointer.save(loop.state)
        release_soon(brake)
        checkpointer.load(loop.state)
        assert_equal(loop.content(), expected)


def test_a_blocking_save_copies_nothing_behind_the_training(tmp_path, brake):
    loop = Loop()
    with begun(tmp_path, loop) as checkpointer:
        assert checkpointer.save(loop.state, blocking=True).outcome == "committed"
    assert not brake.held


def _optimizer(**options) -> torch.optim.Optimizer:
    return torch.optim.AdamW([nn.Parameter(torch.zeros(4))], **options)


def _in_backward() -> torch.optim.Optimizer:
    optimizer = _optimizer()
    optimizer.param_groups[0]["params"][0].register_post_accumulate_grad_hook(lambda _: None)
    return optimizer


def _compiled() -> torch.optim.Optimizer:
    optimizer = _optimizer()
    optimizer.step = torch.compile(optimizer.step, backend="eager")
    return optimizer


class Unhooked:
    param_groups = ()

    def step(self) -> None: ...


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: _optimizer(capturable=True), "capturable"),
        (_in_backward, "in backward"),
        (_compiled, "is compiled"),
        (Unhooked, "does not call torch's step hooks"),
    ],
)
def test_where_a_step_may_run_without_its_hooks_nothing_overlaps(make, reason):
    assert overlap_obstacle([_optimizer()]) is None
    assert reason in str(overlap_obstacle([_optimizer(), make()]))


def test_a_save_that_may_not_overlap_copies_everything_at_once_and_says_why(tmp_path, brake, caplog):
    loop = Loop()
    loop.model[0].weight.register_post_accumulate_grad_hook(lambda _: None)
    with begun(tmp_path, loop) as checkpointer, caplog.at_level(logging.WARNING, "dckpt"):
        for _ in range(2):
            loop.step()
            pending = checkpointer.save(loop.state)
            assert pending.staged
            assert pending.wait() == "committed"

    assert not brake.held
    assert [record.message for record in caplog.records if "overlap=True has no effect" in record.message] == [
        "overlap=True has no effect: a parameter of AdamW has a hook that may step the optimizer in backward. Saves copy the "
        "whole state before they return."
    ]


def test_no_hook_stays_behind_a_closed_checkpointer(tmp_path):
    before = len(_global_optimizer_pre_hooks)
    with begun(tmp_path, Loop()):
        assert len(_global_optimizer_pre_hooks) == before + 1
    assert len(_global_optimizer_pre_hooks) == before
