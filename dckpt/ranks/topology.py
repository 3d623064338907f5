"""Which rank this process is, and how many there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class Topology:
    """This process's place among the processes that save together. Rank 0 coordinates."""

    rank: int
    world_size: int

    @property
    def is_coordinator(self) -> bool:
        """Rank 0 decides and commits; the others report to it."""
        return self.rank == 0


def detect_topology(group: dist.ProcessGroup | None = None) -> Topology:
    """The place in `group` (default: all ranks); one process alone when torch.distributed is not initialised."""
    # Imported here: the offline commands use sessions without torch.
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return Topology(0, 1)
    return Topology(dist.get_rank(group), dist.get_world_size(group))
