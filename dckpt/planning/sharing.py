"""Which rank reads which blocks when a job loads: every rank computes its own part of one plan, equal on all ranks.

A file's blocks fall into runs, each wanted by one set of ranks. What one rank wants it reads itself. What several want is
read by one of them and sent to the others, but for crumbs: up to `SURPLUS` of a file's wanted bytes may be read more than
once, because asking a neighbour for one block costs more than reading it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from dckpt.format.checksum import BLOCK_BYTES
from dckpt.planning.pieces import FileChunks
from dckpt.planning.wants import Ints, Wants

SURPLUS = 0.04
STRIPE_BLOCKS_MIN = 8  # 512 KiB: below, a message costs more than its bytes
STRIPE_BLOCKS_MAX = (
    16  # 1 MiB: what a reader holds at once, times its slots, is memory that is touched for the first time
)
PEERS_MAX = 32  # ranks that share one stripe; more of them read it once for each such group


@dataclass(frozen=True, slots=True)
class Stripe:
    """Bytes `begin` to `end` of file number `file`: `owner` reads them for `takers`, which include it. Ascending ranks."""

    file: int
    begin: int
    end: int
    owner: int
    takers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Runs:
    """Ranges of blocks, ascending and disjoint, each with the groups that want it (pairs of run and group, by run)."""

    begins: Ints
    ends: Ints
    is_shared: npt.NDArray[np.bool_]
    pair_runs: Ints
    pair_groups: Ints


@dataclass(frozen=True, slots=True)
class FilePlan:
    """One rank's part of a file: the stripes that it takes part in, and the byte ranges that it reads alone. Ascending."""

    stripes: tuple[Stripe, ...]
    alone: tuple[tuple[int, int], ...]


def plan_file(wants: Wants, file: int, size: int, chunks: FileChunks, rank: int) -> FilePlan | None:
    """How `rank` reads what it wants of a file of `size` bytes; None if it shares nothing of it and reads all itself.

    Every rank that takes part in a stripe finds it in its own plan.
    """
    if not chunks.is_aligned:
        return None
    runs = _find_runs(wants, chunks)
    if runs is None or not runs.is_shared.any():
        return None
    mine = np.array([rank in wants.group(number) for number in range(wants.num_groups)], dtype=bool)
    my_runs = np.unique(runs.pair_runs[mine[runs.pair_groups]])
    if not runs.is_shared[my_runs].any():
        return None
    lengths = np.where(runs.is_shared, runs.ends - runs.begins, 0)
    # Whose turn it is follows from what is shared before: stripes of one set of ranks then fall evenly on them.
    turns = file + (np.cumsum(lengths) - lengths) // STRIPE_BLOCKS_MIN
    stripes: list[Stripe] = []
    known: dict[bytes, tuple[int, ...]] = {}
    alone: list[tuple[int, int]] = []
    for run in my_runs.tolist():
        begin, end = int(runs.begins[run]), int(runs.ends[run])
        if runs.is_shared[run]:
            takers = _takers(wants, runs, run, rank, known)
            stripes += _cut_shared(file, size, begin, end, takers, int(turns[run]))
        elif alone and alone[-1][1] == begin * BLOCK_BYTES:
            alone[-1] = (alone[-1][0], min(end * BLOCK_BYTES, size))
        else:
            alone.append((begin * BLOCK_BYTES, min(end * BLOCK_BYTES, size)))
    return FilePlan(tuple(stripes), tuple(alone))


