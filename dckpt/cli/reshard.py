"""`dckpt reshard SRC DST`."""

from __future__ import annotations

import os
import sys

import click

from dckpt.cli.outcome import INCOMPLETE, OK, json_option, print_json, returns_exit_code
from dckpt.format.layout import is_tensor_name
from dckpt.ranks.launched import launched_session
from dckpt.ranks.topology import Topology
from dckpt.tools.reshard import ReshardPlan
from dckpt.tools.reshard_run import ReshardRequest, ReshardRun, ReshardWatch, show_reshard
from dckpt.viz.progress import reading_progress

DEADLINE_S = 600.0  # without any progress of a process; then the others stop waiting for it


@click.command(
    epilog="\b\nExit codes: 0 done (or shown, with --dry-run), 1 nothing to do: SRC is laid out so already,\n"
    "2 wrong command line, or SRC cannot be laid out for that mesh, 3 no such SRC,\n"
    "4 SRC is damaged: nothing was committed, 5 storage trouble, a full disk, a lost process,\n"
    "6 DST is taken, or another job wrote there meanwhile."
)
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST")
@click.option("--world-size", type=click.IntRange(min=1), metavar="N", help="How many ranks will load it.")
@click.option("--mesh", metavar="AXIS=SIZE,...", help="Their device mesh, such as dp=4,tp=2.")
@click.option("--dry-run", is_flag=True, help="Show the plan and write nothing.")
@json_option
@returns_exit_code
def reshard(
    source: str, destination: str, world_size: int | None, mesh: str | None, dry_run: bool, as_json: bool
) -> int:
    """Rewrite the checkpoint SRC (RUN[@STEP], or its directory) for another number of ranks.

    DST is an empty or missing directory, which becomes a run of its own, or the run of SRC, which gets a new
    generation that continues from SRC: a job that still trains in that run must be stopped first. Values and tensors
    stay as they are; random streams become those that a resume on the new ranks would derive. Resuming DST there is
    the same as resuming SRC there, and reads each file once.

    Memory is bounded however large SRC is. Start it with torchrun to share the work between processes.
    """
    if world_size is None and mesh is None:
        raise click.UsageError("Say for how many ranks: --world-size N, or --mesh axis=size,...")
    request = ReshardRequest(source, destination, world_size, None if mesh is None else _parse_mesh(mesh))
    topology = _launched_topology()
    is_told = topology.is_coordinator
    if dry_run:
        plan = show_reshard(request)
        if is_told:
            _tell(plan, as_json=as_json, duration_s=None)
        return OK if plan is not None else INCOMPLETE
    is_shown = is_told and sys.stderr.isatty() and not as_json
    with (
        launched_session(topology, what="reshard", call="dckpt reshard", deadline_s=DEADLINE_S) as session,
        reading_progress(is_shown=is_shown) as (on_start, on_bytes),
    ):
        watch = ReshardWatch(on_start=on_start, on_bytes=on_bytes)
        result = ReshardRun(request, session, topology, watch).run()
    if is_told:
        plan = None if result is None else result.plan
        _tell(plan, as_json=as_json, duration_s=None if result is None else result.duration_s)
    return OK if result is not None else INCOMPLETE


def _tell(plan: ReshardPlan | None, *, as_json: bool, duration_s: float | None) -> None:
    if as_json:
        print_json({"plan": plan, "is_done": duration_s is not None, "duration_s": duration_s})
        return
    from dckpt.viz.terminal import render_reshard

    click.echo(render_reshard(plan, duration_s=duration_s), nl=False)


def _launched_topology() -> Topology:
    """The place that torchrun gave this process; alone without it."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if not all(os.environ.get(name) for name in names):
        return Topology(0, 1)
    try:
        return Topology(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    except ValueError as error:
        raise click.UsageError(f"RANK and WORLD_SIZE in the environment: expected numbers, {error}.") from error


def _parse_mesh(text: str) -> dict[str, int]:
    axes: dict[str, int] = {}
    for item in text.split(","):
        axis, _, size = item.strip().partition("=")
        if not is_tensor_name(axis) or not size.isdecimal() or int(size) < 1 or axis in axes:
            raise click.BadParameter(f"expected distinct axes such as dp=4,tp=2, found {text}", param_hint="--mesh")
        axes[axis] = int(size)
    return axes
