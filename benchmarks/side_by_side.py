"""Saves and loads one FSDP2 state with dckpt and with `torch.distributed.checkpoint`, in turn, on the same ranks and disk.

    python -m benchmarks --ranks 2 --megabytes 1024 --rounds 5 --directory /scratch

Each round does every contender once, in rotating order, so that a machine whose speed drifts slows all of them. What is
reported is the median over rounds and, per contender, the median of the ratio to the baseline of the same round. The
medium's own limits are measured in the same rounds: a plain write with fsync of as many bytes, and `readinto` from the
page cache. Both save contenders are asked for the same thing they promise by default; note that dcp.save does not
fsync directories.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WIDTH = 1024


def build(megabytes: int) -> tuple[Any, Any]:
    """An FSDP2 model whose parameters and AdamW moments together have about `megabytes` MB over all ranks."""
    import torch
    from torch import nn
    from torch.distributed.fsdp import fully_shard

    layers = max(1, round(megabytes * 1e6 / (3 * 4 * WIDTH * WIDTH)))
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)
    model(torch.randn(2, WIDTH)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model, optimizer


class Bench:
    """The contenders, each a method that does its work once and returns seconds by name."""

    def __init__(self, directory: Path, megabytes: int) -> None:
        import torch
        import torch.distributed as dist
        from torch.distributed.checkpoint.state_dict import get_state_dict

        import dckpt

        self.dist, self.torch, self.dckpt = dist, torch, dckpt
        self.rank = dist.get_rank()
        self.directory = directory
        self.model, self.optimizer = build(megabytes)
        self.get_state_dict = lambda: get_state_dict(self.model, self.optimizer)
        self.state = dckpt.TrainState(model=self.model, optimizer=self.optimizer)
        self.checkpointer = dckpt.Checkpointer(directory / "dckpt", retention=dckpt.Retention(last=1), signals=())
        self.step = 0
        self.bytes = sum(
            tensor.to_local().numel() * tensor.element_size() for tensor in [*self.model.parameters(), *self._moments()]
        )
        self.raw = memoryview(bytearray(os.urandom(1 << 20) * (self.bytes >> 20)))

    def _moments(self) -> list[Any]:
        return [v for held in self.optimizer.state.values() for v in held.values() if v.dim()]

    def _together(self, work: Callable[[], object]) -> float:
        """Seconds until the slowest rank is done."""
        self.dist.barrier()
        begin = time.perf_counter()
        work()
        self.dist.barrier()
        return time.perf_counter() - begin

    def _fresh(self, name: str) -> Path:
        path = self.directory / name
        if self.rank == 0:
            shutil.rmtree(path, ignore_errors=True)
        self.dist.barrier()
        return path

    def save_dckpt(self) -> dict[str, float]:
        self.step += 1
        pending = None

        def work() -> None:
            nonlocal pending
            pending = self.checkpointer.save(self.state, step=self.step)
            assert pending.wait() == "committed", pending.error

        seconds = self._together(work)
        return {"save: dckpt": seconds, "stall: dckpt": pending.seconds_stalled}

    def save_dcp(self) -> dict[str, float]:
        import torch.distributed.checkpoint as dcp

        path = self._fresh("dcp")

        def work() -> None:
            model, optimizer = self.get_state_dict()
            dcp.save({"model": model, "optim": optimizer}, checkpoint_id=path)

        return {"save: dcp.save": self._together(work)}

    def stall_dcp(self) -> dict[str, float]:
        import torch.distributed.checkpoint as dcp

        path = self._fresh("dcp-async")
        self.dist.barrier()
        begin = time.perf_counter()
        model, optimizer = self.get_state_dict()
        future = dcp.async_save({"model": model, "optim": optimizer}, checkpoint_id=path)
        stall = time.perf_counter() - begin
        future.result()
        self.dist.barrier()
        return {"stall: dcp.async_save": stall}

    def save_raw(self) -> dict[str, float]:
        path = self._fresh("raw")
        path.mkdir(exist_ok=True)

        def work() -> None:
            with open(path / f"{self.rank}", "wb", buffering=0) as file:
                file.writelines(self.raw[begin : begin + (8 << 20)] for begin in range(0, len(self.raw), 8 << 20))
                os.fsync(file.fileno())

        return {"save: buffered write + fsync": self._together(work)}

    def _forget(self, path: Path) -> None:
        """Drops what the page cache holds of `path`: after a restart on another node nothing is there either."""
        for file in sorted(path.rglob("*")) if self.rank == 0 else []:
            if file.is_file():
                fd = os.open(file, os.O_RDONLY)
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)

    def _cold_and_warm(self, name: str, path: Path, work: Callable[[], object]) -> dict[str, float]:
        self._forget(path)
        cold = self._together(work)
        return {f"load cold: {name}": cold, f"load warm: {name}": self._together(work)}

    def load_dckpt(self) -> dict[str, float]:
        return self._cold_and_warm("dckpt", self.directory / "dckpt", lambda: self.checkpointer.load(self.state))

    def load_dcp(self) -> dict[str, float]:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import set_state_dict

        def work() -> None:
            model, optimizer = self.get_state_dict()
            found = {"model": model, "optim": optimizer}
            dcp.load(found, checkpoint_id=self.directory / "dcp")
            set_state_dict(self.model, self.optimizer, model_state_dict=found["model"], optim_state_dict=found["optim"])

        return self._cold_and_warm("dcp.load", self.directory / "dcp", work)

    def load_raw(self) -> dict[str, float]:
        def work() -> None:
            with open(self.directory / "raw" / f"{self.rank}", "rb", buffering=0) as file:
                for begin in range(0, len(self.raw), 8 << 20):
                    file.readinto(self.raw[begin : begin + (8 << 20)])

        return self._cold_and_warm("readinto", self.directory / "raw", work)


CONTENDERS = ("save_raw", "save_dckpt", "save_dcp", "stall_dcp", "load_raw", "load_dckpt", "load_dcp")
BASELINES = {
    "save": "save: dcp.save",
    "stall": "stall: dcp.async_save",
    "load cold": "load cold: dcp.load",
    "load warm": "load warm: dcp.load",
}


def run_rank(args: argparse.Namespace) -> None:
    """One rank, started by torchrun."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    bench = Bench(Path(args.directory), args.megabytes)
    rounds: list[dict[str, float]] = []
    for number in range(args.rounds + 1):
        found: dict[str, float] = {}
        saves, loads = list(CONTENDERS[:4]), list(CONTENDERS[4:])
        for names in (saves, loads):  # what is loaded was saved in the same round
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                found |= getattr(bench, name)()
        if number:  # the first round touches memory and imports for the first time
            rounds.append(found)
    bench.checkpointer.close()
    if dist.get_rank() == 0:
        total = bench.bytes * dist.get_world_size()
        report = {
            "bytes": total,
            "ranks": dist.get_world_size(),
            "rounds": rounds,
            "torch": torch.__version__,
            "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.release().split('-')[0]}",
        }
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n")
        print_table(report)
    dist.destroy_process_group()


