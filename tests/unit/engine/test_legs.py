"""A second round of training: counters of its own, a step that goes on, and a way back that stays."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import dckpt
from dckpt.catalog.catalog import Catalog
from dckpt.catalog.generations import read_generation
from dckpt.errors import CheckpointNotFoundError, ConfigError, IncompatibleStateError
from dckpt.storage.local import LocalStorage
from dckpt.tools.inspect import list_run
from dckpt.tools.prune import PruneRequest, plan_prune

STEPS = 4
ANYWAY = dckpt.ResumePolicy(allow=("work_remains", "data_order", "dataset"))  # a leg begins where no work remains
OLD, NEW = 16, 40  # samples of the first and of the second leg's data


def cosine(optimizer):
    return lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)


class Job:
    """One start of a small training on `size` samples; everything is built anew."""

    def __init__(self, size: int = OLD, *, schedule=cosine, max_steps: int = STEPS, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.scheduler = None if schedule is None else schedule(self.optimizer)
        batch = dckpt.Batch(4)
        self.progress = dckpt.TrainProgress(max_steps=max_steps, batch=batch)
        self.sampler = dckpt.ElasticDistributedSampler(size, batch=batch, seed=0, rank=0)
        self.state = self.make_state()

    def make_state(self) -> dckpt.TrainState:
        return dckpt.TrainState(
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            data=self.sampler,
            progress=self.progress,
        )

    def train(self, checkpointer: dckpt.Checkpointer | None = None, *, steps: int = 10**6) -> list[float]:
        """Until the leg is done, at most `steps`; the learning rate of each step."""
        rates = []
        while not self.progress.done and len(rates) < steps:
            rates.append(float(self.optimizer.param_groups[0]["lr"]))
            loss = self.model(torch.ones(4, 3)).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
            self.progress.advance(loss)
            if checkpointer is not None and checkpointer.step(self.state) is dckpt.Stop:
                break
        return rates


def open_run(root, **options) -> dckpt.Checkpointer:
    return dckpt.Checkpointer(root, signals=(), **options)


@pytest.fixture
def root(tmp_path):
    """A run whose first leg is done: steps 1 to 4."""
    with open_run(tmp_path, save=dckpt.Every(steps=1)) as checkpointer:
        job = Job()
        checkpointer.resume(job.state, policy=ANYWAY)
        job.train(checkpointer)
    return tmp_path


def names(root) -> list[str]:
    return [item.name for item in Catalog(LocalStorage(str(root))).line()]


def test_a_second_round_on_new_data_trains_all_its_steps_and_the_life_goes_on(root):
    job = Job(NEW)
    with open_run(root, save=dckpt.Every(steps=2)) as checkpointer:
        assert checkpointer.start_leg(job.state)
        assert (job.progress.step, job.progress.leg, job.progress.leg_step, job.progress.done) == (4, 2, 0, False)
        assert (job.sampler.epoch, job.sampler.cursor) == (0, 0)
        assert len(job.train(checkpointer)) == STEPS
        assert (job.progress.step, job.progress.leg_step, job.progress.done) == (8, 4, True)
        assert (job.sampler.epoch, job.sampler.cursor) == (0, 16)
        assert checkpointer.steps() == [1, 2, 3, 4, 6, 8]

    assert names(root)[:3] == ["step-0000000008.g0002", "step-0000000006.g0002", "step-0000000004.g0001"]
    record = read_generation(LocalStorage(str(root)), 2)
    assert (record.reason, record.parent.checkpoint) == ("leg", "step-0000000004.g0001")


def test_weights_moments_and_random_streams_go_on(root):
    resumed, begun = Job(seed=1), Job(NEW, seed=2)
    with open_run(root) as checkpointer:
        checkpointer.resume(resumed.state, policy=ANYWAY)
        drawn = torch.rand(3)
    with open_run(root) as checkpointer:
        checkpointer.start_leg(begun.state)
        assert torch.equal(torch.rand(3), drawn)
    for ours, theirs in zip(begun.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        for name, value in resumed.optimizer.state[theirs].items():
            assert torch.equal(begun.optimizer.state[ours][name], value)
    assert begun.scheduler.state_dict() == resumed.scheduler.state_dict()


def test_a_new_leg_may_have_another_batch_and_other_losses_without_a_warning(root, caplog):
    """Nothing that a leg changes on purpose is a finding, neither when it begins nor in its first steps."""
    job = Job(NEW)
    batch = dckpt.Batch(8)
    job.progress = dckpt.TrainProgress(max_steps=12, batch=batch)
    job.sampler = dckpt.ElasticDistributedSampler(NEW, batch=batch, seed=5, rank=0)
    job.state = job.make_state()
    with caplog.at_level(logging.WARNING, "dckpt"), open_run(root, save=dckpt.Every(steps=2)) as checkpointer:
        assert checkpointer.start_leg(job.state, "fresh")
        assert len(job.train(checkpointer)) == 12
    assert not caplog.text


def test_a_plain_resume_with_other_data_is_refused_and_says_what_to_call(root):
    with open_run(root) as checkpointer, pytest.raises(IncompatibleStateError, match=r"size 16 .* 40 live.*start_leg"):
        checkpointer.resume(Job(NEW).state, policy=ANYWAY)


def test_a_named_leg_is_begun_once_however_often_the_job_starts(root):
    with open_run(root, save=dckpt.Every(steps=1)) as checkpointer:
        job = Job(NEW)
        assert checkpointer.start_leg(job.state, name="round-2")
        job.train(checkpointer, steps=1)
    job = Job(NEW)
    with open_run(root, save=dckpt.Every(steps=1)) as checkpointer:
        assert not checkpointer.start_leg(job.state, name="round-2")
        assert not checkpointer.start_leg(job.state, name="round-2")
        assert (job.progress.step, job.progress.leg, job.progress.leg_step, job.sampler.cursor) == (5, 2, 1, 4)
        assert len(job.train(checkpointer)) == STEPS - 1
    with open_run(root) as checkpointer:
        job = Job(OLD)
        assert checkpointer.start_leg(job.state, name="round-3")
        assert [leg.name for leg in job.progress.legs] == [None, "round-2", "round-3"]
    with open_run(root) as checkpointer, pytest.raises(IncompatibleStateError, match="size"):
        checkpointer.start_leg(Job(OLD).state, name="round-2")  # round-3 saved nothing


def test_a_second_start_of_a_finished_leg_is_told_by_the_steps_of_the_leg(root):
    with open_run(root, save=dckpt.Every(steps=1)) as checkpointer:
        job = Job(NEW)
        checkpointer.start_leg(job.state, name="round-2")
        job.train(checkpointer)
    job = Job(NEW)
    with open_run(root) as checkpointer, pytest.raises(dckpt.ResumeRejectedError) as caught:
        checkpointer.start_leg(job.state, name="round-2")

    assert f"step {STEPS} of leg 2 of max_steps={STEPS} is already done" in str(caught.value)
    assert job.progress.done


def test_a_leg_that_saved_nothing_is_begun_again(root):
    for _ in range(2):
        with open_run(root) as checkpointer:
            assert checkpointer.start_leg(Job(NEW).state, name="round-2")
    assert names(root)[0] == "step-0000000004.g0001"


def test_the_first_save_of_a_leg_is_a_checkpoint_of_its_own(root):
    with open_run(root) as checkpointer:
        job = Job(NEW)
        checkpointer.start_leg(job.state)
        assert checkpointer.save(job.state, blocking=True).checkpoint == "step-0000000004.g0002"
        assert checkpointer.save(job.state, blocking=True).checkpoint == "step-0000000004.g0002"


def test_legs_can_follow_each_other_in_one_process(tmp_path):
    """The same objects, or a new state around them with a sampler over other data; what was not saved yet is."""
    with open_run(tmp_path) as checkpointer:
        job = Job()
        checkpointer.resume(job.state, policy=ANYWAY)
        job.train(steps=3)
        assert checkpointer.start_leg(job.state)
        job.train(steps=2)
        assert (job.progress.step, job.progress.leg_step, job.sampler.cursor) == (5, 2, 8)
        old = job.sampler
        job.sampler = dckpt.ElasticDistributedSampler(NEW, batch=dckpt.Batch(4), seed=1, rank=0)
        job.state = job.make_state()
        assert checkpointer.start_leg(job.state)
        job.train(steps=1)
        assert (job.progress.step, job.progress.leg_step, job.sampler.cursor) == (6, 1, 4)
        assert old.cursor == 8, "the sampler of the leg before still moves"
        checkpointer.save(job.state, blocking=True)

    assert names(tmp_path) == ["step-0000000006.g0003", "step-0000000005.g0002", "step-0000000003.g0001"]
    records = [read_generation(LocalStorage(str(tmp_path)), number) for number in (1, 2, 3)]
    assert [item.reason for item in records] == ["start", "leg", "leg"]
    assert [item.parent and item.parent.checkpoint for item in records] == [None, *names(tmp_path)[:0:-1]]


def test_retention_keeps_the_end_of_each_earlier_leg(root):
    policy = dckpt.Retention(last=1)
    for size in (NEW, OLD):
        job = Job(size)
        with open_run(root, save=dckpt.Every(steps=1), retention=policy) as checkpointer:
            checkpointer.start_leg(job.state)
            job.train(checkpointer)

    ends = ["step-0000000012.g0003", "step-0000000008.g0002", "step-0000000004.g0001"]
    assert names(root) == ends
    plan = plan_prune(LocalStorage(str(root)), PruneRequest(retention=policy), now_unix_s=0.0)
    assert [(row.name, row.reasons) for row in plan.keep] == [
        (ends[0], ("newest", "last 1")),
        (ends[1], ("end of a leg",)),
        (ends[2], ("end of a leg",)),
    ]
    rows = list_run(LocalStorage(str(root)), now_unix_s=0.0).checkpoints
    assert [row.states for row in rows] == [
        ("latest",),
        ("on the line", "end of leg 2"),
        ("on the line", "end of leg 1"),
    ]


SCHEDULES = {
    "cosine": cosine,
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1)),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=STEPS + 1),
    "sequential": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2), lr_scheduler.ExponentialLR(optimizer, 0.5)],
        milestones=[2],
    ),
    "chained": lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.5, 2), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    ),
}


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("call", ["alone", "after resume", "in one process"])
def test_a_fresh_schedule_begins_as_it_was_built(tmp_path, kind, call):
    """Rate by rate what a new run gets, momenta that a cyclic schedule moves included; the optimizer's moments go on."""
    schedule = SCHEDULES[kind]
    whole = Job(schedule=schedule)
    expected, groups = whole.train(), [dict(group, params=0) for group in Job(schedule=schedule).optimizer.param_groups]
    with open_run(tmp_path) as checkpointer:
        job = Job(schedule=schedule)
        checkpointer.resume(job.state, policy=ANYWAY)
        assert job.train() == expected
        checkpointer.save(job.state, blocking=True)
        if call == "in one process":
            checkpointer.start_leg(job.state, "fresh")
    if call != "in one process":
        job = Job(schedule=schedule, seed=3)
        with open_run(tmp_path) as checkpointer:
            if call == "after resume":
                checkpointer.resume(job.state, policy=ANYWAY)
            assert checkpointer.start_leg(job.state, scheduler="fresh")

    assert [dict(group, params=0) for group in job.optimizer.param_groups] == groups
    assert job.optimizer.state[job.model[0].weight]["step"] == STEPS
    assert job.train() == expected
    assert job.progress.step == 2 * STEPS


