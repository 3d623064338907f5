"""What passes between the ranks about the plan of a save: a ticket each time, details only when the layout is not known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dckpt.errors import ConfigError
from dckpt.format.checksum import digest_bytes
from dckpt.format.values import dump_json, load_json
from dckpt.planning.layout import Layout, Values
from dckpt.planning.records import RNG
from dckpt.planning.structure import Structure

MESSAGE_BYTES_MAX = 2**31


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a rank says at every save, below 1 KB whatever the model's size.

    structure, meshes: keys. layout: key of the layout that the rank holds, "" if it has none for this state. checked: digest over
    all its checked tensors. alike: digests over those that must be equal on all ranks, by group ("" is the values').
    differing: tensors kept per rank -> digest; records: components kept per rank -> (digest, bytes). rng: stream -> digest.
    """

    step: int
    micro_step: int
    structure: str
    meshes: str
    layout: str
    checked: str
    alike: Mapping[str, str]
    differing: Mapping[str, str]
    records: Mapping[str, tuple[str, int]]
    rng: Mapping[str, str]
    coordinates: Mapping[str, int]

    def encode(self) -> bytes:
        """As it travels."""
        return dump_json(
            [
                self.step,
                self.micro_step,
                self.structure,
                self.meshes,
                self.layout,
                self.checked,
                dict(self.alike),
                dict(self.differing),
                dict(self.records),
                dict(self.rng),
                dict(self.coordinates),
            ],
            limit=MESSAGE_BYTES_MAX,
        )

    @classmethod
    def decode(cls, data: bytes) -> Ticket:
        """What another rank of this job sent."""
        return cls(*load_json(data, key="ticket of a rank", limit=MESSAGE_BYTES_MAX))


@dataclass(frozen=True, slots=True)
class Question:
    """The coordinator's answer when some rank holds no layout, or the layout does not fit any more.

    structures, meshes: key -> the rank that sends it. wants_digests: whether each rank sends the digests of its
    checked tensors.
    """

    structures: Mapping[str, int]
    meshes: Mapping[str, int]
    wants_digests: bool


@dataclass(frozen=True, slots=True)
class Details:
    """A rank's answer to a `Question`."""

    structure: str | None
    meshes: str | None
    values: Mapping[str, tuple[str, int]]
    digests: Mapping[str, str] | None

    def encode(self) -> bytes:
        """As it travels."""
        return dump_json(
            [self.structure, self.meshes, dict(self.values), None if self.digests is None else dict(self.digests)],
            limit=MESSAGE_BYTES_MAX,
        )

    @classmethod
    def decode(cls, data: bytes) -> Details:
        """What another rank of this job sent."""
        return cls(*load_json(data, key="details of a rank", limit=MESSAGE_BYTES_MAX))


def ensure_same_step(tickets: Sequence[Ticket]) -> None:
    """Raises `ConfigError` naming the first rank that saves another step than rank 0."""
    first = tickets[0]
    for rank, ticket in enumerate(tickets):
        if (ticket.step, ticket.micro_step) != (first.step, first.micro_step):
            raise ConfigError(
                f"Save: rank 0 saves step {first.step} (micro-step {first.micro_step}), rank {rank} step {ticket.step} "
                f"(micro-step {ticket.micro_step}); expected the same on every rank. Call progress.advance() on every rank."
            )


def combined(digests: Sequence[str]) -> str:
    """One digest over several, in order."""
    return digest_bytes("".join(digests).encode())


def alike_digests(
    structure: Structure, digests: Mapping[str, str], values: Values, layout: Layout | None
) -> dict[str, str]:
    """By group, what must be equal on all ranks that have it if `layout` is to hold."""
    if layout is None:
        return {}
    names = sorted(name for name in values if name not in layout.rank_values)
    found = {"": combined([f"{name}={values[name][0]}" for name in names])}
    if layout.groups:
        for number, group in enumerate(layout.groups):
            mine = [digests[name] for name in group if name in digests]
            if mine:
                found[str(number)] = combined(mine)
    else:
        # One process compares with nobody, and digests nothing.
        kept = [
            digests.get(row.name, "")
            for row in structure.rows
            if row.is_checked and row.name not in layout.rank_tensors
        ]
        found["0"] = combined(kept)
    return found


def is_still_right(layout: Layout, tickets: Sequence[Ticket], keys: Sequence[tuple[str, str]]) -> bool:
    """Whether the layout, made for ranks with these (structure, meshes) keys, holds for what the ranks bring now.

    It holds if every rank has it and holds what it held, what was alike is alike, and what differed still differs.
    Records that outgrew their place were noticed by their rank, which then has no layout.
    """
    if any(ticket.layout != layout.key for ticket in tickets):
        return False
    if [(ticket.structure, ticket.meshes) for ticket in tickets] != list(keys):
        return False
    alike: dict[str, str] = {}
    for ticket in tickets:
        for group, digest in ticket.alike.items():
            if alike.setdefault(group, digest) != digest:
                return False
    return all(
        len({ticket.differing[name] for ticket in tickets if name in ticket.differing}) > 1
        for name in layout.rank_tensors
    ) and all(
        # A component that some rank lacks differs.
        len({ticket.records[name][0] if name in ticket.records else None for ticket in tickets}) > 1
        for name in layout.rank_values
        if name != RNG
    )


def ask(tickets: Sequence[Ticket], known_structures: Mapping[str, Any], known_meshes: Mapping[str, Any]) -> Question:
    """What the coordinator must hear before it can decide a layout."""
    structures: dict[str, int] = {}
    meshes: dict[str, int] = {}
    checked: set[str] = set()
    for rank, ticket in enumerate(tickets):
        checked.add(ticket.checked)
        if ticket.structure not in known_structures:
            structures.setdefault(ticket.structure, rank)
        if ticket.meshes not in known_meshes:
            meshes.setdefault(ticket.meshes, rank)
    # With several structures the combined digests do not compare, and names decide one by one.
    is_one_class = len({ticket.structure for ticket in tickets}) == 1
    return Question(structures, meshes, wants_digests=not is_one_class or len(checked) > 1)
