"""Real ranks for tests: processes that import torch once and then run many jobs, each in a fresh gloo process group."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

START_DEADLINE_S = 120.0


class RankError(AssertionError):
    """A job failed; the message holds every rank's traceback."""


class RankLost:
    """Stands in the place of a rank's result when its process died."""

    def __init__(self, exit_code: int | None) -> None:
        self.exit_code = exit_code


def _serve(connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    torch.set_num_threads(1)
    connection.send("ready")
    while True:
        task = connection.recv()
        if task is None:
            return
        module, name, rank, world_size, rendezvous, args = task
        try:
            if rendezvous is not None:
                dist.init_process_group(
                    "gloo",
                    init_method=f"file://{rendezvous}",
                    rank=rank,
                    world_size=world_size,
                    timeout=timedelta(seconds=60),
                )
            job = getattr(importlib.import_module(module), name)
            connection.send(("ok", job(rank, world_size, *args)))
        except BaseException:
            connection.send(("error", traceback.format_exc()))
        finally:
            with contextlib.suppress(Exception):
                if dist.is_initialized():
                    dist.destroy_process_group()
            # torch keeps the specs of DTensor operations by equal meshes; on its next task this process may be another rank.
            _clear_sharding_prop_cache()


class _Worker:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, child = context.Pipe()
        self.process = context.Process(target=_serve, args=(child,), daemon=True)
        self.process.start()
        child.close()
        self.is_ready = False

    def await_ready(self) -> None:
        if not self.is_ready:
            assert self.connection.poll(START_DEADLINE_S), "a rank did not start"
            assert self.connection.recv() == "ready"
            self.is_ready = True

    def end(self) -> None:
        self.process.kill()
        self.process.join(10)
        self.connection.close()


class RankPool:
    """Runs `job(rank, world_size, *args)` on `world_size` processes and returns the results by rank.

    `job` is a module-level function of an importable module. A job that raises on any rank fails the call with every
    rank's traceback, unless `allow_loss` and the rank's process died: then its result is a `RankLost`.
    """

    def __init__(self) -> None:
        self._workers: list[_Worker] = []

    def run(
        self,
        job: Callable[..., Any],
        world_size: int,
        *args: Any,
        deadline_s: float = 90.0,
        allow_loss: bool = False,
        has_group: bool = True,
        on_started: Callable[[list[int]], None] | None = None,
    ) -> list[Any]:
        workers = self._take(world_size)
        with tempfile.TemporaryDirectory() as directory:
            rendezvous = os.path.join(directory, "rendezvous") if has_group else None
            for rank, worker in enumerate(workers):
                worker.connection.send((job.__module__, job.__name__, rank, world_size, rendezvous, args))
            if on_started is not None:
                on_started([worker.process.pid or 0 for worker in workers])
            results = self._collect(workers, deadline_s)
        failed = [f"rank {rank}:\n{text}" for rank, (state, text) in enumerate(results) if state == "error"]
        lost = [rank for rank, (state, _) in enumerate(results) if state == "lost"]
        if failed or (lost and not allow_loss):
            self.close()
            raise RankError(f"{job.__name__}: ranks lost: {lost}\n" + "\n".join(failed))
        if lost:
            self._drop_dead()
        return [value for _, value in results]

    def _take(self, count: int) -> list[_Worker]:
        self._drop_dead()
        while len(self._workers) < count:
            self._workers.append(_Worker())
        for worker in self._workers[:count]:
            worker.await_ready()
        return self._workers[:count]

    def _collect(self, workers: list[_Worker], deadline_s: float) -> list[tuple[str, Any]]:
        results: dict[int, tuple[str, Any]] = {}
        limit = time.monotonic() + deadline_s
        open_connections = {worker.connection: rank for rank, worker in enumerate(workers)}
        while open_connections:
            ready = wait(list(open_connections), timeout=max(0.0, limit - time.monotonic()))
            if not ready:
                self.close()
                raise RankError(f"no answer within {deadline_s:g} s from ranks {sorted(open_connections.values())}")
            for connection in ready:
                rank = open_connections.pop(connection)  # type: ignore[arg-type]
                try:
                    results[rank] = connection.recv()  # type: ignore[union-attr]
                except (EOFError, ConnectionError):
                    workers[rank].process.join(5)
                    results[rank] = ("lost", RankLost(workers[rank].process.exitcode))
        return [results[rank] for rank in range(len(workers))]

    def _drop_dead(self) -> None:
        for worker in [w for w in self._workers if not w.process.is_alive()]:
            worker.end()
            self._workers.remove(worker)

    def close(self) -> None:
        for worker in self._workers:
            worker.end()
        self._workers.clear()
