from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from dckpt.state.evaluating import evaluating


def draws():
    return [torch.rand(1).item(), float(np.random.rand()), random.random()]


def model():
    built = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(2), nn.Sequential(nn.Dropout(0.1)))
    built[1].eval()  # a frozen part that training leaves in eval mode
    return built


def flags(module):
    return [child.training for child in module.modules()]


def test_every_submodule_has_its_own_flag_again():
    first, second = model(), model().eval()
    before = flags(first), flags(second)
    with evaluating(first, second):
        assert not any(flags(first) + flags(second))
        first[2].train()
    assert (flags(first), flags(second)) == before


def test_flags_and_random_streams_come_back_when_the_body_raises():
    net = model()
    before = flags(net)
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = draws()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    with pytest.raises(KeyboardInterrupt), evaluating(net):
        draws()
        raise KeyboardInterrupt
    assert flags(net) == before
    assert draws() == expected


def test_random_streams_go_on_when_asked_to():
    torch.manual_seed(1)
    expected = [torch.rand(1).item(), torch.rand(1).item()][1]
    torch.manual_seed(1)
    with evaluating(model(), preserve_rng=False):
        torch.rand(1)
    assert torch.rand(1).item() == expected


def test_a_compiled_module_is_put_back_too():
    net = model()
    compiled = torch.compile(net)
    before = flags(net)
    with evaluating(compiled):
        assert not any(flags(net))
    assert flags(net) == before


class Refusing(nn.Module):
    """A part that fails to be put into eval mode, after others have been."""

    def train(self, mode=True):
        if not mode:
            raise RuntimeError("not now")
        return super().train(mode)


def test_flags_come_back_when_eval_itself_fails_half_way():
    net = nn.ModuleDict({"first": nn.Dropout(), "second": Refusing(), "third": nn.Dropout()})
    before = flags(net)
    with pytest.raises(RuntimeError, match="not now"), evaluating(net):
        raise AssertionError("the body must not run")
    assert flags(net) == before


@pytest.mark.parametrize("error", [GeneratorExit, SystemExit, KeyboardInterrupt, MemoryError])
def test_flags_come_back_whatever_ends_the_body(error):
    net = model()
    before = flags(net)
    with pytest.raises(error), evaluating(net):
        raise error
    assert flags(net) == before


def test_flags_come_back_when_a_generator_that_evaluates_is_given_up():
    net = model()
    before = flags(net)

    def batches():
        with evaluating(net):
            yield from range(10)

    running = batches()
    next(running)
    assert not any(flags(net))
    running.close()
    assert flags(net) == before


def test_evaluations_may_be_nested_and_share_modules():
    shared = model()
    outer, inner = nn.Sequential(shared, nn.Dropout()), nn.Sequential(shared)
    before = flags(outer)
    with evaluating(outer):
        within = flags(outer)
        with pytest.raises(ValueError, match="x"), evaluating(inner, outer):
            inner.train()
            raise ValueError("x")
        assert flags(outer) == within
    assert flags(outer) == before


def test_modules_that_come_or_go_inside_do_no_harm():
    net = model()
    before = flags(net)
    with evaluating(net):
        removed = net[0]
        net[0] = nn.Dropout(0.9)
    assert removed.training
    assert flags(net)[2:] == before[2:]
