"""What a checkpoint's per-rank records mean on another mesh: carried from rank 0, or refused by name. Pure functions."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from dckpt.format.accumulation import DROP_GRADIENTS, GRADIENTS
from dckpt.planning.records import RNG

# Parts whose per-rank difference has a defined answer on another number of ranks: rank 0's value, said in the report.
CARRIED_PARTS = ("model", "ema")

# Losses that were not reduced differ by rank; the counters beside them are compared when the save is planned.
CARRIED_VALUES = ("progress",)


def part_of(name: str, parts: Sequence[str]) -> str:
    """The part to which a component or a tensor belongs ("extra.noise.table" to "extra.noise")."""
    return max((part for part in parts if f"{name}.".startswith(f"{part}.")), key=len, default=name)


def carried_tensors(rank_tensors: Collection[str], parts: Sequence[str]) -> tuple[str, ...]:
    """Tensors that differed by rank and are taken from rank 0 on another mesh."""
    return tuple(sorted(name for name in rank_tensors if part_of(name, parts) in CARRIED_PARTS))


def refused_records(
    rank_tensors: Collection[str], rank_values: Collection[str], parts: Sequence[str], *, world_size: int
) -> dict[str, str]:
    """Name -> why it cannot be carried over to another mesh, of everything that differed by rank and has no meaning there."""
    names = [name for name in rank_values if name not in (RNG, *CARRIED_VALUES)]
    names += [name for name in rank_tensors if part_of(name, parts) not in CARRIED_PARTS]
    refused = {
        name: f"{name}: differed between the {world_size} ranks that saved it, so it has no meaning on another mesh"
        for name in sorted(names)
        if part_of(name, parts) != GRADIENTS
    }
    if len(refused) < len(names):
        # One line for all parameters: what it is about is the accumulation.
        refused[GRADIENTS] = (
            f"{GRADIENTS}: gradients of a started accumulation that {world_size} ranks had not reduced yet have no meaning on "
            f"another mesh. Continue on the {world_size} ranks that saved them, or begin that step again: {DROP_GRADIENTS}"
        )
    return refused