def test_a_kept_schedule_goes_on_and_one_at_its_end_is_told(root, caplog):
    job = Job(NEW)
    with caplog.at_level(logging.WARNING, "dckpt"), open_run(root) as checkpointer:
        checkpointer.start_leg(job.state)
    assert "leg 2 begins with learning rates of zero" in caplog.text
    assert job.train(steps=1) == [0.0]

    caplog.clear()
    job = Job(NEW, schedule=lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=4 * STEPS))
    with caplog.at_level(logging.WARNING, "dckpt"), open_run(root) as checkpointer:
        checkpointer.start_leg(job.state, "fresh")
    assert "zero" not in caplog.text
    assert job.train(steps=2)[1] == pytest.approx(0.1 * (1 + math.cos(math.pi / (4 * STEPS))) / 2)


def test_a_rate_in_a_tensor_is_set_in_place(tmp_path):
    """A captured step reads it from that memory."""
    job = Job(schedule=None)
    job.optimizer.param_groups[0]["lr"] = rate = torch.tensor(0.1)
    job.scheduler = lr_scheduler.ExponentialLR(job.optimizer, 0.5)
    job.state = job.make_state()
    with open_run(tmp_path) as checkpointer:
        checkpointer.resume(job.state, policy=ANYWAY)
        job.train(steps=2)
        assert rate.item() == pytest.approx(0.025)
        checkpointer.start_leg(job.state, "fresh")
    assert job.optimizer.param_groups[0]["lr"] is rate and rate.item() == pytest.approx(0.1)


