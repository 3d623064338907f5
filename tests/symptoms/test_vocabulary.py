"""Vocabularies that change under a run: first with torch alone, then it is refused by name with dckpt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import dckpt
from tests.support.ranks import RankPool
from tests.support.vocabulary_jobs import BASE, Extended, corrupted_rows, train_masked_before_wrapping

# The vocabulary changed: all shapes fit, because it is padded, and the position in tokens became nonsense.

TEXT = ("the cat sat on the mat and the dog sat on the cat " * 40).split()
PADDED = 16
WORDS = sorted(set(TEXT))
PAIRS = [("on", "the"), ("and", "the")]


def tokens_of(text: list[str], *, merges: bool) -> tuple[list[int], int]:
    """Token numbers, and the size of the vocabulary. `merges`: pairs of words are one token, and come first."""
    names: list[object] = [*PAIRS, *WORDS] if merges else [*WORDS]
    found, at = [], 0
    while at < len(text):
        pair = tuple(text[at : at + 2])
        is_pair = merges and pair in PAIRS
        found.append(names.index(pair if is_pair else text[at]))
        at += 2 if is_pair else 1
    return found, len(names)


class Reader:
    """A next-token model that reads the text once, eight tokens a step."""

    def __init__(self, *, merges: bool = False, padded: int = PADDED) -> None:
        torch.manual_seed(0)
        self.tokens, self.size = tokens_of(TEXT, merges=merges)
        self.model = nn.Sequential(nn.Embedding(padded, 12), nn.Linear(12, padded))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.position = 0
        self.progress = dckpt.TrainProgress(max_steps=100, batch=dckpt.Batch(8))
        self.state = dckpt.TrainState(
            model=self.model, optimizer=self.optimizer, progress=self.progress, facts={"vocab_size": self.size}
        )

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            window = torch.tensor(self.tokens[self.position :][:9])
            self.position += 8
            loss = nn.functional.cross_entropy(self.model(window[:-1]), window[1:])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.progress.advance()
            losses.append(loss.item())
        self.optimizer.zero_grad()
        return losses


def test_torch_alone_another_vocabulary_loads_and_position_and_tokens_mean_something_else(tmp_path: Path) -> None:
    reader = Reader()
    before = reader.train(40)
    saved = {"model": reader.model.state_dict(), "optimizer": reader.optimizer.state_dict(), "tokens": reader.position}
    torch.save(saved, tmp_path / "state.pt")
    following = TEXT[reader.position :][:3]

    resumed = Reader(merges=True)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.model.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    resumed.position = saved["tokens"]

    words = [*map(" ".join, PAIRS), *WORDS]
    found = " ".join(words[token] for token in resumed.tokens[: resumed.position])
    assert len(found.split()) > reader.position + 20, "words between the two positions are never read"
    assert " ".join(words[token] for token in resumed.tokens[resumed.position :][:3]).split()[:3] != following
    assert resumed.train(1)[0] > 3 * before[-1]


def save(root: Path, state: dckpt.TrainState) -> None:
    with dckpt.Checkpointer(root, signals=()) as checkpointer:
        checkpointer.resume(state)
        assert checkpointer.save(state, blocking=True).outcome == "committed"


def test_another_vocabulary_stops_the_resume_by_name_also_where_all_shapes_fit(tmp_path: Path) -> None:
    reader = Reader()
    reader.train(40)
    save(tmp_path / "run", reader.state)

    with dckpt.Checkpointer(tmp_path / "run", signals=()) as checkpointer:
        with pytest.raises(dckpt.ResumeRejectedError, match=r"\[vocab_size\] the vocabulary size differs") as caught:
            checkpointer.resume(Reader(merges=True).state)
        with pytest.raises(dckpt.IncompatibleStateError, match=r"0.weight.*shape.*16.*32"):
            checkpointer.resume(Reader(padded=32).state)
        assert checkpointer.resume(Reader().state) is not None
    (told,) = caught.value.report["findings"][:1]
    assert (told["expected"], told["found"]) == (str(len(WORDS)), str(len(WORDS) + len(PAIRS)))


# The gradient masking of an extended vocabulary broke, and the base embeddings were corrupted.


def test_torch_alone_the_mask_does_not_come_back_and_base_rows_are_trained(tmp_path: Path) -> None:
    """Hooks are in no checkpoint; the resumed script sets its mask on a weight that it then replaces."""
    run = Extended()
    base = run.base_rows()
    run.train(5)
    assert corrupted_rows(run.base_rows(), base) == 0
    torch.save({"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}, tmp_path / "state.pt")

    resumed = Extended(replaces_masked_weight=True)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.model.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    losses = resumed.train(5)
    assert losses[-1] < losses[0], "and the loss looks fine"
    assert corrupted_rows(resumed.base_rows(), base) == BASE


def test_torch_alone_weight_decay_moves_rows_whose_gradient_is_masked() -> None:
    run = Extended(weight_decay=0.1)
    base = run.base_rows()
    run.train(5)

    assert corrupted_rows(run.base_rows(), base) == BASE


@pytest.mark.distributed
def test_torch_alone_a_mask_set_before_sharding_sees_no_gradient(ranks: RankPool) -> None:
    assert ranks.run(train_masked_before_wrapping, 2, None) == [BASE, BASE]


def resume(root: Path, run: Extended) -> dckpt.ResumeReport | None:
    with dckpt.Checkpointer(root, signals=()) as checkpointer:
        return checkpointer.resume(run.state)


def test_base_rows_that_were_trained_stop_the_next_resume(tmp_path: Path) -> None:
    run = Extended()
    with dckpt.Checkpointer(tmp_path / "run", signals=()) as checkpointer:
        checkpointer.resume(run.state)
        run.train(5)
        checkpointer.save(run.state, blocking=True)

    broken = Extended(replaces_masked_weight=True)
    with dckpt.Checkpointer(tmp_path / "run", signals=()) as checkpointer:
        report = checkpointer.resume(broken.state)
        assert report is not None and report.exit_code == 0
        broken.train(5)
        checkpointer.save(broken.state, blocking=True)

    with pytest.raises(dckpt.ResumeRejectedError, match=r"\[frozen_rows\].*are not what they were at the start"):
        resume(tmp_path / "run", Extended())


def test_weight_decay_on_masked_rows_is_said_before_it_moves_them_and_stops_the_resume_after(tmp_path: Path) -> None:
    run = Extended(weight_decay=0.1)
    save(tmp_path / "run", run.state)
    report = resume(tmp_path / "run", run)
    assert report is not None
    assert any(found.check == "frozen_rows" and "weight decay 0.1" in found.message for found in report.warnings)

    with dckpt.Checkpointer(tmp_path / "run", signals=()) as checkpointer:
        checkpointer.resume(run.state)
        run.train(5)
        checkpointer.save(run.state, blocking=True)
    with pytest.raises(dckpt.ResumeRejectedError, match=r"\[frozen_rows\].*are not what they were at the start"):
        resume(tmp_path / "run", Extended(weight_decay=0.1))


@pytest.mark.distributed
def test_a_mask_set_before_sharding_is_found_on_every_rank(ranks: RankPool, tmp_path: Path) -> None:
    told = ranks.run(train_masked_before_wrapping, 2, str(tmp_path / "run"))

    assert told[0] == told[1]
    assert "frozen_rows" in told[0] and "are not what they were at the start" in told[0]
