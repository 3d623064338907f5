"""Evaluation in the middle of training, after which training goes on as if it had not happened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from dckpt.state.rng import preserved_rng


@contextmanager
def evaluating(*models: nn.Module, preserve_rng: bool = True) -> Iterator[None]:
    """Put the models in eval mode inside; afterwards every submodule has its own training flag again.

    Frozen parts that were in eval mode before stay so, also when the body raises. With `preserve_rng` the global random
    streams are put back too, so that how often a run evaluates does not change what it trains on.
    """
    flags = [(module, module.training) for model in models for module in model.modules()]
    with ExitStack() as stack:
        if preserve_rng:
            stack.enter_context(preserved_rng())
        try:
            for model in models:
                model.eval()
            yield
        finally:
            # Set one by one: train(mode) would spread each flag to everything below.
            for module, flag in flags:
                module.training = flag
