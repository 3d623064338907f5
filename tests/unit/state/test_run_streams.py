from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import dckpt
from dckpt.state.rng_state import RngState
from dckpt.state.run_streams import REMAPS_MAX
from tests.unit.state.memory_checkpoint import save


@pytest.fixture(autouse=True)
def _leave_the_streams_as_they_were():
    held = RngState.capture()
    yield
    held.restore()


class Noisy(Dataset):
    """Augments with the worker's (or this process's) global stream."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return index, torch.rand(1).item()


def make(**more):
    return dckpt.TrainState(model=nn.Linear(1, 1), progress=dckpt.TrainProgress(), **more)


def batches(state, skip, workers):
    """An epoch's batches from `skip` on, shuffled and augmented by the global stream, as a plain loop makes them."""
    with state.epoch_start_rng():
        loader = iter(DataLoader(Noisy(), batch_size=3, shuffle=True, num_workers=workers))
        for _ in range(skip):
            next(loader)
    return loader


@pytest.mark.parametrize("workers", [0, 2])
def test_a_rebuilt_iterator_gives_the_rest_of_the_epoch_and_the_stream_goes_on(workers):
    torch.manual_seed(5)
    first, rest = make(), []
    for number, batch in enumerate(batches(first, 0, workers)):
        dropout = torch.rand(1).item()
        if number >= 2:
            rest.append((*(column.tolist() for column in batch), dropout))
        if number == 1:
            checkpoint = save(first)

    torch.manual_seed(99)
    torch.rand(7)
    second = make()
    second.restore_rng(checkpoint.rng)
    found = [(*(column.tolist() for column in batch), torch.rand(1).item()) for batch in batches(second, 2, workers)]

    assert len(rest) == 2
    assert found == rest


def test_the_epochs_start_is_saved_within_the_epoch_only():
    state = make(generators={"n": np.random.default_rng(1)})
    assert not [name for name in state.capture().rng if name.startswith("epoch.")]
    before = RngState.capture(state.generators)
    with state.epoch_start_rng() as again:
        assert not again
        torch.rand(3)
    rng = state.capture().rng
    assert {
        name.removeprefix("epoch."): value for name, value in rng.items() if name.startswith("epoch.")
    } == before.streams
    assert rng["torch"] != rng["epoch.torch"]
    with state.epoch_start_rng() as again:
        assert again
        assert RngState.capture(state.generators) == before
    assert state.capture().rng == rng
    state.progress.finish_epoch()
    assert not [name for name in state.capture().rng if name.startswith("epoch.")]
    with state.epoch_start_rng() as again:
        assert not again


def test_streams_come_back_when_making_the_iterators_fails():
    state = make()
    with state.epoch_start_rng():
        torch.rand(3)
    now = RngState.capture()
    with pytest.raises(RuntimeError), state.epoch_start_rng():
        torch.rand(5)
        raise RuntimeError
    assert RngState.capture() == now


def test_a_stream_whose_start_is_not_known_goes_on_beside_those_that_are_replayed():
    """As on another mesh: what ranks share is known there, and what was one rank's own is not."""
    state = make(generators={"shared": np.random.default_rng(1)})
    with state.epoch_start_rng():
        expected = state.generators["shared"].random()
    known = {name: value for name, value in state.capture().rng.items() if name != "epoch.torch"}
    other = make(generators={"shared": np.random.default_rng(9)})
    other.restore_rng(known)
    torch.manual_seed(8)
    number = torch.rand(2)[1].item()
    torch.manual_seed(8)
    torch.rand(1)
    with other.epoch_start_rng() as again:
        assert again
        assert other.generators["shared"].random() == expected
        assert torch.rand(1).item() == number
    assert torch.rand(1).item() == number


def test_remaps_are_carried_over_and_the_oldest_are_dropped():
    state = make()
    state.note_rng([{"n": number} for number in range(REMAPS_MAX)], {"n": "new"}, ("numpy",))
    assert len(state.rng_remaps) == REMAPS_MAX
    assert (state.rng_remaps[0], state.rng_remaps[-1]) == ({"n": 1}, {"n": "new"})
    state.note_rng("damaged", None, ())
    assert state.rng_remaps == []
