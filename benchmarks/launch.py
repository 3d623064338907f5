"""Starts ranks for one job, or is one of the ranks that torchrun started."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

JOB_DEADLINE_S = 3600.0
END_DEADLINE_S = 60.0

Job = Callable[..., Any]
"""`job(world, *args)`, a module-level function; its result on rank 0 is the job's."""


class NotHereError(Exception):
    """This scenario, or this part of it, cannot run here; the message says why."""


class RankError(Exception):
    """A rank failed or was lost; the message holds every rank's traceback."""


class Worlds(Protocol):
    """Where jobs run. `is_told`: this process writes the record."""

    is_told: bool

    def run(self, ranks: int, job: Job, *args: Any) -> Any:
        """Runs the job on `ranks` ranks and returns rank 0's result. Raises `NotHereError` or `RankError`."""

    def usual_ranks(self) -> int:
        """How many ranks a job gets that fixes no number."""


class OwnWorlds:
    """Each job gets fresh processes on this machine, forked from one that has imported torch."""

    is_told = True

    def __init__(self, ranks: int, device: str) -> None:
        self._ranks, self._device = ranks, device
        # torch's TCPStore asks for the peer's host name at each connect; where no name server answers that takes 5 s.
        os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["benchmarks.preload"])

    def usual_ranks(self) -> int:
        return self._ranks

    def run(self, ranks: int, job: Job, *args: Any) -> Any:
        rendezvous = f"tcp://127.0.0.1:{_free_port()}"
        processes, connections = [], []
        for rank in range(ranks):
            ours, theirs = self._context.Pipe(duplex=False)
            place = (rank, ranks, rank, ranks, rendezvous, self._device)
            process = self._context.Process(target=_serve, args=(theirs, place, job, args), name=f"rank {rank}")
            process.start()
            theirs.close()
            processes.append(process)
            connections.append(ours)
        try:
            result = _first_result(connections)
        except BaseException:
            for process in processes:
                process.kill()  # the others wait for the one that failed; and nobody waits for any when this process is ended
            raise
        finally:
            for process in processes:
                process.join(END_DEADLINE_S)
                if process.is_alive():
                    process.kill()
                    process.join()
        return result


class GivenWorld:
    """Jobs run in the ranks that torchrun started, this process being one of them."""

    def __init__(self, device: str) -> None:
        from benchmarks.world import join_given

        self._world = join_given(device)
        self.is_told = self._world.rank == 0

    def usual_ranks(self) -> int:
        return self._world.size

    def run(self, ranks: int, job: Job, *args: Any) -> Any:
        if ranks != self._world.size:
            raise NotHereError(f"needs {ranks} ranks; torchrun started {self._world.size}")
        return self._world.shared(job(self._world, *args))

    def shared(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        return self._world.shared(value)

    def close(self) -> None:
        import torch.distributed as dist

        dist.destroy_process_group()


def _serve(connection: Connection, place: tuple[int, int, int, int, str, str], job: Job, args: tuple[Any, ...]) -> None:
    """One rank of `OwnWorlds`, from its start to its end."""
    import torch.distributed as dist

    from benchmarks.world import join

    try:
        world = join(*place)
        result = job(world, *args)
        world.barrier()
        connection.send((True, result if world.rank == 0 else None))
    except BaseException:  # noqa: BLE001 - told to the parent, which raises it
        connection.send((False, traceback.format_exc()))
    finally:
        connection.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def _first_result(connections: list[Connection]) -> Any:
    """Rank 0's result once all have answered; an error as soon as one fails, is lost, or the deadline passes."""
    limit = time.monotonic() + JOB_DEADLINE_S
    answers: dict[int, Any] = {}
    while len(answers) < len(connections):
        waiting = {rank: connection for rank, connection in enumerate(connections) if rank not in answers}
        ready = wait(list(waiting.values()), timeout=max(0.0, limit - time.monotonic()))
        if not ready:
            raise RankError(f"no answer within {JOB_DEADLINE_S:g} s from ranks {sorted(waiting)}")
        answers |= {rank: _answer(rank, connection) for rank, connection in waiting.items() if connection in ready}
    return answers[0]


def _answer(rank: int, connection: Connection) -> Any:
    try:
        is_good, answer = connection.recv()
    except EOFError:
        is_good, answer = False, "the process ended without an answer"
    if not is_good:
        raise RankError(f"rank {rank}: {answer}")
    return answer


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
