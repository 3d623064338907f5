"""Are the live tensors those that were saved? Compared by fingerprints that add up over ranks, whatever the layouts.

Each rank knows two partial sums of every tensor: of the bytes that it holds live, and of the chunks that lie in its share of
the shard files. Over all ranks both add up to the tensor, so their difference adds up to zero. What travels is these
differences, in 32 buckets of tensors; only a bucket that is not zero makes the ranks tell its tensors by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import xxhash

from dckpt.format.values import dump_json, load_json
from dckpt.ranks.messages import format_ranks
from dckpt.state.fingerprints import LiveFingerprint, replica_digest, replica_digests, replica_key, turned

BUCKETS = 32
MESSAGE_BYTES_MAX = 2**31


@dataclass(frozen=True, slots=True)
class SavedFingerprints:
    """What one rank knows, after a load, of the tensors as they were saved.

    tensors: checkpoint name -> (name in the shard files, dtype) of each tensor that this rank loaded. records: name in the
    shard files -> checkpoint name, of tensors that differed by rank: every rank's record that some rank loaded. is_same_mesh:
    each rank loaded its own record; else all ranks loaded that of rank 0. aliases: tied name -> name that holds its data.
    shares: name in the shard files -> sum of the chunks in those files that were this rank's to verify. without: tensors of
    which a chunk there has no fingerprint.
    """

    tensors: Mapping[str, tuple[str, str]]
    records: Mapping[str, str]
    is_same_mesh: bool
    aliases: Mapping[str, str]
    shares: Mapping[str, int]
    without: frozenset[str]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The outcome, equal on every rank.

    differ: tensors whose live content is not what was saved. drifted: ranks whose replicas differ from the lowest rank's, as
    text, by tensor. num_checked: tensors that were compared. cast: tensors of another dtype than saved, not compared. without:
    tensors for which the checkpoint has no fingerprint. reason: why nothing was compared, else None.
    """

    differ: tuple[str, ...] = ()
    drifted: Mapping[str, str] = field(default_factory=dict)
    num_checked: int = 0
    cast: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    reason: str | None = None


class Exchange(Protocol):
    """`Session.exchange`: every rank's payload to the coordinator, whose answer goes to every rank."""

    def __call__(
        self,
        phase: str,
        payload: bytes,
        decide: Callable[[list[bytes]], bytes],
        *,
        error: BaseException | None = None,
    ) -> bytes:
        """As `dckpt.ranks.session.Session.exchange`."""
        ...


@dataclass(frozen=True, slots=True)
class _Pair:
    """A live tensor and the stored one that it should equal. `key` names the pair on every rank."""

    key: str
    live: str
    stored: str
    is_record: bool


def compare(
    saved: SavedFingerprints | None,
    live: Mapping[str, LiveFingerprint] | None,
    live_aliases: Mapping[str, str],
    exchange: Exchange,
    rank: int,
    *,
    error: Exception | None = None,
) -> Comparison:
    """Compares on all ranks together; the same answer, or error, on each. Every rank calls it, in the same order.

    live: of this rank, None with the `error` that it failed with. live_aliases: tied live name -> name that holds its data.
    """
    saved = saved or SavedFingerprints({}, {}, True, {}, {}, frozenset())
    live = live or {}
    pairs, cast = _pairs(saved, live, live_aliases)
    opened = _open(saved, live, pairs, exchange, error)
    if opened["reason"] is not None:
        return Comparison(reason=opened["reason"])
    without = set(opened["without"])
    checked = [pair for pair in pairs if pair.stored not in without]
    values = {pair.key: _difference(pair, saved, live, opened["claims"], rank) for pair in checked}
    free = set(saved.records.values())
    found = _compare_sums(values, replica_digests(live, without=free), exchange)
    differ: list[str] = []
    drifted: dict[str, str] = {}
    if found["buckets"] or found["places"]:
        differ, drifted = _find_names(values, live, free, found, exchange)
    return Comparison(
        differ=tuple(differ),
        drifted=drifted,
        num_checked=len(checked),
        cast=tuple(cast),
        without=tuple(sorted(pair.live for pair in pairs if pair.stored in without)),
    )


# -- what is compared with what ----------------------------------------------------------------------------------------


def _pairs(
    saved: SavedFingerprints, live: Mapping[str, LiveFingerprint], live_aliases: Mapping[str, str]
) -> tuple[list[_Pair], list[str]]:
    """What this rank loaded and still holds; and the names of which it holds another dtype. The same on every rank."""
    tied: dict[str, list[str]] = {}
    for alias, holder in saved.aliases.items():
        tied.setdefault(holder, []).append(alias)
    pairs, cast = [], []
    for name, (stored, dtype) in sorted(saved.tensors.items()):
        # A tied tensor may be stored under one of its names and be held under another, or be untied now.
        for place in dict.fromkeys(live_aliases.get(other, other) for other in (name, *tied.get(name, ()))):
            if place not in live:
                continue
            if live[place].dtype != dtype:
                cast.append(place)
            elif stored == name:
                pairs.append(_Pair(place, place, stored, is_record=False))
    for stored, name in sorted(saved.records.items()):
        if name in live and name not in cast:
            pairs.append(_Pair(stored, name, stored, is_record=True))
    return pairs, cast


