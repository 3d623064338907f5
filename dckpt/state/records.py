"""What passes between a run's state and the engine: captured tensors and values, a checkpoint's view, a restore plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from dckpt.errors import IncompatibleStateError
from dckpt.format.values import JsonValue

Replication = Literal["sharded", "trusted", "checked"]
Cast = Literal["exact", "allow"]


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """A live tensor, not copied, under the name it has in a checkpoint; plain ones detached.

    (A DTensor is read through its local part, which autograd does not see; detaching it costs more than copying a small one.)
    """

    name: str
    tensor: torch.Tensor
    replication: Replication
    """sharded: a DTensor. trusted: plain, and equal on every rank by construction (under DDP). checked: any other
    plain tensor; whoever saves it compares its bytes over the ranks."""
    is_frozen: bool = False
    """A parameter that is not trained: it goes to files that later saves can reuse whole."""


@dataclass(frozen=True, slots=True)
class Captured:
    """A run's state at one instant. Order and names are the same on every rank."""

    tensors: tuple[NamedTensor, ...]
    values: dict[str, JsonValue]
    """Component -> tagged JSON; tensors inside are references by name."""
    aliases: dict[str, str]
    """Name of a tied tensor -> the name under which it is stored once."""
    rng: dict[str, JsonValue]
    """Random stream -> tagged JSON; always this rank's own."""
    parts: tuple[str, ...]


class CheckpointView(Protocol):
    """What a checkpoint holds for this rank; `rank.<r>.` prefixes are resolved away."""

    @property
    def world_size(self) -> int:
        """How many ranks saved it."""

    @property
    def step(self) -> int | None:
        """The step it was saved at."""

    @property
    def generation(self) -> int:
        """The generation that saved it."""

    @property
    def aliases(self) -> Mapping[str, str]:
        """Tied name -> stored name."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that were saved."""

    def tensors(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Name -> safetensors dtype and global shape."""

    def values(self) -> Mapping[str, JsonValue]:
        """Component -> tagged JSON."""


@dataclass(slots=True)
class RestorePlan:
    """How a checkpoint goes into live state. Making it touched nothing.

    Read each checkpoint tensor of `reads` into its destination, whose dtype and global shape are those of the
    checkpoint, then call `apply`. One name may be read more than once; a destination is a live tensor or a new one.
    """

    reads: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    """What to pass as `allow_unexpected` for those of the differences that it covers."""
    skipped_parts: list[str] = field(default_factory=list)
    saved_micro_step: int = 0
    """Micro-batches of a started accumulation when the checkpoint was saved."""
    micro_step: int = 0
    """Those of them, as this run counts, whose gradients are restored: less means that they are computed again."""
    actions: list[Callable[[], None]] = field(default_factory=list)

    def apply(self) -> None:
        """Attach what was read and restore everything that is not a tensor. RNG is not restored here."""
        if self.differences:
            raise IncompatibleStateError(
                f"the checkpoint does not fit the live state in {len(self.differences)} places, first: "
                f"{self.differences[0]}. Nothing was restored; fix the model, or load partially and say so",
                differences=list(self.differences),
            )
        for action in self.actions:
            action()