class Position:
    """Somebody's own position in data, without a way back to its beginning."""

    place = 0

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state_dict):
        self.place = state_dict["place"]


def test_own_data_is_left_at_its_beginning_or_refused_if_it_was_moved_already(root):
    first = Job()
    first.sampler = Position()
    first.state = first.make_state()
    run = root / "own"
    with open_run(run) as checkpointer:
        checkpointer.resume(first.state, policy=ANYWAY)
        first.sampler.place = 7
        first.train(steps=1)
        checkpointer.save(first.state, blocking=True)

    job = Job()
    job.sampler = Position()
    job.state = job.make_state()
    with open_run(run) as checkpointer:
        assert checkpointer.start_leg(job.state)
    assert job.sampler.place == 0
    with open_run(run) as checkpointer:
        checkpointer.resume(job.state, policy=ANYWAY)
        assert job.sampler.place == 7
        with pytest.raises(ConfigError, match=r"Position without restart\(\).*in place of resume"):
            checkpointer.start_leg(job.state)
    assert job.progress.leg == 1


def test_what_cannot_be_begun_is_refused_by_name(root, tmp_path):
    with open_run(tmp_path / "empty") as checkpointer, pytest.raises(CheckpointNotFoundError, match="start_leg"):
        checkpointer.start_leg(Job().state)
    with open_run(tmp_path / "empty") as checkpointer:
        job = Job()
        checkpointer.resume(job.state, policy=ANYWAY)
        with pytest.raises(CheckpointNotFoundError, match="first leg"):
            checkpointer.start_leg(job.state)
    with open_run(root) as checkpointer:
        with pytest.raises(ConfigError, match="expected one of keep, fresh"):
            checkpointer.start_leg(Job().state, "restart")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="expected a TrainState with a scheduler"):
            checkpointer.start_leg(Job(schedule=None).state, "fresh")
        with pytest.raises(ConfigError, match="progress"):
            checkpointer.start_leg(dckpt.TrainState(model=nn.Linear(1, 1)))
        job = Job()
        checkpointer.start_leg(job.state, name="a")
        checkpointer.start_leg(job.state, name="b")
        with pytest.raises(ConfigError, match=r"leg is over, the run is in leg 3, 'b'"):
            checkpointer.start_leg(job.state, name="a")
        job.progress.micro_step = 1
        with pytest.raises(ConfigError, match="found micro-step 1"):
            checkpointer.start_leg(job.state, name="c")


def test_best_losses_are_of_the_life_and_of_the_leg(root):
    job = Job(NEW, max_steps=2)
    with open_run(root, save=dckpt.Every(steps=1)) as checkpointer:
        checkpointer.start_leg(job.state, "fresh")
        assert job.progress.leg_best_loss is None
        life = job.progress.best_loss
        job.train(checkpointer)
        best = job.progress.leg_best_loss
    again = Job(NEW)
    with open_run(root) as checkpointer:
        checkpointer.resume(again.state, policy=ANYWAY)

    assert again.progress.leg_best_loss == best == min(loss for step, loss in again.progress.loss_history if step > 4)
    assert again.progress.best_loss == min(life, best)