def _difference(
    pair: _Pair, saved: SavedFingerprints, live: Mapping[str, LiveFingerprint], claims: Sequence[int], rank: int
) -> int:
    """This rank's part of live minus saved."""
    item = live[pair.live]
    if not pair.is_record:
        counts = item.is_first and claims[item.group] == item.claim
    elif saved.is_same_mesh:
        counts = saved.tensors[pair.live][0] == pair.stored
    else:
        counts = rank == 0
    return saved.shares.get(pair.stored, 0) ^ (item.value if counts else 0)


# -- what travels ------------------------------------------------------------------------------------------------------


def _open(
    saved: SavedFingerprints,
    live: Mapping[str, LiveFingerprint],
    pairs: Sequence[_Pair],
    exchange: Exchange,
    error: Exception | None,
) -> dict[str, Any]:
    """Whether all ranks mean the same tensors, who counts what several hold, and what cannot be compared."""
    hasher = xxhash.xxh3_128()
    for pair in pairs:
        hasher.update(f"{pair.key}\n{pair.live}\n{pair.stored}\n".encode())
    for name, item in live.items():
        hasher.update(f"{name}\n{item.group}\n".encode())
    claims: dict[int, int] = {}
    for item in live.values():
        claims[item.group] = min(item.claim, claims.get(item.group, item.claim))
    groups = max(claims, default=0) + 1
    own = {
        "pairs": hasher.hexdigest(),
        "claims": [claims.get(group, -1) for group in range(groups)],
        "without": sorted(saved.without),
    }

    def decide(payloads: list[bytes]) -> bytes:
        told = [_parse(data) for data in payloads]
        odd = [rank for rank, one in enumerate(told) if one["pairs"] != told[0]["pairs"]]
        reason = f"{format_ranks(odd)}: other tensors than on rank 0" if odd else None
        lowest = [] if odd else [min(held) for held in zip(*(one["claims"] for one in told), strict=True)]
        without = sorted({name for one in told for name in one["without"]})
        return _dump({"reason": reason, "claims": lowest, "without": without})

    return _parse(exchange("fingerprints", _dump(own), decide, error=error))


def _compare_sums(values: Mapping[str, int], places: Mapping[str, int], exchange: Exchange) -> dict[str, Any]:
    """Numbers of the buckets that differ, and the places whose replicas do."""
    sums = [0] * BUCKETS
    for key, value in values.items():
        sums[_bucket(key)] ^= turned(value, key)
    own = {"sums": "".join(f"{value:032x}" for value in sums), "places": {key: f"{v:x}" for key, v in places.items()}}

    def decide(payloads: list[bytes]) -> bytes:
        total, told = 0, [_parse(data) for data in payloads]
        for one in told:
            total ^= int(one["sums"], 16)
        text = f"{total:0{32 * BUCKETS}x}"
        buckets = [number for number in range(BUCKETS) if int(text[32 * number : 32 * number + 32], 16)]
        places = _disagreements([one["places"] for one in told])
        return _dump({"buckets": buckets, "places": sorted(places)})

    return _parse(exchange("fingerprints-sums", _dump(own), decide))


def _find_names(
    values: Mapping[str, int],
    live: Mapping[str, LiveFingerprint],
    free: Iterable[str],
    found: Mapping[str, Any],
    exchange: Exchange,
) -> tuple[list[str], dict[str, str]]:
    """The tensors behind what differs. Nothing of this travels while all is well."""
    buckets, places = set(found["buckets"]), set(found["places"])
    suspects = {name: item for name, item in live.items() if name not in free and replica_key(name, item) in places}
    own = {
        "values": {key: f"{value:x}" for key, value in values.items() if _bucket(key) in buckets},
        "replicas": {f"{name} at {item.place}": f"{replica_digest(name, item):x}" for name, item in suspects.items()},
    }

    def decide(payloads: list[bytes]) -> bytes:
        told = [_parse(data) for data in payloads]
        total: dict[str, int] = {}
        for one in told:
            for key, value in one["values"].items():
                total[key] = total.get(key, 0) ^ int(value, 16)
        drifted = _disagreements([one["replicas"] for one in told])
        return _dump({"differ": sorted(key for key, value in total.items() if value), "drifted": drifted})

    answer = _parse(exchange("fingerprints-names", _dump(own), decide))
    drifted: dict[str, list[int]] = {}
    for key, ranks in answer["drifted"].items():
        drifted.setdefault(key.rpartition(" at ")[0], []).extend(ranks)
    return answer["differ"], {name: format_ranks(sorted(ranks)) for name, ranks in sorted(drifted.items())}


def _disagreements(told: Sequence[Mapping[str, str]]) -> dict[str, list[int]]:
    """Of each key on whose value ranks disagree: the ranks that say something else than the lowest that has it."""
    first: dict[str, str] = {}
    odd: dict[str, list[int]] = {}
    for rank, one in enumerate(told):
        for key, value in one.items():
            if first.setdefault(key, value) != value:
                odd.setdefault(key, []).append(rank)
    return odd


def _bucket(key: str) -> int:
    return xxhash.xxh3_64_intdigest(key.encode()) % BUCKETS


def _dump(record: Mapping[str, Any]) -> bytes:
    return dump_json(record, limit=MESSAGE_BYTES_MAX)


def _parse(data: bytes) -> dict[str, Any]:
    record: dict[str, Any] = load_json(data, key="fingerprints of a rank", limit=MESSAGE_BYTES_MAX)
    return record