def _takers(wants: Wants, runs: _Runs, run: int, rank: int, known: dict[bytes, tuple[int, ...]]) -> tuple[int, ...]:
    """The ranks that share a run with `rank`: all that want it, in even parts of neighbours if they are too many."""
    first, stop = np.searchsorted(runs.pair_runs, [run, run + 1])
    groups = runs.pair_groups[first:stop]
    found = known.get(groups.tobytes())
    if found is None:
        ranks = sorted({member for group in groups.tolist() for member in wants.group(group)})
        parts = -(-len(ranks) // PEERS_MAX)
        edges = [part * len(ranks) // parts for part in range(parts + 1)]
        found = next(tuple(ranks[a:b]) for a, b in pairwise(edges) if ranks[a] <= rank <= ranks[b - 1])
        known[groups.tobytes()] = found
    return found


def _cut_shared(file: int, size: int, begin: int, end: int, takers: tuple[int, ...], turn: int) -> Iterator[Stripe]:
    blocks = end - begin
    # As many for each taker, if they are not too small for that: less than twice the minimum is at most the maximum.
    turns_each = -(-blocks // (len(takers) * STRIPE_BLOCKS_MAX))
    count = max(1, min(turns_each * len(takers), blocks // STRIPE_BLOCKS_MIN))
    edges = [begin + number * blocks // count for number in range(count + 1)]
    for number in range(count):
        yield Stripe(
            file,
            edges[number] * BLOCK_BYTES,
            min(edges[number + 1] * BLOCK_BYTES, size),
            takers[(turn + number) % len(takers)],
            takers,
        )


def _find_runs(wants: Wants, chunks: FileChunks) -> _Runs | None:
    begins, ends, groups = _block_intervals(wants, chunks)
    if not len(begins):
        return None
    bounds = np.unique(np.concatenate([begins, ends]))
    firsts, stops = np.searchsorted(bounds, begins), np.searchsorted(bounds, ends)
    counts = stops - firsts
    starts = np.repeat(firsts, counts)
    steps = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    pair_runs, pair_groups = starts + steps, np.repeat(groups, counts)
    order = np.lexsort((pair_groups, pair_runs))
    pair_runs, pair_groups = pair_runs[order], pair_groups[order]
    # A rank in two of a run's groups counts twice here, which at worst shares a little more than necessary.
    readers = np.bincount(pair_runs, weights=wants.group_sizes()[pair_groups], minlength=len(bounds) - 1)
    lengths = np.diff(bounds)
    surplus = np.where(readers > 1, (readers - 1) * lengths, 0).astype(np.int64)
    return _Runs(
        begins=bounds[:-1],
        ends=bounds[1:],
        is_shared=_too_much(surplus, budget=float(SURPLUS * lengths[readers > 0].sum())),
        pair_runs=pair_runs,
        pair_groups=pair_groups,
    )


def _too_much(surplus: Ints, *, budget: float) -> npt.NDArray[np.bool_]:
    """Which runs are to be shared so that the surplus of the others, taken from the smallest up, stays within `budget`."""
    order = np.argsort(surplus, kind="stable")
    found = np.zeros(len(surplus), dtype=bool)
    found[order] = np.cumsum(surplus[order]) > budget
    found &= surplus > 0
    return found


def _block_intervals(wants: Wants, chunks: FileChunks) -> tuple[Ints, Ints, Ints]:
    """Ranges of blocks by group, for each group ascending and disjoint."""
    begins, ends, groups = [], [], []
    for stored in chunks.chunks:
        for found in wants.intervals(stored.name, stored.chunk, stored.item_bytes):
            begins.append(found.begins + stored.begin)
            ends.append(found.ends + stored.begin)
            groups.append(found.groups)
    if not begins:
        return _NONE, _NONE, _NONE
    first = np.concatenate(begins) // BLOCK_BYTES
    stop = -(-np.concatenate(ends) // BLOCK_BYTES)
    return _merged(first, stop, np.concatenate(groups))


def _merged(first: Ints, stop: Ints, groups: Ints) -> tuple[Ints, Ints, Ints]:
    """Overlapping and adjacent ranges of one group joined."""
    # Each group on a stretch of its own of one long line, so that one pass joins all of them.
    stretch = int(stop.max()) + 1
    begins, ends = first + groups * stretch, stop + groups * stretch
    order = np.argsort(begins, kind="stable")
    begins, reach = begins[order], np.maximum.accumulate(ends[order])
    is_new = np.concatenate(([True], begins[1:] > reach[:-1]))
    last = np.concatenate((np.flatnonzero(is_new)[1:] - 1, [len(begins) - 1]))
    found = begins[is_new] // stretch
    return begins[is_new] - found * stretch, reach[last] - found * stretch, found


_NONE: Ints = np.zeros(0, dtype=np.int64)
