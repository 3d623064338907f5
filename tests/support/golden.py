"""Golden checkpoints: small ones of each kind, written once per format version and read by every later dckpt.

    python -m tests.support.golden --write v1

writes tests/compat/data/v1 anew. Nothing here may change once a version is released: old data must load into these very
models. No value comes out of floating-point arithmetic, and ids and times are fixed, so that the bytes repeat.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import dckpt
from dckpt.storage.local import LocalStorage
from tests.support.jobs import torch_bits

DATA = Path(__file__).parents[1] / "compat" / "data"
STEP = 7
EXPECTED = "expected.json"


class Model(nn.Module):
    """Uneven over two ranks, with a tied and a frozen parameter and buffers of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(3, 2)
        self.frozen.requires_grad_(False)
        self.narrow = nn.Linear(3, 1, dtype=torch.bfloat16)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("flags", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("eighth", torch.zeros(4, dtype=torch.float8_e4m3fn))
        self.register_buffer("nothing", torch.zeros(0, 2))


def _exact(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """The same shape and dtype, filled with small binary fractions that every dtype holds exactly."""
    numbers = (torch.arange(tensor.numel(), dtype=torch.int64) + offset) % 8
    if tensor.dtype is torch.bool:
        return (numbers % 2 == 1).view(tensor.shape)
    return (numbers.to(torch.float32) / 4).to(tensor.dtype).view(tensor.shape)


class Training:
    """Everything that a golden run saves; blank until `fill`."""

    def __init__(self, kind: str, rank: int, world_size: int) -> None:
        self.rank = rank
        self.model = Model()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.zero_()
        if kind == "fsdp":
            fully_shard(self.model.narrow)
            fully_shard(self.model)
        self.names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.5, foreach=False)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=2, gamma=0.5)
        self.progress = dckpt.TrainProgress(
            max_steps=100, batch=dckpt.Batch(micro=4 // world_size, accumulation=1, data_parallel=world_size)
        )
        self.notes: dict[Any, Any] = {"tags": ("a", 1, None), 3: [1.5, float("inf")], "raw": b"\x00\xff"}
        self.state = dckpt.TrainState(
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            progress=self.progress,
            extra={"notes": self.notes},
        )

    def fill(self) -> None:
        """The state at step 7."""
        for _ in range(STEP):
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
            self.optimizer.step()
            self.scheduler.step()
            self.progress.advance(loss=0.25)
        self.optimizer.zero_grad()
        with torch.no_grad():
            for number, parameter in enumerate(self.model.parameters()):
                _fill(parameter, number)
                for place, (key, moment) in enumerate(self.optimizer.state.get(parameter, {}).items()):
                    if moment.dim():
                        # Averages of squares are no smaller than those of the same gradients can be.
                        _fill(moment, number + place + 1, least=4 if key == "exp_avg_sq" else 0)
            for number, buffer in enumerate(self.model.buffers()):
                buffer.copy_(_exact(buffer, number + self.rank))
        self.notes["count"] = 2**70
        random.seed(100 + self.rank)
        np.random.seed(200 + self.rank)
        torch.manual_seed(300 + self.rank)

    def describe(self) -> dict[str, Any]:
        """The live objects themselves, as plain JSON; a collective under FSDP."""
        tensors = {name: _describe(tensor) for name, tensor in self.model.state_dict().items()}
        for name, parameter in zip(self.names, self.optimizer.param_groups[0]["params"], strict=True):
            for key, moment in self.optimizer.state[parameter].items():
                tensors[f"optim.{name}.{key}"] = _describe(moment)
        group = self.optimizer.param_groups[0]
        return {
            "tensors": tensors,
            "lr": group["lr"],
            "betas": repr(group["betas"]),
            "last_epoch": self.scheduler.last_epoch,
            "step": self.progress.step,
            "samples": self.progress.samples,
            "notes": repr(self.state_of_notes()),
        }

    def state_of_notes(self) -> list[tuple[Any, Any]]:
        """In the order of insertion: a dict's order is part of it."""
        return list(self.notes.items())


def _fill(tensor: torch.Tensor, offset: int, least: int = 0) -> None:
    if not isinstance(tensor, DTensor):
        tensor.copy_(_exact(tensor, offset) + least)
        return
    whole = _exact(torch.empty(tensor.shape, dtype=tensor.dtype), offset) + least
    parts = whole.chunk(dist.get_world_size(), 0)
    local = tensor.to_local()
    if local.numel():
        local.copy_(parts[dist.get_rank()])


def _describe(tensor: torch.Tensor) -> list[Any]:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return [str(whole.dtype), list(whole.shape), torch_bits(whole).hex()]


def draws() -> list[Any]:
    """What each stream gives next; moves all of them."""
    numbers = [random.random(), float(np.random.random()), *torch.rand(3, dtype=torch.float64).tolist()]
    return [*(number.hex() for number in numbers), int(torch.randint(0, 2**31, (1,)))]


@contextmanager
def fixed_identity(seed: int) -> Iterator[None]:
    """Ids and times that repeat."""
    chosen = random.Random(seed)
    before = uuid.uuid4, time.time
    uuid.uuid4 = lambda: uuid.UUID(int=chosen.getrandbits(128), version=4)  # type: ignore[assignment]
    time.time = lambda: 1_700_000_000.0  # type: ignore[assignment]
    try:
        yield
    finally:
        uuid.uuid4, time.time = before


# -- jobs ---------------------------------------------------------------------------------------------------------------


def write_run(rank: int, world_size: int, root: str, kind: str) -> dict[str, Any]:
    """Commits one step; what the state was, and what its streams would have given next."""
    training = Training(kind, rank, world_size)
    with fixed_identity(1), dckpt.Checkpointer(root, deadline_s=30, signals=()) as checkpointer:
        checkpointer.resume(training.state)
        training.fill()
        described = training.describe()
        pending = checkpointer.save(training.state, metrics={"val_loss": 0.5}, blocking=True)
        assert pending.outcome == "committed", pending.error
    return {**described, "draws": draws()}


def read_run(rank: int, world_size: int, root: str, kind: str) -> dict[str, Any]:
    """The state after a load into a blank one."""
    training = Training(kind, rank, world_size)
    with dckpt.Checkpointer(root, deadline_s=30, signals=()) as checkpointer:
        report = checkpointer.resume(training.state)
    assert report is not None
    return {**training.describe(), "draws": draws()}


def _alone(rank: int, world_size: int, *, is_blank: bool) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh

    from tests.support.dcp_jobs import shard

    tensors: dict[str, torch.Tensor] = {
        "rows": torch.zeros(5, 2),
        "columns": torch.zeros(2, 3, dtype=torch.float64),
        "whole": torch.zeros(3, dtype=torch.bfloat16),
        "scalar": torch.zeros((), dtype=torch.int64),
        "empty": torch.zeros(0, 3),
    }
    if not is_blank:
        tensors = {name: _exact(tensor, number) for number, (name, tensor) in enumerate(tensors.items())}
    state: dict[str, Any] = dict(tensors)
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (world_size,))
        state["rows"], state["columns"] = shard(tensors["rows"], mesh, 0), shard(tensors["columns"], mesh, 1)
    state["note"] = None if is_blank else (1, {2: "two"}, 2**70, float("-inf"), b"raw", torch.float8_e5m2)
    state["nested"] = {"epoch": -1 if is_blank else 3}
    return state


