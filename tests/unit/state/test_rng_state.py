from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

import dckpt
from dckpt.errors import ConfigError
from dckpt.format.streams import slot_key
from dckpt.format.values import dump_json, load_json
from dckpt.state.rng_state import RngState, rng_slot

BATCH = dckpt.Batch(micro=2, accumulation=4)


def draw():
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        *torch.rand(2).tolist(),
        torch.randn(1).item(),
    ]


@pytest.fixture(autouse=True)
def _leave_the_streams_as_they_were():
    held = RngState.capture()
    yield
    held.restore()


def test_what_was_captured_comes_back_also_through_json():
    generators = {"n": np.random.default_rng(3), "t": torch.Generator().manual_seed(2)}
    held = RngState.capture(generators)
    expected = draw(), generators["n"].random(), torch.rand(1, generator=generators["t"])
    again = RngState(load_json(dump_json(dict(held.streams)), key="k", limit=2**22))
    again.restore(generators)

    assert (draw(), generators["n"].random(), torch.rand(1, generator=generators["t"])) == expected
    assert held == again
    with pytest.raises(ConfigError, match="generator:n"):
        held.restore()


def test_dtensors_tracker_has_no_state_beside_the_devices_stream():
    """Random operations of DTensor go through the device's own generator, so capturing that captures them."""
    from torch.distributed.tensor import _random

    names = {name for kind in (_random._RNGStateTracker, _random.OffsetBasedRNGTracker) for name in vars(kind)}
    assert "_get_device_state" in names
    assert not {"rng_states", "get_seed", "set_seed"} & names


def in_slot(step=3, micro_step=1, **options):
    progress = dckpt.TrainProgress(batch=BATCH)
    progress.step, progress.micro_step = step, micro_step
    with rng_slot(progress, **{"seed": 7} | options):
        return draw()


def test_a_slot_is_a_function_of_what_is_computed_and_leaves_no_trace():
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = draw()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    first = in_slot()
    assert draw() == expected
    assert in_slot() == first
    assert in_slot(micro_batch=1) == first
    others = [in_slot(step=4), in_slot(micro_step=2), in_slot(seed=8), in_slot(name="eval"), in_slot(micro_batch=0)]
    numbers = [number for values in (first, *others) for number in values]
    assert len(set(numbers)) == len(numbers)


def test_streams_come_back_when_the_body_of_a_slot_raises():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    with pytest.raises(KeyboardInterrupt), rng_slot(dckpt.TrainProgress(), seed=1):
        torch.rand(9)
        raise KeyboardInterrupt
    assert torch.equal(torch.rand(1), expected)


def test_the_key_of_a_slot_never_changes():
    key = slot_key("train.torch", seed=7, step=3, micro_batch=1)
    assert key.hex() == "96f206de62f8e2a04996e54ac57a5c08a2866fe1f2f16ab8fa973896d1b9338c"
    with rng_slot(dckpt.TrainProgress(), seed=7, micro_batch=1):
        assert torch.initial_seed() == int.from_bytes(
            slot_key("train.torch", seed=7, step=0, micro_batch=1)[:8], "little"
        )


def test_slots_of_many_micro_batches_look_uniform_and_independent():
    drop = nn.Dropout(0.5)
    masks = []
    for number in range(64):
        with rng_slot(dckpt.TrainProgress(), seed=1, micro_batch=number):
            masks.append(drop(torch.ones(256)) > 0)
    kept = torch.stack(masks).float()
    assert abs(kept.mean().item() - 0.5) < 0.02
    correlation = torch.corrcoef(kept)
    assert (correlation - torch.eye(64)).abs().max() < 0.35


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"seed": 1.5}, {"micro_batch": -1}])
def test_arguments_of_a_slot_are_checked(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        in_slot(**wrong)


def test_places_that_are_not_ranks_must_be_given():
    with (
        pytest.raises(ConfigError, match="micro_batch="),
        rng_slot(dckpt.TrainProgress(batch=dckpt.Batch(1, 1, 4)), seed=1),
    ):
        pass
