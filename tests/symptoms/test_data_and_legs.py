"""What people report about data and rounds of training: each first happens with torch alone, then it is gone, or said."""

from __future__ import annotations

import re
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset, random_split

import dckpt

ROWS = torch.arange(240, dtype=torch.float32).reshape(-1, 1) / 240


def build(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Linear(1, 1)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


class Run:
    """One start of a job with dckpt over `rows`; it counts the samples that it saw."""

    def __init__(self, rows: torch.Tensor = ROWS, micro: int = 8, max_steps: int = 10, **facts: Any) -> None:
        self.model, self.optimizer = build()
        batch = dckpt.Batch(micro)
        self.sampler = dckpt.ElasticDistributedSampler(rows, batch=batch, seed=0)
        self.loader = DataLoader(TensorDataset(rows), batch_sampler=self.sampler.batches(), generator=torch.Generator())
        self.progress = dckpt.TrainProgress(max_steps=max_steps, batch=batch)
        self.state = dckpt.TrainState(
            model=self.model, optimizer=self.optimizer, data=self.sampler, progress=self.progress, facts=facts
        )
        self.seen: list[float] = []

    def train(self, checkpointer: dckpt.Checkpointer, steps: int = 10**6) -> int:
        """Until the work is done, at most `steps`; how many were trained."""
        trained = 0
        while not self.progress.done and trained < steps:
            for (rows,) in self.loader:
                train_step(self.model, self.optimizer, rows)
                self.seen += rows.flatten().tolist()
                self.progress.advance()
                trained += 1
                if checkpointer.step(self.state) is dckpt.Stop or trained == steps:
                    break
        return trained


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, rows: torch.Tensor) -> None:
    optimizer.zero_grad()
    (model(rows) - rows).square().mean().backward()
    optimizer.step()


def open_run(root: Path, every: int = 1) -> dckpt.Checkpointer:
    return dckpt.Checkpointer(root, save=dckpt.Every(steps=every), signals=())


def start(root: Path, steps: int, run: Run) -> Run:
    with open_run(root) as checkpointer:
        checkpointer.resume(run.state)
        run.train(checkpointer, steps)
    return run


# The batch size changed silently, 8 -> 64 on a larger GPU.


def test_torch_alone_another_batch_size_changes_the_run_without_a_word(tmp_path: Path) -> None:
    """The usual dict: half of the steps become 8 times as large, the schedule of 10 steps has 8 times the data."""
    seen = []
    for batch_size in (8, 64):
        model, optimizer = build()
        first, path = 0, tmp_path / "checkpoint.pt"
        if path.exists():
            saved = torch.load(path, weights_only=True)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            first = saved["global_step"]
        for _ in range(first, first + 2):
            rows = ROWS[torch.randint(240, (batch_size,))]
            train_step(model, optimizer, rows)
            seen.append(len(rows))
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "global_step": first + 2}, path)

    assert seen == [8, 8, 64, 64]


def test_another_batch_size_stops_the_resume_by_name_and_goes_on_if_it_is_allowed(tmp_path: Path) -> None:
    start(tmp_path, 2, Run(micro=8))
    larger = Run(micro=64)
    with open_run(tmp_path) as checkpointer, pytest.raises(dckpt.ResumeRejectedError, match=r"8 .*64") as told:
        checkpointer.resume(larger.state)
    assert "global_batch" in str(told.value)
    with open_run(tmp_path) as checkpointer:
        report = checkpointer.resume(larger.state, policy=dckpt.ResumePolicy(allow=("global_batch",)))
        larger.train(checkpointer, 1)

    assert report is not None and "global_batch" in {finding.check for finding in report.findings}
    assert (larger.sampler.cursor, larger.progress.batch_history) == (16 + 64, [(0, 8), (2, 64)])


# Samples repeated or skipped because the number of GPUs changed.

SIZE = 1003


@pytest.mark.parametrize(("before", "after", "repeated", "skipped"), [(8, 4, 160, 0), (4, 8, 0, 160)])
def test_torch_alone_samples_come_twice_or_never_when_the_number_of_ranks_changes(
    before: int, after: int, repeated: int, skipped: int
) -> None:
    """Each rank saved that it had yielded 40 samples; that many are passed over on the other number of ranks."""
    seen: Counter[int] = Counter()
    for ranks, begin, end in ((before, 0, 40), (after, 40, None)):
        for rank in range(ranks):
            sampler = DistributedSampler(range(SIZE), num_replicas=ranks, rank=rank, seed=0)
            seen.update(islice(sampler, begin, end))
    padding = -SIZE % after

    assert len(set(range(SIZE)) - set(seen)) == skipped
    assert sum(count - 1 for count in seen.values()) == repeated + padding


