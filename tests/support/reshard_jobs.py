"""Jobs for the tests of `dckpt reshard`: continuing what it wrote, and several processes that reshard together."""

from __future__ import annotations

import os
import random
import signal
from typing import Any

import numpy as np
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import dckpt
from dckpt import failpoint
from dckpt.errors import DckptError
from dckpt.ranks.launched import launched_session
from dckpt.ranks.topology import Topology
from dckpt.tools.reshard_run import ReshardRequest, ReshardRun
from tests.support.models import Kind, Run, digests


def resume_and_draw(rank: int, world_size: int, root: str, kind: Kind) -> tuple[dict[str, str], list[float], list[str]]:
    """Resumes; every tensor, value and stream as digests, the next numbers of each stream, and what the report found."""
    run = Run(kind, rank, world_size, seed=2)
    with dckpt.Checkpointer(root, deadline_s=30, signals=()) as checkpointer:
        report = checkpointer.resume(run.state)
        assert report is not None
        found = digests(run.state)
        drawn = [random.random(), float(np.random.rand()), *torch.rand(3).tolist()]
        return found, drawn, sorted(finding.check for finding in report.findings if finding.severity != "not checked")


def resume_train_and_save(rank: int, world_size: int, root: str, kind: Kind) -> tuple[list[float], str]:
    """Resumes, trains on and saves: losses, and the name of what was committed."""
    run = Run(kind, rank, world_size, seed=3)
    with dckpt.Checkpointer(root, deadline_s=30, signals=()) as checkpointer:
        assert checkpointer.resume(run.state) is not None
        losses = run.train(2)
        pending = checkpointer.save(run.state, blocking=True)
        assert pending.outcome == "committed", pending.error
        return losses, str(pending.checkpoint)


def run_on_mesh(
    rank: int, world_size: int, root: str, axes: dict[str, int], is_first: bool
) -> tuple[dict[str, str], list[float]]:
    """FSDP2 over a named mesh (two axes: HSDP). Trains and saves, or resumes; what the state then is, and what it draws."""
    mesh = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
    torch.manual_seed(1 if is_first else 2)
    model = torch.nn.Sequential(torch.nn.Linear(9, 7), torch.nn.Tanh(), torch.nn.Linear(7, 5))
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    state = dckpt.TrainState(model=model, optimizer=optimizer, mesh=mesh)
    torch.manual_seed(1000 + rank)
    np.random.seed(50 + mesh.get_local_rank(list(axes)[-1]))  # equal along the other axis
    random.seed(7)
    with dckpt.Checkpointer(root, deadline_s=30, signals=()) as checkpointer:
        report = checkpointer.resume(state)
        assert (report is None) == is_first
        if is_first:
            for _ in range(2):
                model(torch.ones(3, 9)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            assert checkpointer.save(state, step=2, blocking=True).outcome == "committed"
        found = digests(state)
    return found, [random.random(), float(np.random.rand()), *torch.rand(3).tolist()]


def reshard_together(
    rank: int,
    world_size: int,
    port: int,
    source: str,
    destination: str,
    ranks: int,
    fault: tuple[str, int] | None,
    deadline_s: float = 20.0,
) -> tuple[str, str]:
    """One process of several, as torchrun starts them. `fault`: a failpoint, and the process on which it fails or kills."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if fault is not None and fault[1] == rank:
        failpoint.arm({fault[0].removeprefix("kill:"): _die if fault[0].startswith("kill:") else _fail})
    topology = Topology(rank, world_size)
    try:
        with launched_session(topology, what="reshard", call="dckpt reshard", deadline_s=deadline_s) as session:
            result = ReshardRun(ReshardRequest(source, destination, ranks), session, topology).run()
            return "done", "nothing" if result is None else result.checkpoint
    except DckptError as error:
        return type(error).__name__, error.message
    finally:
        failpoint.disarm()


def _fail() -> None:
    raise OSError(5, "a medium error")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def describe_layout(root: str) -> dict[str, Any]:
    """Of the newest checkpoint: tensor -> its boxes and the files that hold them; records of ranks left out."""
    from dckpt.catalog.catalog import Catalog
    from dckpt.storage.local import LocalStorage

    catalog = Catalog(LocalStorage(root))
    name = catalog.line()[0].name
    manifest, _ = catalog.read_manifest(name)
    index = catalog.read_index(name, manifest)
    return {
        tensor: [(chunk.offsets, chunk.sizes, index.files[chunk.file]) for chunk in index.chunks(tensor)]
        for tensor in index.names()
        if not tensor.startswith("rank.")
    }
