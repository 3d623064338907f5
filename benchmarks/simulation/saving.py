"""Saves of a whole job as its coordinator lives through them: a real saver, store, directory and commit."""

from __future__ import annotations

import functools
import math
import multiprocessing
import resource
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from benchmarks.simulation.crowd import DEADLINE_S, PROCESSES, Casting, Crowd, Traffic, link_to
from benchmarks.simulation.model import AXES, WAYS, Llama, mesh_shape, state_of_rank
from benchmarks.simulation.peers import Files, Role, peers_of
from benchmarks.simulation.stopwatch import Stopwatch
from dckpt.catalog.retention import Retention
from dckpt.engine.agreement import PlanAgreement
from dckpt.engine.job import SaveRequest
from dckpt.engine.keeper import Keeper
from dckpt.engine.pending import PendingSave
from dckpt.engine.saver import Saver
from dckpt.planning.files import plan_files
from dckpt.planning.indexing import FileReport, RankReport, lay_index, report_files
from dckpt.planning.layout import Layout
from dckpt.planning.structure import RankClass
from dckpt.ranks.coordination import Coordination
from dckpt.ranks.session import Session
from dckpt.ranks.topology import Topology
from dckpt.storage.local import LocalStorage

PARTS = (
    # What the coordinator alone does at every save.
    ("read tickets", "dckpt.planning.ticket:Ticket", "decode"),
    ("does the layout hold", "dckpt.engine.agreement:PlanAgreement", "is_settled"),
    ("ask", "dckpt.engine.agreement:PlanAgreement", "ask"),
    ("read details", "dckpt.planning.ticket:Details", "decode"),
    ("decide the layout", "dckpt.engine.agreement:PlanAgreement", "decide"),
    ("generation and fence", "dckpt.engine.lineage:Lineage", "ensure_generation"),
    ("describe the checkpoint", "dckpt.engine.saver", "describe_checkpoint"),
    ("begin the attempt", "dckpt.catalog.transaction:Transaction", "begin"),
    ("build the index", "dckpt.engine.agreement:Known", "index_from"),
    ("list and compare files", "dckpt.catalog.transaction:Transaction", "ensure_files"),
    ("write the index", "dckpt.catalog.transaction:Transaction", "write_index"),
    ("write the manifest", "dckpt.catalog.transaction:Transaction", "stage_manifest"),
    ("publish", "dckpt.catalog.transaction:Transaction", "publish"),
    ("retention", "dckpt.engine.keeper:Keeper", "apply"),
)
DECIDING = "decisions of the exchanges"
OWN_PARTS = (
    # What every rank does for itself.
    ("capture", "dckpt.state.train_state:TrainState", "capture"),
    ("describe", "dckpt.engine.saver", "describe_state"),
    ("ticket", "dckpt.engine.agreement:PlanAgreement", "ticket"),
    ("plan files", "dckpt.engine.agreement:PlanAgreement", "adopt"),
)


@dataclass(frozen=True)
class Save:
    """One save: processor seconds by part, and what went over the wire.

    coordinator_s: what the coordinator alone does, by the clock: decisions, commit, retention. coordinator_cpu_s: the same
    in processor seconds, and with its process's share of the exchanges (the store's server included), `exchange_cpu_s`.
    """

    parts: dict[str, float]
    own: dict[str, float]
    coordinator_s: float
    coordinator_cpu_s: float
    exchange_cpu_s: float
    traffic: Traffic