def print_table(report: dict[str, Any]) -> None:
    """Medians, throughput, and the median of the per-round ratio to torch's own."""
    print(
        f"{report['bytes'] / 1e6:,.0f} MB over {report['ranks']} ranks, {len(report['rounds'])} rounds, torch {report['torch']}"
    )
    print(f"{'':32}{'seconds':>9}{'GB/s':>8}{'times faster than torch':>26}")
    for name in report["rounds"][0]:
        seconds = [found[name] for found in report["rounds"]]
        base = BASELINES[name.split(":")[0]]
        ratio = statistics.median(found[base] / found[name] for found in report["rounds"])
        speed = report["bytes"] / 1e9 / statistics.median(seconds)
        print(f"{name:32}{statistics.median(seconds):9.3f}{speed:8.2f}{ratio:26.2f}")


def main() -> None:
    """Starts the ranks, or is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=1024, help="parameters and moments over all ranks")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", help="where to write (default: a temporary directory)")
    parser.add_argument("--output", default="benchmarks/results/side_by_side.json")
    args = parser.parse_args()
    if "RANK" in os.environ:
        run_rank(args)
        return
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks)]
        command += ["-m", "benchmarks", "--megabytes", str(args.megabytes), "--rounds", str(args.rounds)]
        command += ["--directory", directory, "--output", str(Path(args.output).absolute())]
        sys.exit(subprocess.run(command, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode)
