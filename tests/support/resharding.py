"""Resharding in this process, and states that have everything in them that it must carry over."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np

from dckpt.format.streams import encode_stream, python_record, torch_cpu_state
from dckpt.planning.mesh import NamedMesh
from dckpt.ranks.launched import launched_session
from dckpt.ranks.topology import Topology
from dckpt.storage.local import LocalStorage
from dckpt.tools.reshard_run import ReshardRequest, ReshardResult, ReshardRun
from dckpt.tools.verify import verify_checkpoint
from tests.support.sharded_runs import Saved, State, read_tensors, write_state

OPTIM = {"is_mapping": False, "optimizers": {"": {"groups": [{"names": ["w", "b", "narrow"]}], "states": []}}}


def reshard(source: object, destination: object, mesh: NamedMesh) -> ReshardResult | None:
    """In this process, as `dckpt reshard` does it."""
    axes = dict(mesh.sizes) if mesh.is_named else None
    request = ReshardRequest(str(source), str(destination), None if axes else mesh.world_size, axes)
    topology = Topology(0, 1)
    with launched_session(topology, what="reshard", call="reshard", deadline_s=30) as session:
        return ReshardRun(request, session, topology).run()


def streams_of(rank: int) -> dict:
    words = np.random.RandomState(rank).get_state()[1]
    return {
        "python": encode_stream(python_record(random.Random(rank).getstate())),
        "torch": encode_stream({"kind": "torch", "device": "cpu", "state": torch_cpu_state(words, seed=70 + rank)}),
        "generator:shared": encode_stream({"kind": "numpy", "state": np.random.PCG64(5).state}),
    }


def numbers(shape: tuple[int, ...], start: int, dtype: str = "<f4") -> np.ndarray:
    return (np.arange(math.prod(shape)) + start).reshape(shape).astype(dtype)


def a_state(mesh: NamedMesh, level: tuple[str, ...], **changes) -> State:
    """Sharded over `level`, with whole, frozen, empty, narrow and odd tensors; 2 MiB, so that pieces and blocks have edges."""
    cut = (level,) if mesh.world_size > 1 else ()
    tensors = {
        "model.w": Saved(numbers((4001, 33), 0), cuts=(cut,)),
        "optim.w.exp_avg": Saved(numbers((4001, 33), 7), cuts=(cut,)),
        "optim.w.step": Saved(numbers((), 3)),
        "model.b": Saved(numbers((13,), 1, "<u2"), "BF16", cuts=(cut,)),
        "model.narrow": Saved(numbers((1, 5), 2, "<f8"), "F64", cuts=(cut,)),
        "model.frozen": Saved(numbers((10, 3), 9), cuts=(cut,), is_frozen=True),
        "model.table": Saved(numbers((300, 300), 4)),
        "model.flags": Saved(np.array([True, False, True]), "BOOL"),
        "model.nothing": Saved(np.zeros((0, 4), np.float32)),
    }
    fields = {
        "mesh": mesh,
        "tensors": tensors,
        "values": {"optim": OPTIM, "scheduler": {"last_epoch": 3}},
        "streams": [streams_of(rank) for rank in range(mesh.world_size)],
        "rng": {"python": tuple(mesh.sizes), "torch": tuple(mesh.sizes), "generator:shared": ()},
    }
    return State(**(fields | changes))


def write_run(path: Path, state: State, **options) -> LocalStorage:
    storage = LocalStorage(str(path / "run"))
    write_state(storage, state, **options)
    return storage


def ensure_same(state: State, storage: LocalStorage, checkpoint: str, mesh: NamedMesh, names=None):
    """Tensors and values of `state`, on the mesh asked for, each element in one file; returns (manifest, index)."""
    manifest, index, found = read_tensors(storage, checkpoint)
    plain = {name: array for name, array in found.items() if not name.startswith("rank.")}
    assert plain.keys() == set(state.tensors if names is None else names)
    for name, array in plain.items():
        expected = state.tensors[name].array
        assert array.dtype.itemsize == expected.dtype.itemsize
        assert array.tobytes() == expected.tobytes(), name
    assert (manifest.world_size, manifest.mesh) == (mesh.world_size, mesh.mesh)
    report = verify_checkpoint(storage, checkpoint, is_run=manifest.generation > 0)
    assert not report.damages, report.damages
    return manifest, index
