"""The comparison between ranks: what travels, who counts what, and which names come out."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from dckpt.errors import ConfigError, PeerFailedError
from dckpt.resume.fingerprints import Comparison, SavedFingerprints, compare
from dckpt.state.fingerprints import LiveFingerprint, replica_digests, turned

WORLD = 3
NAMES = tuple(f"model.layers.{number}.weight" for number in range(200))


class Meeting:
    """The exchange of `WORLD` threads; remembers the payloads of each phase."""

    def __init__(self, rank: int, shared: Meeting | None = None) -> None:
        self.rank = rank
        self.barrier: threading.Barrier = shared.barrier if shared else threading.Barrier(WORLD, timeout=20)
        self.told: dict[str, dict[int, bytes]] = shared.told if shared else {}
        self.failed: dict[str, BaseException] = shared.failed if shared else {}
        self.answers: dict[str, bytes] = shared.answers if shared else {}

    def exchange(
        self,
        phase: str,
        payload: bytes,
        decide: Callable[[list[bytes]], bytes],
        *,
        error: BaseException | None = None,
    ) -> bytes:
        if error is not None:
            self.failed[phase] = error
        self.told.setdefault(phase, {})[self.rank] = payload
        self.barrier.wait()
        if phase in self.failed:
            raise PeerFailedError(str(self.failed[phase]), rank=1, phase=phase, cause=str(self.failed[phase]))
        if self.rank == 0:
            self.answers[phase] = decide([self.told[phase][rank] for rank in range(WORLD)])
        self.barrier.wait()
        return self.answers[phase]


class Job:
    """Tensors cut over all ranks, with shares of their saved fingerprints that lie elsewhere: all is well."""

    def __init__(self) -> None:
        rng = random.Random(1)
        self.live: list[dict[str, LiveFingerprint]] = [{} for _ in range(WORLD)]
        self.shares: list[dict[str, int]] = [{} for _ in range(WORLD)]
        for name in NAMES:
            parts = [rng.getrandbits(128) for _ in range(WORLD)]
            whole = parts[0] ^ parts[1] ^ parts[2]
            for rank, part in enumerate(parts):
                self.live[rank][name] = LiveFingerprint(part, "F32", 1, 0, is_first=True, place=f"mesh 1: {rank}")
            first = rng.getrandbits(128)
            self.shares[1][name], self.shares[2][name] = first, first ^ whole
        for rank in range(WORLD):
            self.live[rank]["model.bias"] = LiveFingerprint(77, "F32", 0, rank, is_first=True, place="every rank")
        self.shares[0]["model.bias"] = 77
        tensors = {name: (name, "F32") for name in (*NAMES, "model.bias")}
        self.saved = [SavedFingerprints(tensors, {}, True, {}, shares, frozenset()) for shares in self.shares]
        self.told: dict[str, dict[int, bytes]] = {}

    def run(self, *, failure: Exception | None = None, aliases: Mapping[str, str] | None = None) -> Comparison:
        """The comparison, the same on every rank."""
        first = Meeting(0)

        def one(rank: int) -> Comparison:
            live = None if failure and rank == 1 else self.live[rank]
            error = failure if rank == 1 else None
            meeting = Meeting(rank, first)
            return compare(self.saved[rank], live, aliases or {}, meeting.exchange, rank, error=error)

        with ThreadPoolExecutor(WORLD) as threads:
            found = list(threads.map(one, range(WORLD)))
        assert found[0] == found[1] == found[2]
        self.told = first.told
        return found[0]

    def bend(self, rank: int, name: str, by: int = 1) -> None:
        item = self.live[rank][name]
        self.live[rank][name] = replace(item, value=item.value ^ by)


def test_while_all_is_well_two_kilobytes_travel():
    job = Job()
    found = job.run()

    assert found == Comparison(num_checked=201)
    assert list(job.told) == ["fingerprints", "fingerprints-sums"]
    assert all(len(data) < 1400 for phase in job.told.values() for data in phase.values())


@pytest.mark.parametrize("by", [1, 1 << 127, 0xFFFF << 60])
def test_a_difference_on_any_rank_has_its_name(by: int):
    for rank in range(WORLD):
        job = Job()
        job.bend(rank, NAMES[17], by)

        assert job.run().differ == (NAMES[17],)
        assert all(len(data) < 1600 for data in job.told["fingerprints-names"].values()), "of one bucket only"


def test_the_same_difference_in_many_tensors_does_not_cancel():
    job = Job()
    for name in NAMES:
        job.bend(2, name)

    assert job.run().differ == tuple(sorted(NAMES))


def test_replicas_are_counted_once_and_compared_with_each_other():
    job = Job()
    job.bend(2, "model.bias")
    found = job.run()
    assert (found.differ, found.drifted) == ((), {"model.bias": "rank 2"})

    job.bend(0, "model.bias", 6)
    job.bend(1, "model.bias", 6)
    found = job.run()
    assert (found.differ, found.drifted) == (("model.bias",), {"model.bias": "rank 2"})


def test_of_several_meshes_with_the_same_tensors_the_lowest_counts():
    """Tensor-parallel groups side by side under a data parallelism that no mesh shows."""
    job = Job()
    for rank in range(WORLD):
        for name in NAMES:
            place = LiveFingerprint(5, "F32", 1, rank, is_first=True, place="mesh 1: 0")
            job.live[rank][name] = place
            job.shares[rank][name] = 5 if rank == 2 else 0

    assert job.run() == Comparison(num_checked=201)


def test_what_was_cast_or_has_no_fingerprint_or_is_gone_is_not_compared():
    job = Job()
    for rank in range(WORLD):
        job.live[rank][NAMES[0]] = replace(job.live[rank][NAMES[0]], dtype="BF16", value=rank)
        job.bend(rank, NAMES[1], 1 << rank)
        del job.live[rank][NAMES[2]]
    job.saved[1] = replace(job.saved[1], without=frozenset({NAMES[1]}))
    found = job.run()

    assert (found.differ, found.cast, found.without, found.num_checked) == ((), (NAMES[0],), (NAMES[1],), 198)


def test_tied_tensors_are_compared_under_the_name_by_which_they_are_held():
    """Saved under one name, held under the other; and saved once, held twice."""
    job = Job()
    for rank in range(WORLD):
        job.live[rank]["model.other"] = job.live[rank].pop("model.bias")
    assert job.run(aliases={"model.bias": "model.other"}) == Comparison(num_checked=201)

    job = Job()
    for rank in range(WORLD):
        job.live[rank]["model.twin"] = replace(job.live[rank]["model.bias"], value=76)
        job.saved[rank] = replace(job.saved[rank], aliases={"model.twin": "model.bias"})
    found = job.run()
    assert (found.differ, found.num_checked) == (("model.twin",), 202)


def test_ranks_that_hold_other_tensors_are_told_apart_and_nothing_is_compared():
    job = Job()
    del job.live[2]["model.bias"]

    assert job.run() == Comparison(reason="rank 2: other tensors than on rank 0")


def test_a_rank_that_failed_fails_all():
    with pytest.raises(PeerFailedError, match="no such box"):
        Job().run(failure=ConfigError("no such box"))


def test_replicas_have_digests_by_part_and_place():
    job = Job()
    found = replica_digests(job.live[1], without={"model.bias"})

    assert set(found) == {"model at mesh 1: 1"}
    assert found != replica_digests(job.live[2], without={"model.bias"})
    assert turned(1, "a") != turned(1, "b")
    assert turned(2**127, "a") < 2**128
