"""How much a rank says while a resume of a model of many tensors is validated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import dckpt
from dckpt.ranks.session import Session


def bytes_said(rank: int, world_size: int, root: str, layers: int) -> tuple[int, int, dict[str, str]]:
    """Bytes of this rank's messages in one validation, how many tensors there are, and what was found."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))
    if world_size > 1:
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    progress = dckpt.TrainProgress(max_steps=10)
    progress.advance(loss=1.0)
    state = dckpt.TrainState(model=model, optimizer=optimizer, progress=progress)
    torch.manual_seed(rank)
    said: list[int] = []
    plain = Session.exchange

    def counting(session: Session, phase: str, payload: bytes, *others: Any, **options: Any) -> bytes:
        said.append(len(payload))
        return plain(session, phase, payload, *others, **options)

    with dckpt.Checkpointer(Path(root), deadline_s=60, signals=()) as checkpointer:
        checkpointer.resume(state)
        checkpointer.save(state, blocking=True)
        loaded = checkpointer.load(state)
        Session.exchange = counting  # type: ignore[method-assign]
        try:
            report = checkpointer.validate(state, loaded)
        finally:
            Session.exchange = plain  # type: ignore[method-assign]
    found = {finding.check: finding.severity for finding in (*report.warnings, *report.critical)}
    return sum(said), len(state.capture().tensors), found