def _describe_alone(state: dict[str, Any]) -> dict[str, Any]:
    tensors = {name: _describe(value) for name, value in state.items() if isinstance(value, torch.Tensor)}
    return {"tensors": tensors, "note": repr(state["note"]), "nested": state["nested"]}


def write_alone(rank: int, world_size: int, url: str) -> dict[str, Any]:
    """A stand-alone checkpoint through stock `dcp.save`."""
    state = _alone(rank, world_size, is_blank=False)
    with fixed_identity(2):
        dcp.save(state, storage_writer=dckpt.DckptWriter(url, step=STEP))
    return _describe_alone(state)


def read_alone(rank: int, world_size: int, url: str) -> dict[str, Any]:
    """The state after `dcp.load` into a blank one."""
    state = _alone(rank, world_size, is_blank=True)
    dcp.load(state, storage_reader=dckpt.DckptReader(url))
    return _describe_alone(state)


# -- writing ------------------------------------------------------------------------------------------------------------


def write_all(pool: Any, directory: Path) -> dict[str, Any]:
    """All golden checkpoints below `directory`; the record of what they hold."""
    record = {
        "single": pool.run(write_run, 1, str(directory / "single"), "single", has_group=False),
        "fsdp": pool.run(write_run, 2, str(directory / "fsdp"), "fsdp"),
        "alone": pool.run(write_alone, 2, str(directory / "alone" / "step-7")),
    }
    record["fsdp on one rank"] = pool.run(read_run, 1, str(directory / "fsdp"), "single", has_group=False)
    record["single on two ranks"] = pool.run(read_run, 2, str(directory / "single"), "fsdp")
    return record


def content(directory: Path) -> dict[str, bytes]:
    """Every file below `directory` but the reports: each resume writes one of its own."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.parent.name != "reports"]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def main() -> None:
    from tests.support.ranks import RankPool

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--write", metavar="VERSION", required=True, help="the directory below tests/compat/data, such as v1"
    )
    directory = DATA / parser.parse_args().write
    shutil.rmtree(directory, ignore_errors=True)
    LocalStorage(directory).ensure_root()
    pool = RankPool()
    try:
        record = write_all(pool, directory)
    finally:
        pool.close()
    for reports in list(directory.rglob("reports")):
        shutil.rmtree(reports)
    (directory / EXPECTED).write_text(json.dumps(record, indent=1) + "\n")
    files = content(directory)
    print(f"{len(files)} files, {sum(map(len, files.values())):,} bytes in {directory}")


if __name__ == "__main__":
    main()
