"""How much a rank says at a save, and how little it asks torch, for a real FSDP2 state over a fake process group."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch.distributed.tensor import DTensor

from benchmarks.simulation.model import Llama, state_of_rank
from dckpt.dcp import chunks
from dckpt.engine.agreement import PlanAgreement
from dckpt.engine.local_state import LocalState, describe_state
from dckpt.planning.ticket import Ticket
from dckpt.ranks.topology import Topology

RANKS = 64
TICKET_BYTES_MAX = 1024


def steady_ticket(local: LocalState, coordinates: dict[str, int]) -> Ticket:
    """What rank 0 says when all ranks hold the layout of the save before."""
    agreement = PlanAgreement(Topology(0, RANKS))
    first = agreement.ticket(local, 1, 0, coordinates)
    tickets = [first] * RANKS
    question = agreement.ask(tickets)
    details = [agreement.details(local, question)]
    for rank in range(1, RANKS):
        own = {name: (f"{rank:032x}", size) for name, (_, size) in local.values.items() if name in ("rng", "progress")}
        details.append(replace(details[0], structure=None, meshes=None, values={**local.values, **own}))
    agreement.adopt(local, agreement.decide(tickets, details))
    return agreement.ticket(local, 2, 0, coordinates)


@pytest.mark.parametrize("layout", ["fsdp", "hsdp"])
def test_a_steady_ticket_stays_below_a_kilobyte_whatever_the_size_of_the_model(layout: str) -> None:
    sizes = []
    for layers in (1, 3):
        with state_of_rank(layout, RANKS, 0, Llama.for_ranks(RANKS, layers)) as state:
            local = describe_state(state.capture(), None, world_size=RANKS)
            # As on a GPU, with a generator of the user's.
            local.rng |= {"cuda": "c" * 32, "generator:augment": "a" * 32}
            ticket = steady_ticket(local, state.coordinates() or {})
        assert set(ticket.records) == {"rng", "progress"}
        assert len(ticket.rng) == 5
        sizes.append(len(ticket.encode()))

    assert sizes[0] == sizes[1] <= TICKET_BYTES_MAX


def test_torch_is_asked_for_the_box_of_each_kind_of_tensor_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    original = DTensor.__create_chunk_list__

    def counting(tensor: DTensor) -> list:
        asked.append(tuple(tensor.shape))
        return original(tensor)

    monkeypatch.setattr(DTensor, "__create_chunk_list__", counting)
    chunks._known_boxes.clear()
    # A number of ranks that no other test here has: torch keeps the meshes of a process, with the rank's place in them.
    with state_of_rank("fsdp", 2 * RANKS, 5, Llama.for_ranks(2 * RANKS, 3)) as state:
        captured = state.capture()
        found = {item.name: chunks.local_chunks(item.name, item.tensor) for item in captured.tensors}
        kinds = {
            (item.tensor.shape, item.tensor.placements) for item in captured.tensors if isinstance(item.tensor, DTensor)
        }

    assert len(asked) == len(kinds) < len(found) / 4
    assert [chunk.offsets for chunk in found["model.layers.2.q_proj.weight"]] == [(20, 0)]
