"""One writer for every element: decided on the coordinator from the classes of ranks, told to all in O(tensors + ranks)."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np

from dckpt.errors import ConfigError
from dckpt.format.checksum import digest_bytes
from dckpt.format.grids import Levels
from dckpt.format.values import dump_json, load_json
from dckpt.planning.records import RNG
from dckpt.planning.structure import BLOB_BYTES_MAX, Box, Cut, RankClass, Ranks, TensorRow

# Replicated pieces below this stay on the lowest rank that has them: scattering them costs every reader a file.
SCATTER_BYTES_MIN = 64 * 1024

Values: TypeAlias = Mapping[str, tuple[str, int]]  # component -> digest, bytes of its record


@dataclass(frozen=True)
class Layout:
    """The decision that every rank follows; small, and the same on all of them.

    rank_tensors, rank_values: kept per rank, because they differ. columns: sets of ranks; `column_of`: which of them writes a
    tensor that several ranks hold, each of the set its own piece. Whatever else a rank holds it writes, but for `skips`:
    (tensor, box) pairs of its structure that another rank writes. listed: tensors whose chunks no grid describes. groups: sets of
    tensors whose bytes are compared at every save, each over the ranks that have them.
    """

    rank_tensors: frozenset[str]
    rank_values: frozenset[str]
    columns: tuple[tuple[int, ...], ...]
    column_of: dict[str, int]
    skips: dict[int, frozenset[tuple[int, int]]]
    listed: frozenset[str]
    groups: tuple[tuple[str, ...], ...]
    blob: bytes = b""
    key: str = ""

    def others_columns(self, rank: int) -> frozenset[int]:
        """Numbers of the columns in which `rank` is not: others write those tensors."""
        return frozenset(number for number, ranks in enumerate(self.columns) if rank not in ranks)

    def encoded(self) -> Layout:
        """With the bytes that travel, and their digest as the layout's name."""
        names: list[list[str]] = [[] for _ in self.columns]
        for name, column in self.column_of.items():
            names[column].append(name)
        text = dump_json(
            {
                "rank_tensors": sorted(self.rank_tensors),
                "rank_values": sorted(self.rank_values),
                "columns": [[ranks, sorted(found)] for ranks, found in zip(self.columns, names, strict=True)],
                "skips": {str(rank): sorted(pairs) for rank, pairs in sorted(self.skips.items())},
                "listed": sorted(self.listed),
                "groups": self.groups,
            },
            limit=BLOB_BYTES_MAX,
        )
        blob = zlib.compress(text, 1)
        return replace(self, blob=blob, key=digest_bytes(blob))

    @classmethod
    def decode(cls, blob: bytes) -> Layout:
        """The layout that the coordinator encoded."""
        found: dict[str, Any] = load_json(zlib.decompress(blob), key="layout of a save", limit=BLOB_BYTES_MAX)
        return cls(
            rank_tensors=frozenset(found["rank_tensors"]),
            rank_values=frozenset(found["rank_values"]),
            columns=tuple(tuple(ranks) for ranks, _ in found["columns"]),
            column_of={name: number for number, (_, names) in enumerate(found["columns"]) for name in names},
            skips={int(rank): frozenset((row, box) for row, box in pairs) for rank, pairs in found["skips"].items()},
            listed=frozenset(found["listed"]),
            groups=tuple(tuple(names) for names in found["groups"]),
            blob=blob,
            key=digest_bytes(blob),
        )


NO_LAYOUT = Layout(frozenset(), frozenset(), (), {}, {}, frozenset(), ())


@dataclass(frozen=True, slots=True)
class GridPlace:
    """Where a regularly cut or whole tensor goes: `writers` of the cells, row-major."""

    levels: tuple[Levels, ...]
    writers: tuple[int, ...]


@dataclass
class Decision:
    """What the coordinator knows beyond the layout: enough to build the index once the files' headers are known."""

    layout: Layout = field(default_factory=lambda: NO_LAYOUT)
    tensors: dict[str, TensorRow] = field(default_factory=dict)  # plain name -> row
    grids: dict[str, GridPlace] = field(default_factory=dict)  # stored as cells; per-rank tensors are not here
    records: dict[str, list[tuple[tuple[int, ...], TensorRow]]] = field(default_factory=dict)  # per-rank tensors


_Regular: TypeAlias = tuple[tuple[Levels, ...], Ranks]


@dataclass(frozen=True, slots=True)
class _Piece:
    """One class's view of a tensor."""

    ranks: RankClass
    number: int
    row: TensorRow