class _Exchanges:
    """Watches the exchanges of a session: the decisions go to `watch`, the rest is counted for the whole process."""

    def __init__(self, watch: Stopwatch) -> None:
        self.cpu_s = 0.0
        self._watch = watch

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While the body runs."""
        original = Session.exchange

        @functools.wraps(original)
        def exchange(session: Session, phase: str, payload: bytes, decide: Any, **options: Any) -> bytes:
            deciding_s = 0.0

            def timed(payloads: list[bytes]) -> bytes:
                nonlocal deciding_s
                begin = time.process_time()
                try:
                    with self._watch.timed(DECIDING):
                        return decide(payloads)
                finally:
                    deciding_s = time.process_time() - begin

            begin = time.process_time()
            found = original(session, phase, payload, timed, **options)
            self.cpu_s += time.process_time() - begin - deciding_s
            return found

        Session.exchange = exchange  # type: ignore[method-assign]
        try:
            yield
        finally:
            Session.exchange = original  # type: ignore[method-assign]


def roles_of(layout: str, ranks: int, sizes: Llama) -> list[Role]:
    """A role for each class of ranks, described by its first rank."""
    classes = [range(ranks)]
    if layout == "fsdp+tp":  # what tensor parallelism leaves whole is sharded over a mesh of its own for each column
        classes = [range(first, ranks, WAYS) for first in range(WAYS)]
    elif layout == "fsdp+pp":
        a_stage = ranks // WAYS
        classes = [range(first, first + a_stage) for first in range(0, ranks, a_stage)]
    # In processes of their own: torch keeps meshes, and a rank never becomes another one.
    with multiprocessing.get_context("spawn").Pool(min(len(classes), PROCESSES), maxtasksperchild=1) as pool:
        return pool.starmap(_describe_role, [(layout, ranks, members, sizes) for members in classes], chunksize=1)


def _describe_role(layout: str, ranks: int, members: range, sizes: Llama) -> Role:
    with state_of_rank(layout, ranks, members[0], sizes) as state:
        return Role.of(state, members, ranks)


def files_of(roles: list[Role], axes: tuple[str, ...], shape: tuple[int, ...]) -> Files:
    """The size of every rank's file, from a decision made as the coordinator makes it.

    To plan the files of thousands of ranks one after the other would take an hour: the first and the last rank of each
    role are planned in full, headers and all, and the plan must agree with what the decision says of them.
    """
    world = range(math.prod(shape))
    peers = list(peers_of(roles, axes, shape, world))
    agreement = PlanAgreement(Topology(0, len(world)))
    tickets = [peer.ticket(0) for peer in peers]
    question = agreement.ask(tickets)
    layout = agreement.decide(tickets, [peer.details(0, question) for peer in peers])
    known = agreement.known
    assert known is not None
    begins, planned = [0] * len(world), {}
    for role in roles:
        for rank in (role.ranks[0], role.ranks[-1]):
            planned[rank] = _plan(role, rank, layout, known.capacities[rank])
        for rank in role.ranks:
            begins[rank] = planned[role.ranks[0]].data_begin
    drafts = [RankReport((FileReport(f"rank{rank:05d}.safetensors", 0, begins[rank], False, 0),), ()) for rank in world]
    sizes = lay_index(known.decision, drafts, known.capacities).file_extents()
    for rank, file in planned.items():
        assert sizes[rank] - begins[rank] == file.size - file.data_begin, (rank, sizes[rank], file)
    return Files(tuple(sizes), tuple(begins))


def _plan(role: Role, rank: int, layout: Layout, capacities: dict[str, int]) -> FileReport:
    ranks = RankClass(role.structure, role.meshes, tuple(role.ranks))
    boxes = [ranks.boxes_of(row, rank) for row in role.structure.rows]
    report = report_files(plan_files(rank, role.structure, boxes, layout, capacities), layout.listed)
    assert len(report.files) == 1, report.files
    return report.files[0]


class Coordinator:
    """Rank 0 of a job, real but for its process group; `crowd` plays the others. Use it in a `with` block."""

    def __init__(self, layout: str, ranks: int, sizes: Llama, root: str) -> None:
        self.storage = LocalStorage(root)
        self.topology = Topology(0, ranks)
        self._layout, self._sizes = layout, sizes
        self._stack = ExitStack()
        self._watch = Stopwatch()
        self._number = 0

    def __enter__(self) -> Coordinator:
        ranks, axes, shape = (
            self.topology.world_size,
            AXES[self._layout],
            mesh_shape(self._layout, self.topology.world_size),
        )
        roles = roles_of(self._layout, ranks, self._sizes)
        files = files_of(roles, axes, shape)
        self.file_bytes = files.sizes[0]
        self.num_tensors = len(roles[0].structure.rows)
        self.state_bytes = sum({row.name: row.nbytes for role in roles for row in role.structure.rows}.values())
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        server: Any = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]

        def cast(mine: range) -> Casting:
            return Casting(server.port, self.storage.url, roles, axes, shape, files, mine)

        self.storage.ensure_root()
        self.state = self._stack.enter_context(state_of_rank(self._layout, ranks, 0, self._sizes))
        self._stack.enter_context(self._watch.watching(PARTS + OWN_PARTS))
        coordination = Coordination(link_to(server.port), self.topology, DEADLINE_S, server)
        keeper = Keeper(self.storage, Retention(last=2))
        self.saver = Saver(self.storage, coordination, self.topology, on_commit=keeper.apply)
        self._stack.callback(coordination.close, 0.0)
        self._stack.callback(self.saver.close)
        self.crowd = self._stack.enter_context(Crowd(cast, ranks))  # last: it leaves while the store still answers
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def save(self) -> Save:
        """The next save, from all ranks' calls to the commit and what is deleted after it."""
        self._number += 1
        step = 100 * self._number
        pending = PendingSave(step)
        self.crowd.prepare(self._number, step)
        self._watch.take()
        exchanges = _Exchanges(self._watch)
        with exchanges.watching():
            self.crowd.start()
            request = SaveRequest(step, 0, {}, is_blocking=True)  # from live tensors: no image takes memory
            self.saver.start(self.state, request, pending, self.saver.committer.finish, started_s=time.monotonic())
        traffic = self.crowd.finish()
        assert pending.wait() == "committed", pending.error
        clock, cpu = self._watch.take()
        alone = (DECIDING, "publish", "retention")
        return Save(
            parts={name: cpu[name] for name, _, _ in PARTS if name in cpu},
            own={name: cpu[name] for name, _, _ in OWN_PARTS if name in cpu},
            coordinator_s=sum(clock[name] for name in alone),
            coordinator_cpu_s=sum(cpu[name] for name in alone) + exchanges.cpu_s,
            exchange_cpu_s=exchanges.cpu_s,
            traffic=traffic,
        )
