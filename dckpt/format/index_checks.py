"""Whether the boxes of an index are sound: inside their tensors, disjoint, complete (FORMAT.md, section 7).

All of it runs over whole columns at once. Nothing here is quadratic in the number of chunks, for any input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dckpt.errors import CorruptCheckpointError

SEPARATION_ROUNDS_MAX = 16
INTERLOCKED_CHUNKS_MAX = 64
TENSOR_BYTES_LIMIT = 2**62

Ints: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]
Refuse: TypeAlias = Callable[[int, str, str], CorruptCheckpointError]
"""Makes the error for the tensor with this number, from what was expected and what was found."""


def first(mask: Any) -> int | None:
    """The position of the first true item, or None."""
    if not mask.any():
        return None
    return int(np.argmax(mask))


def volumes(sizes: Ints, ndim: Ints) -> npt.NDArray[np.float64]:
    """Products of consecutive runs of `sizes`, run i of `ndim[i]` items; capped, so that none overflows."""
    begins = np.cumsum(ndim) - ndim
    found = np.ones(len(ndim), dtype=np.float64)
    for place in range(int(ndim.max(initial=0))):
        rows = np.flatnonzero(ndim > place)
        # Without the cap 64 dimensions reach infinity, and infinity times an empty dimension is not a number.
        found[rows] = np.minimum(found[rows] * sizes[begins[rows] + place], 1e30)
    return found


def exact_volumes(sizes: Ints, ndim: Ints) -> Ints:
    """As `volumes`, as integers: right where the product is below 2^62."""
    begins = np.cumsum(ndim) - ndim
    found = np.ones(len(ndim), dtype=np.int64)
    for place in range(int(ndim.max(initial=0))):
        rows = np.flatnonzero(ndim > place)
        found[rows] *= sizes[begins[rows] + place]
    return found


def ensure_shapes(shapes: Ints, ndim: Ints, item_bytes: Ints, refuse: Refuse) -> None:
    """No dimension is negative, and every tensor has less than 2^62 bytes."""
    owner = np.repeat(np.arange(len(ndim)), ndim)
    place = first(shapes < 0)
    if place is not None:
        raise refuse(int(owner[place]), "dimensions from 0", str(int(shapes[place])))
    tensor = first(volumes(shapes, ndim) * item_bytes >= float(TENSOR_BYTES_LIMIT))
    if tensor is not None:
        raise refuse(tensor, "less than 2^62 bytes", f"the shape {shapes[owner == tensor].tolist()}")


def ensure_boxes_inside(owner: Ints, ndim: Ints, shapes: Ints, offsets: Ints, sizes: Ints, refuse: Refuse) -> None:
    """Every box lies inside its tensor's shape. `owner` is each chunk's tensor, the rest are flat columns."""
    shape_begins = np.cumsum(ndim) - ndim
    chunk_ndim = ndim[owner]
    # For each item of `offsets`, the item of `shapes` that bounds it.
    flat_owner = np.repeat(owner, chunk_ndim)
    within = np.arange(len(offsets)) - np.repeat(np.cumsum(chunk_ndim) - chunk_ndim, chunk_ndim)
    bound = shapes[shape_begins[flat_owner] + within]
    # In this order: the last comparison cannot overflow when the first two hold.
    is_bad = (offsets < 0) | (sizes < 0) | (offsets > bound)
    is_bad |= ~is_bad & (sizes > bound - offsets)
    place = first(is_bad)
    if place is not None:
        raise refuse(
            int(flat_owner[place]),
            f"a box inside dimension {int(within[place])} of size {int(bound[place])}",
            f"offset {int(offsets[place])}, size {int(sizes[place])}",
        )


def ensure_extents_disjoint(owner: Ints, file: Ints, begin: Ints, nbytes: Ints, refuse: Refuse) -> None:
    """The byte ranges of the chunks overlap in no file, and no file holds two chunks of one tensor."""
    order = np.lexsort((begin, file))
    same_file = file[order][1:] == file[order][:-1]
    place = first(same_file & (begin[order][1:] < (begin + nbytes)[order][:-1]))
    if place is not None:
        chunk = int(order[place + 1])
        raise refuse(int(owner[chunk]), "bytes of its own", f"byte {int(begin[chunk])} of a file in two chunks")
    order = np.lexsort((file, owner))
    is_twice = (file[order][1:] == file[order][:-1]) & (owner[order][1:] == owner[order][:-1])
    place = first(is_twice)
    if place is not None:
        raise refuse(int(owner[order[place]]), "at most one chunk in a file", "two")


def ensure_boxes_disjoint(owner: Ints, ndim: Ints, offsets: Ints, sizes: Ints, refuse: Refuse) -> None:
    """No two boxes of one tensor share an element. None may be empty or reach out of its tensor."""
    chunk_ndim = ndim[owner]
    begins = np.cumsum(chunk_ndim) - chunk_ndim
    for dimensions in np.unique(chunk_ndim):
        rows = np.flatnonzero(chunk_ndim == dimensions)
        places = begins[rows][:, None] + np.arange(dimensions)[None, :]
        low = offsets[places]
        _ensure_group_disjoint(owner[rows], low, low + sizes[places], refuse)


def _ensure_group_disjoint(owner: Ints, low: Ints, high: Ints, refuse: Refuse) -> None:
    # Boxes that some axis-parallel cut separates are disjoint. Cutting splits the groups (at first: tensors) into
    # smaller ones, and a group of one box is settled. Sharding along one dimension is settled by the first cut that
    # is not trivial, a grid by one round over the dimensions.
    group, rows = _drop_settled(owner.astype(np.int64), np.arange(len(owner)))
    for _ in range(SEPARATION_ROUNDS_MAX):
        num_before = (len(rows), _num_groups(group))
        for dimension in range(low.shape[1]):
            group, rows = _cut(group, rows, low[:, dimension], high[:, dimension])
            if not len(rows):
                return
        if (len(rows), _num_groups(group)) == num_before:
            break
    if len(rows):
        _ensure_pairs_disjoint(owner, group, rows, low, high, refuse)


def _num_groups(group: Ints) -> int:
    return int(np.count_nonzero(np.diff(group))) + 1 if len(group) else 0


def _drop_settled(group: Ints, rows: Ints) -> tuple[Ints, Ints]:
    # `group` ascends, so a box alone in its group differs from both neighbours.
    if not len(group):
        return group, rows
    is_first = np.ones(len(group), dtype=np.bool_)
    is_first[1:] = group[1:] != group[:-1]
    is_last = np.ones(len(group), dtype=np.bool_)
    is_last[:-1] = is_first[1:]
    keep = ~(is_first & is_last)
    return group[keep], rows[keep]


def _cut(group: Ints, rows: Ints, low: Ints, high: Ints) -> tuple[Ints, Ints]:
    """Splits each group where a plane across this dimension passes between its boxes; drops settled boxes."""
    begin, end = _ranked(group, low[rows], high[rows])
    is_sorted = (group[1:] > group[:-1]) | (begin[1:] >= begin[:-1])
    if not is_sorted.all():
        order = np.lexsort((begin, group))
        begin, end, rows = begin[order], end[order], rows[order]
    # The groups ascend, so adding a stride per group makes one running maximum serve all of them.
    number = np.zeros(len(group), dtype=np.int64)
    number[1:] = np.cumsum(group[1:] != group[:-1])
    stride = int(end.max(initial=0)) + 1
    reached = np.maximum.accumulate(end + number * stride)
    is_new = np.ones(len(group), dtype=np.bool_)
    is_new[1:] = begin[1:] + number[1:] * stride >= reached[:-1]
    return _drop_settled(np.cumsum(is_new), rows)


def _ranked(group: Ints, begin: Ints, end: Ints) -> tuple[Ints, Ints]:
    # Only the order of coordinates matters. Where they are too large for the strides above, take their ranks.
    if (int(end.max(initial=0)) + 1) * (len(group) + 1) < TENSOR_BYTES_LIMIT:
        return begin, end
    _, ranks = np.unique(np.concatenate([begin, end]), return_inverse=True)
    ranks = ranks.astype(np.int64).reshape(-1)
    return ranks[: len(begin)], ranks[len(begin) :]


def _ensure_pairs_disjoint(owner: Ints, group: Ints, rows: Ints, low: Ints, high: Ints, refuse: Refuse) -> None:
    # What no cut separates: interlocked boxes (a pinwheel) or an overlap. All pairs, at distance 1, 2, .. in the group.
    for distance in range(1, INTERLOCKED_CHUNKS_MAX + 1):
        is_pair = group[distance:] == group[:-distance]
        if not is_pair.any():
            return
        one, other = rows[distance:][is_pair], rows[:-distance][is_pair]
        meet = (np.maximum(low[one], low[other]) < np.minimum(high[one], high[other])).all(axis=1)
        place = first(meet)
        if place is not None:
            raise refuse(
                int(owner[one[place]]),
                "disjoint chunks",
                f"chunks at {low[other[place]].tolist()} and {low[one[place]].tolist()} that overlap",
            )
    place = int(np.argmax(is_pair))
    raise refuse(
        int(owner[rows[place]]),
        f"at most {INTERLOCKED_CHUNKS_MAX} interlocked chunks",
        "more chunks that no straight cut separates",
    )


def ensure_complete(owner: Ints, chunk_volumes: Ints, tensor_volumes: Ints, refuse: Refuse) -> None:
    """The chunks of each tensor have as many elements as the tensor; boxes must be disjoint and inside it."""
    # Sums of disjoint boxes stay below 2^62, so they are right even where the running sum wraps around.
    running = np.zeros(len(owner) + 1, dtype=np.uint64)
    np.cumsum(chunk_volumes.astype(np.uint64), out=running[1:])
    ends = np.searchsorted(owner, np.arange(len(tensor_volumes)), side="right")
    begins = np.searchsorted(owner, np.arange(len(tensor_volumes)), side="left")
    covered = (running[ends] - running[begins]).astype(np.int64)
    tensor = first(covered != tensor_volumes)
    if tensor is not None:
        raise refuse(
            tensor,
            f"chunks with {int(tensor_volumes[tensor])} elements together",
            f"{int(covered[tensor])} elements",
        )