def decide_layout(
    classes: Sequence[RankClass],
    values: Sequence[Values],
    digests: Mapping[int, Mapping[str, str]] | None,
    *,
    listed: Collection[str] = (),
) -> Decision:
    """Deterministic in its arguments. `values`: of each rank; `digests`: rank -> checked tensor -> digest, or None if
    all checked tensors are known to be alike. `listed`: tensors whose chunks are listed although a grid would describe them.

    Replicated data gets one writer, balanced by bytes; what differs by rank is kept by rank. Raises `ConfigError` if
    the ranks disagree on a tensor's shape or dtype.
    """
    pieces: dict[str, list[_Piece]] = {}
    for ranks in classes:
        for number, row in enumerate(ranks.structure.rows):
            pieces.setdefault(row.name, []).append(_Piece(ranks, number, row))
    rank_tensors = _differing_tensors(digests or {})
    _ensure_same_tensors(pieces, rank_tensors)
    decision = Decision()
    writers = _Writers(len(values))
    irregular: dict[str, list[_Piece]] = {}
    grids = _Grids()
    shared: list[tuple[int, str, tuple[Levels, ...], Ranks]] = []
    for name, found in pieces.items():
        row = found[0].row
        decision.tensors[name] = row
        if name in rank_tensors:
            decision.records[name] = [(piece.ranks.ranks, piece.row) for piece in found]
            continue
        regular = None if name in listed else grids.of(found)
        if regular is None:
            irregular[name] = found
            continue
        levels, holders = regular
        cell_bytes = -(-row.nbytes // len(holders))
        if holders.shape[1] == 1:
            writers.load[holders[:, 0]] += cell_bytes
            decision.grids[name] = GridPlace(levels, writers.as_tuple(holders[:, 0]))
        else:
            shared.append((-cell_bytes, name, levels, holders))
    skips = _assign_boxes(irregular, writers)
    columns: dict[tuple[int, ...], int] = {}
    column_of: dict[str, int] = {}
    for minus_bytes, name, levels, holders in sorted(shared, key=lambda item: item[:2]):
        column = writers.choose(holders, -minus_bytes)
        decision.grids[name] = GridPlace(levels, column)
        column_of[name] = columns.setdefault(column, len(columns))
    decision.layout = Layout(
        rank_tensors=rank_tensors,
        rank_values=_differing_values(values),
        columns=tuple(columns),
        column_of=column_of,
        skips=skips,
        listed=frozenset(irregular),
        groups=_groups(pieces, rank_tensors, len(classes)),
    ).encoded()
    return decision


class _Writers:
    """Bytes that each rank writes so far."""

    def __init__(self, world_size: int) -> None:
        self.load = np.zeros(world_size, dtype=np.int64)
        self._tuples: dict[bytes, tuple[int, ...]] = {}

    def as_tuple(self, ranks: Ranks) -> tuple[int, ...]:
        """One tuple object for equal arrays: thousands of tensors share it."""
        key = ranks.tobytes()
        found = self._tuples.get(key)
        if found is None:
            found = self._tuples[key] = tuple(ranks.tolist())
        return found

    def choose(self, holders: Ranks, cell_bytes: int) -> tuple[int, ...]:
        """The replica whose busiest rank has least to write; the first one for what is too small to scatter."""
        replica = 0
        if cell_bytes >= SCATTER_BYTES_MIN:
            replica = int(np.argmin(self.load[holders].max(axis=0)))
        column = holders[:, replica]
        self.load[column] += cell_bytes
        return self.as_tuple(column)


class _Grids:
    """The grid of each tensor, worked out once for all tensors that the same classes cut in the same way."""

    def __init__(self) -> None:
        self._known: dict[tuple[tuple[int, Cut | None], ...], _Regular | None] = {}

    def of(self, found: Sequence[_Piece]) -> _Regular | None:
        """(levels, holders of each cell by replica) if every class cuts the tensor into the same grid; else None."""
        if any(piece.row.boxes is not None for piece in found):
            return None
        key = tuple((id(piece.ranks), piece.row.cut) for piece in found)
        if key not in self._known:
            self._known[key] = _regular(found)
        return self._known[key]


def _regular(found: Sequence[_Piece]) -> _Regular | None:
    """As `_Grids.of`, for a tensor that no class holds in listed boxes."""
    if all(piece.row.cut is None for piece in found):
        ranks = sorted(rank for piece in found for rank in piece.ranks.ranks)
        return (), np.array([ranks], dtype=np.int64)
    cuts: list[tuple[_Piece, Cut]] = [(piece, piece.row.cut) for piece in found if piece.row.cut is not None]
    if len(cuts) != len(found):
        return None
    levels = {piece.ranks.levels(cut) for piece, cut in cuts}
    if len(levels) != 1:
        return None
    tables = []
    seen: set[tuple[Any, Any]] = set()
    for piece, cut in cuts:
        key = (piece.ranks.meshes.tables[cut.mesh], cut.axes)
        if key not in seen:
            seen.add(key)
            tables.append(piece.ranks.holders(cut))
    holders = tables[0] if len(tables) == 1 else np.concatenate(tables, axis=1)
    expected = np.array(sorted(rank for piece in found for rank in piece.ranks.ranks), dtype=np.int64)
    if holders.size != len(expected) or not np.array_equal(np.sort(holders, axis=None), expected):
        return None  # a rank of the mesh lacks the tensor, or stands in two meshes
    return levels.pop(), holders


def _assign_boxes(
    irregular: Mapping[str, Sequence[_Piece]], writers: _Writers
) -> dict[int, frozenset[tuple[int, int]]]:
    """What no grid describes, box by box: (tensor, box) pairs that a rank leaves to another one."""
    holders: dict[tuple[str, Box], list[tuple[int, int, int]]] = {}
    sizes: dict[tuple[str, Box], int] = {}
    for name, found in irregular.items():
        for piece in found:
            for rank in piece.ranks.ranks:
                for place, box in enumerate(piece.ranks.boxes_of(piece.row, rank)):
                    holders.setdefault((name, box), []).append((rank, piece.number, place))
                    sizes[name, box] = int(np.prod(box[1], dtype=np.int64)) * piece.row.item_bytes
    skips: dict[int, set[tuple[int, int]]] = {}
    for key in sorted(holders, key=lambda key: (-sizes[key], key)):
        owners = sorted(holders[key])
        candidates = owners if sizes[key] >= SCATTER_BYTES_MIN else owners[:1]
        writer = min(candidates, key=lambda owner: (int(writers.load[owner[0]]), owner[0]))[0]
        writers.load[writer] += sizes[key]
        for rank, number, place in owners:
            if rank != writer:
                skips.setdefault(rank, set()).add((number, place))
    return {rank: frozenset(pairs) for rank, pairs in skips.items()}


def _ensure_same_tensors(pieces: Mapping[str, Sequence[_Piece]], rank_tensors: frozenset[str]) -> None:
    for name, found in pieces.items():
        first = found[0]
        for piece in found[1:]:
            same = (piece.row.dtype, piece.row.shape) == (first.row.dtype, first.row.shape)
            if not same and name not in rank_tensors:
                raise ConfigError(
                    f"Tensor {name}: rank {first.ranks.ranks[0]} has {first.row.dtype} {list(first.row.shape)}, rank "
                    f"{piece.ranks.ranks[0]} has {piece.row.dtype} {list(piece.row.shape)}; expected the same global shape "
                    "and dtype on every rank."
                )


def _differing_tensors(digests: Mapping[int, Mapping[str, str]]) -> frozenset[str]:
    """Plain tensors that are not the same on every rank that has them."""
    seen: dict[str, str] = {}
    differing = set()
    for found in digests.values():
        for name, digest in found.items():
            if seen.setdefault(name, digest) != digest:
                differing.add(name)
    return frozenset(differing)


def _differing_values(values: Sequence[Values]) -> frozenset[str]:
    """Components whose values differ between ranks or are missing on some; RNG is always kept by rank."""
    names = {name for found in values for name in found}
    differing = {name for name in names if len({found.get(name, ("absent", 0))[0] for found in values}) > 1}
    return frozenset(differing | ({RNG} & names))


def _groups(
    pieces: Mapping[str, Sequence[_Piece]], rank_tensors: frozenset[str], num_classes: int
) -> tuple[tuple[str, ...], ...]:
    """Checked tensors by the set of classes that have them: one digest a group says whether all ranks still agree."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, found in pieces.items():
        if found[0].row.is_checked and name not in rank_tensors:
            groups.setdefault(tuple(piece.ranks.ranks[0] for piece in found), []).append(name)
    if num_classes == 1:
        return ()  # all of them: need not be listed
    return tuple(tuple(sorted(names)) for _, names in sorted(groups.items()))
