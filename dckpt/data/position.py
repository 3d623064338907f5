"""Where an epoch stands, and what the next step takes of it: arithmetic on whole numbers, without ranks, files or torch.

A position counts samples of *all* ranks whose gradients are inside an optimizer step. So it means the same for any number
of ranks, micro-batches and workers; only the samples of a whole step (G = micro x accumulation x ranks) enter here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from dckpt.data.order import Indices

Tail = Literal["drop", "short"]
"""What becomes of the last samples of an epoch that make no whole step: left out, or a shorter step. Never padded."""


@dataclass(frozen=True, slots=True)
class Position:
    """`cursor` samples of epoch `epoch` are trained on; the data set has `size`."""

    size: int
    epoch: int = 0
    cursor: int = 0

    def effective(self, step: int, tail: Tail) -> int:
        """How many samples this epoch has in all, if it goes on from here with `step` samples a step."""
        return self.size if tail == "short" else self.cursor + (self.size - self.cursor) // step * step

    def next_step(self, step: int, tail: Tail) -> int:
        """How many samples the next step takes; 0 at the end of the epoch."""
        return min(step, self.effective(step, tail) - self.cursor)

    def moved(self, samples: int) -> Position:
        """So many samples later in the same epoch."""
        assert 0 <= samples <= self.size - self.cursor, (self, samples)
        return replace(self, cursor=self.cursor + samples)

    def settled(self, step: int, tail: Tail) -> Position:
        """This position, or the beginning of the next epoch if nothing is left of this one."""
        if self.next_step(step, tail):
            return self
        return Position(self.size, self.epoch + 1)


def share_positions(cursor: int, steps: int, step: int, rank: int, ranks: int, micro: int = 1) -> Indices:
    """Of `steps` whole steps from `cursor`: the positions of `rank`, in turns of `micro`; shape (steps, step // ranks).

    The micro-batches of a step follow each other in the order, and rank r takes the r-th of each `ranks`. So with one
    micro-batch size they hold the same samples on any number of ranks.
    """
    begins = cursor + step * np.arange(steps, dtype=np.int64)
    turns = np.arange(rank * micro, step, ranks * micro, dtype=np.int64)
    own = (turns[:, None] + np.arange(micro, dtype=np.int64)).reshape(-1)
    return begins[:, None] + own


def cut_share(count: int, parts: int) -> list[tuple[int, int]]:
    """`count` samples as `parts` micro-batches that differ by at most one sample: (begin, end) of each."""
    return [(count * part // parts, count * (part + 1) // parts) for part in range(parts)]


def has_empty_parts(samples: int, ranks: int, parts: int) -> bool:
    """Whether a step of so many samples leaves one of `parts` micro-batches of some rank without any."""
    return 0 < samples < ranks * parts