@pytest.mark.parametrize(("before", "after"), [(8, 4), (4, 8), (8, 3), (1, 5)])
def test_each_sample_comes_exactly_once_when_the_number_of_ranks_changes(before: int, after: int) -> None:
    seen: Counter[int] = Counter()
    state: dict[str, Any] | None = None
    for ranks in (before, after):
        samplers = [
            dckpt.ElasticDistributedSampler(SIZE, batch=dckpt.Batch(1, 1, ranks), seed=0, rank=rank, tail="short",
                                            allow_empty=True)
            for rank in range(ranks)
        ]  # fmt: skip
        passes = []
        for sampler in samplers:
            if state is not None:
                sampler.load_state_dict(state)
            passes.append(iter(sampler.batches()))
        steps = 40 if state is None else 10**6
        while steps and samplers[0].epoch == 0:
            seen.update(index for each in passes for index in next(each))
            for sampler in samplers:
                sampler.advance()
            steps -= 1
        state = samplers[0].state_dict()

    assert seen == Counter(range(SIZE))


# Another split into training and validation at every start.


def test_torch_alone_a_resumed_start_splits_differently_and_learns_what_it_validated_on() -> None:
    """The split draws from the global stream, whose state a resume restores, as it should."""
    held_out, stream = [], None
    for _ in range(2):
        torch.manual_seed(0)
        if stream is not None:
            torch.set_rng_state(stream)
        held_out.append(set(random_split(range(1000), [0.9, 0.1])[1].indices))
        stream = torch.get_rng_state()

    assert len(held_out[0] - held_out[1]) > 50, "held out by the first start, learned by the second"


def test_a_split_is_the_same_at_every_start_and_another_one_is_refused(tmp_path: Path) -> None:
    splits = [dckpt.split_indices(1000, seed=0) for _ in range(2)]
    assert splits[0].validation.tolist() == splits[1].validation.tolist()
    start(tmp_path, 2, Run(split=splits[0].facts()))

    again = Run(split=splits[1].facts())
    with open_run(tmp_path) as checkpointer:
        report = checkpointer.resume(again.state)
        assert report is not None and not report.critical
    other = Run(split=dckpt.split_indices(1000, seed=1).facts())
    with open_run(tmp_path) as checkpointer, pytest.raises(dckpt.ResumeRejectedError, match="split"):
        checkpointer.resume(other.state)


# A second round of training on new data is over in 0.002 s.


def first_round(path: Path, rows: torch.Tensor, max_steps: int) -> int:
    """What people write: the steps are counted on in `global_step`. Returns how many steps this start trained."""
    model, optimizer = build()
    global_step = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        global_step = saved["global_step"]
    trained = 0
    while global_step < max_steps:
        train_step(model, optimizer, rows[global_step % 20 * 8 :][:8])
        global_step += 1
        trained += 1
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "global_step": global_step}, path)
    return trained


def test_torch_alone_a_second_round_on_new_data_trains_nothing_and_calls_it_success(tmp_path: Path) -> None:
    assert first_round(tmp_path / "checkpoint.pt", ROWS, max_steps=10) == 10
    assert first_round(tmp_path / "checkpoint.pt", ROWS + 1, max_steps=10) == 0


def test_a_second_round_on_new_data_trains_all_its_steps_on_all_new_samples(tmp_path: Path) -> None:
    start(tmp_path, 10, Run())
    new = ROWS[:80] + 1
    second = Run(new)
    with open_run(tmp_path) as checkpointer:
        checkpointer.start_leg(second.state)
        assert second.train(checkpointer) == 10

    assert sorted(second.seen) == new.flatten().tolist()
    assert (second.progress.step, second.progress.leg_step) == (20, 10)


def test_a_resume_with_nothing_left_to_do_is_critical_and_no_instant_success(tmp_path: Path) -> None:
    start(tmp_path, 10, Run())
    with open_run(tmp_path) as checkpointer, pytest.raises(dckpt.ResumeRejectedError, match="start_leg"):
        checkpointer.resume(Run().state)


# `checkpoint-9` sorted after `checkpoint-119`.


def test_torch_alone_the_newest_by_name_is_an_old_one(tmp_path: Path) -> None:
    for step in (9, 80, 119):
        torch.save({"step": step}, tmp_path / f"checkpoint-{step}")
    names = sorted(path.name for path in tmp_path.iterdir())

    assert names[-1] == "checkpoint-9"
    assert torch.load(tmp_path / names[-1], weights_only=True)["step"] == 9


def test_the_newest_is_the_newest_whatever_it_is_called(tmp_path: Path) -> None:
    run = Run(max_steps=1000)
    with open_run(tmp_path, every=10**6) as checkpointer:
        checkpointer.resume(run.state)
        for step in (9, 80, 119):
            run.train(checkpointer, step - run.progress.step)
            assert checkpointer.save(run.state, blocking=True).outcome == "committed"
    again = Run(max_steps=1000)
    with open_run(tmp_path) as checkpointer:
        report = checkpointer.resume(again.state)

    assert report is not None and report.step == again.progress.step == 119
    names = sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("step-"))
    assert [int(re.findall(r"\d+", name)[0]) for name in names] == [9, 80, 119]
