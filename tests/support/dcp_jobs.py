"""Jobs for the plug-ins of stock `dcp.save` and `dcp.load`: every job builds its own state and compares bit for bit."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

import dckpt
from dckpt import failpoint
from tests.support.jobs import arm, torch_bits
from tests.support.models import Run

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.bool, torch.float8_e4m3fn, torch.float8_e5m2),
)

# Name -> (shape, dimension that is sharded, or None). Rows: even, uneven, fewer than ranks; columns likewise.
SHARDED: dict[str, tuple[tuple[int, ...], int | None]] = {
    "rows": ((8, 4), 0),
    "uneven rows": ((7, 3), 0),
    "few rows": ((2, 5), 0),
    "columns": ((4, 8), 1),
    "uneven columns": ((3, 7), 1),
    "few columns": ((5, 1), 1),
    "deep": ((3, 5, 4), 1),
    "vector": ((5,), 0),
    "replicated": ((3, 3), None),
    "no rows": ((0, 4), 0),
}


def values(seed: int) -> dict[str, Any]:
    """Values that torch would pickle; all of them must come back with their types."""
    return {
        "int": 7 + seed,
        "negative": -3,
        "huge": 2**80 + seed,
        "flag": True,
        "float": 0.1 + seed,
        "inf": math.inf,
        "minus inf": -math.inf,
        "nan": math.nan,
        "text": f"step {seed}: \u00e4 \U0001f600",
        "empty text": "",
        "nothing": None,
        "bytes": bytes([0, 255, seed % 256]),
        "tuple": (1, (2.5, "x"), {3: "int key", "3": "text key", (1, 2): None}),
        "dtype": torch.bfloat16,
        "size": torch.Size([2, 3]),
        "counter": Counter({"a": 2, "b": seed}),
        "set": {1, 2, seed},
        "pairs": (OrderedDict([("z", 1), ("a", seed)]), [], {}),
        "list": [1, None, "two", (3,)],
        "nested": {"deep": {"deeper": seed}},
    }


def full_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """The same on every rank and for every number of ranks: a function of the name and the seed."""
    number = int.from_bytes(hashlib.sha256(f"{name}/{seed}".encode()).digest()[:6], "little")
    count = math.prod(shape) * dtype.itemsize
    data = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
    if dtype is torch.bool:
        data &= 1
    return data.view(dtype).view(shape) if count else torch.empty(shape, dtype=dtype)


def shard(full: torch.Tensor, mesh: DeviceMesh, dim: int | None) -> DTensor:
    """`full` as a DTensor on a mesh of one dimension, without communication."""
    if dim is None:
        return DTensor.from_local(full.clone(), mesh, [Replicate()], run_check=False)
    parts = full.chunk(mesh.size(), dim)
    place = mesh.get_local_rank()
    empty = full.narrow(dim, 0, 0)
    local = parts[place] if place < len(parts) else empty
    return DTensor.from_local(
        local.clone(), mesh, [Shard(dim)], run_check=False, shape=full.shape, stride=full.stride()
    )


def build(rank: int, world_size: int, seed: int) -> dict[str, Any]:
    """Everything at once: all dtypes, all layouts, nested containers, values."""
    state: dict[str, Any] = {
        "plain": {str(dtype): full_tensor(str(dtype), (3, 5), dtype, seed) for dtype in DTYPES},
        "scalar": {str(dtype): full_tensor(f"0-d {dtype}", (), dtype, seed) for dtype in DTYPES},
        "empty": full_tensor("empty", (0, 4), torch.float32, seed),
        "list": [full_tensor("list 0", (2,), torch.int64, seed), {"x": full_tensor("list 1", (3,), torch.bool, seed)}],
        "strided": full_tensor("strided", (6, 4), torch.float32, seed).t(),
        "values": values(seed),
    }
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (world_size,))
        state["sharded"] = {
            name: shard(full_tensor(name, shape, torch.float32, seed), mesh, dim)
            for name, (shape, dim) in SHARDED.items()
        }
        state["sharded fp8"] = shard(full_tensor("fp8", (9, 2), torch.float8_e4m3fn, seed), mesh, 0)
    else:
        state["sharded"] = {name: full_tensor(name, shape, torch.float32, seed) for name, (shape, _) in SHARDED.items()}
        state["sharded fp8"] = full_tensor("fp8", (9, 2), torch.float8_e4m3fn, seed)
    return state


def describe(value: Any) -> Any:
    """A form that is equal exactly for equal types and bits; a DTensor by its local part and global shape."""
    if isinstance(value, DTensor):
        local = value.to_local()
        return ("dtensor", str(value.dtype), tuple(value.shape), tuple(local.shape), torch_bits(local))
    if isinstance(value, torch.Tensor):
        return ("tensor", str(value.dtype), tuple(value.shape), torch_bits(value))
    if isinstance(value, Mapping):
        return (type(value).__name__, [(describe(key), describe(item)) for key, item in value.items()])
    if isinstance(value, (set, frozenset)):
        return (type(value).__name__, sorted(map(repr, value)))
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, [describe(item) for item in value])
    return (type(value).__name__, repr(value))


def ensure_equal(found: Any, expected: Any) -> None:
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        assert list(found) == list(expected), (list(found), list(expected))
        for key, item in expected.items():
            assert describe(found[key]) == describe(item), f"{key}: {found[key]!r} instead of {item!r}"
    assert describe(found) == describe(expected)


def fingerprint(directory: str | Path) -> dict[str, str]:
    """Every file below the directory, with its inode and content."""
    return {
        str(path.relative_to(directory)): f"{path.stat().st_ino} {hashlib.sha256(path.read_bytes()).hexdigest()}"
        for path in sorted(Path(directory).rglob("*"))
        if path.is_file()
    }


def failure_of(call: Callable[[], Any]) -> str:
    """The text of the error that the call raises on this rank; DCP's own kind is a BaseException."""
    try:
        call()
    except (CheckpointException, Exception) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("expected an error")


# -- save on N, load on M ----------------------------------------------------------------------------------------------


def save_state(rank: int, world_size: int, url: str, seed: int, planner: str = "stock") -> None:
    chosen = dckpt.DckptSavePlanner() if planner == "dckpt" else None
    dcp.save(build(rank, world_size, seed), storage_writer=dckpt.DckptWriter(url, step=seed), planner=chosen)


def load_state(rank: int, world_size: int, url: str, seed: int, planner: str = "stock") -> None:
    """Loads into a state with other contents and compares with what was saved."""
    state = build(rank, world_size, seed + 1)
    chosen = dckpt.DckptLoadPlanner() if planner == "dckpt" else None
    dcp.load(state, storage_reader=dckpt.DckptReader(url), planner=chosen)
    ensure_equal(state, build(rank, world_size, seed))


def save_and_load_on_meshes(rank: int, world_size: int, root: str) -> None:
    """Two dimensions: replicated over one and sharded over the other, sharded over both; loaded across."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    full = full_tensor("2d", (6, 5), torch.float32, 1)
    layouts = {"hybrid": [Replicate(), Shard(0)], "both": [Shard(0), Shard(1)], "columns": [Replicate(), Shard(1)]}

    def lay_out(placements: list[Any], tensor: torch.Tensor) -> DTensor:
        local = tensor
        for number, placement in enumerate(placements):
            if isinstance(placement, Shard):
                local = local.chunk(2, placement.dim)[mesh.get_coordinate()[number]]
        return DTensor.from_local(
            local.clone(), mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )

    for name, placements in layouts.items():
        dcp.save({"w": lay_out(placements, full)}, storage_writer=dckpt.DckptWriter(f"{root}/{name}"))
    for name in layouts:
        for placements in layouts.values():
            state = {"w": lay_out(placements, torch.zeros(6, 5))}
            dcp.load(state, storage_reader=dckpt.DckptReader(f"{root}/{name}"))
            ensure_equal(state, {"w": lay_out(placements, full)})


# -- several saves in a row ---------------------------------------------------------------------------------------------


def _series_state(rank: int, world_size: int, number: int) -> dict[str, Any]:
    """Values change in each save; the dtype in the 3rd and 4th; two kinds of state alternate later; one rank differs."""
    mesh = init_device_mesh("cpu", (world_size,))
    dtype = torch.bfloat16 if number in (2, 3) else torch.float32
    state: dict[str, Any] = {
        "w": shard(full_tensor("w", (7, 3), dtype, number), mesh, 0),
        "bias": full_tensor("bias", (5,), dtype, number),
        "step": number,
        "notes": ("a", number),
    }
    if number in (5, 7):
        state = {"other": {"v": shard(full_tensor("v", (4, 4), torch.float64, number), mesh, 1), "step": -number}}
    if number == 8 and rank == world_size - 1:
        state["mine"] = full_tensor("mine", (3,), torch.float32, number)
    return state


def save_series(rank: int, world_size: int, root: str, caching: bool, planner: str, reuse: bool) -> None:
    """Ten saves; each checkpoint holds exactly its own data, and none changes once it is committed."""
    kind = dckpt.DckptSavePlanner if planner == "dckpt" else DefaultSavePlanner
    _forget_cached_plans()
    writer = dckpt.DckptWriter()
    committed: dict[str, dict[str, str]] = {}
    for number in range(10):
        url = f"{root}/save-{number}"
        used = writer if reuse else dckpt.DckptWriter()
        chosen = kind(enable_plan_caching=caching)
        dcp.save(_series_state(rank, world_size, number), checkpoint_id=url, storage_writer=used, planner=chosen)
        committed[url] = fingerprint(url)
        assert not [name for name in os.listdir(root) if name.startswith(".")], "nothing is left beside it"
    for number, (url, files) in enumerate(committed.items()):
        assert fingerprint(url) == files, f"{url} changed after its commit"
        expected = _series_state(rank, world_size, number)
        found = _blank(expected)
        dcp.load(found, storage_reader=dckpt.DckptReader(url), planner=dckpt.DckptLoadPlanner(allow_unexpected=True))
        ensure_equal(found, expected)


def _forget_cached_plans() -> None:
    """Torch keeps them in the class: those of an earlier job, with other ranks, would be taken for this one's."""
    for name in ("save_plan", "all_plans", "global_plan", "metadata", "final_save_plan"):
        getattr(SavePlanner, f"_cached_{name}").clear()


def _blank(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return torch.zeros_like(state)
    if isinstance(state, dict):
        return {key: _blank(item) for key, item in state.items()}
    return type(state)()


# -- async ---------------------------------------------------------------------------------------------------------------


def save_async(rank: int, world_size: int, root: str) -> None:
    """What is saved is the state at the call, however it changes afterwards."""
    for number in range(2):
        state = build(rank, world_size, number)
        future = dcp.async_save(state, storage_writer=dckpt.DckptWriter(f"{root}/async-{number}"))
        for item in [*state["plain"].values(), state["sharded"]["rows"].to_local()]:
            item.zero_()
        future.result()
        load_state(rank, world_size, f"{root}/async-{number}", number)


def save_in_process(rank: int, world_size: int, root: str) -> None:
    """`AsyncCheckpointerType.PROCESS`: a spawned process of each rank saves; two saves through the same processes."""
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

    for number in range(2):
        mesh = init_device_mesh("cpu", (world_size,))
        state = {"w": shard(full_tensor("w", (5, 3), torch.float32, number), mesh, 0), "step": number}
        future = dcp.async_save(
            state,
            storage_writer=dckpt.DckptWriter(f"{root}/process-{number}", step=number),
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
        )
        future.result()
        found = {"w": torch.zeros(5, 3), "step": -1}
        dcp.load(found, storage_reader=dckpt.DckptReader(f"{root}/process-{number}"))
        ensure_equal(found, {"w": full_tensor("w", (5, 3), torch.float32, number), "step": number})


# -- models -----------------------------------------------------------------------------------------------------------


def _model(kind: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model: nn.Module = nn.Sequential(nn.Linear(6, 13), nn.Tanh(), nn.BatchNorm1d(13), nn.Linear(13, 6), nn.Linear(6, 1))
    model[3].weight.requires_grad_(False)
    if kind == "fsdp":
        fully_shard(model[0])
        fully_shard(model)
    elif kind == "ddp":
        model = DistributedDataParallel(model)
    elif kind == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, lr=0.01 * (seed + 1), betas=(0.8, 0.95))


def _train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()


def _gathered(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Whole tensors and values by flat name, equal for every kind of parallelism."""
    model_state, optim_state = get_state_dict(
        model, optimizer, options=StateDictOptions(full_state_dict=True, flatten_optimizer_state_dict=True)
    )
    found = {**{f"model.{k}": v for k, v in model_state.items()}, **{f"optim.{k}": v for k, v in optim_state.items()}}
    return {name: describe(value) for name, value in found.items()}


def _options(kind: str) -> StateDictOptions:
    """Under FSDP1 torch's load planner misses "optim.param_groups" on some ranks, with its own writer too; flat keys work."""
    return StateDictOptions(flatten_optimizer_state_dict=kind == "fsdp1")


def save_model(rank: int, world_size: int, url: str, kind: str) -> dict[str, Any]:
    model, optimizer = _model(kind, 1)
    _train(model, optimizer)
    model_state, optim_state = get_state_dict(model, optimizer, options=_options(kind))
    dcp.save({"model": model_state, "optim": optim_state}, storage_writer=dckpt.DckptWriter(url))
    return _gathered(model, optimizer)


def load_model(rank: int, world_size: int, url: str, kind: str) -> dict[str, Any]:
    model, optimizer = _model(kind, 2)
    model_state, optim_state = get_state_dict(model, optimizer, options=_options(kind))
    state = {"model": model_state, "optim": optim_state}
    dcp.load(state, storage_reader=dckpt.DckptReader(url))
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optim"],
        options=_options(kind),
    )
    return _gathered(model, optimizer)


# -- several chunks of one name on one rank ---------------------------------------------------------------------------


class Banded(torch.Tensor):
    """A tensor that plans itself (torch's own hooks): this rank holds two bands of rows that do not touch."""

    @staticmethod
    def __new__(cls, bands: dict[int, torch.Tensor], shape: tuple[int, ...]) -> Banded:
        return torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=torch.float32)

    def __init__(self, bands: dict[int, torch.Tensor], shape: tuple[int, ...]) -> None:
        self.bands = bands

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]
        raise NotImplementedError(func)

    def _chunks(self) -> list[Any]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        columns = self.shape[1]
        return [
            ChunkStorageMetadata(torch.Size([first, 0]), torch.Size([len(band), columns]))
            for first, band in self.bands.items()
        ]

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        from torch.distributed.checkpoint.metadata import TensorProperties

        properties = TensorProperties(dtype=torch.float32)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self._chunks()
        ]

    def __create_chunk_list__(self) -> list[Any]:
        return self._chunks()

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None
        return self.bands[index.offset[0]]


def save_and_load_bands(rank: int, world_size: int, url: str) -> None:
    """Rank r holds rows 2r and 2r+1, and as many again further down."""
    full = full_tensor("bands", (4 * world_size, 3), torch.float32, 1)
    starts = (2 * rank, 2 * (world_size + rank))
    dcp.save(
        {"w": Banded({start: full[start : start + 2] for start in starts}, tuple(full.shape)), "n": 1},
        storage_writer=dckpt.DckptWriter(url),
    )
    for target in (torch.zeros_like(full), shard(torch.zeros_like(full), init_device_mesh("cpu", (world_size,)), 1)):
        state = {"w": target}
        dcp.load(state, storage_reader=dckpt.DckptReader(url))
        found = state["w"]
        ensure_equal(found.full_tensor() if isinstance(found, DTensor) else found, full)
    blank = Banded({start: torch.zeros(2, 3) for start in starts}, tuple(full.shape))
    dcp.load({"w": blank}, storage_reader=dckpt.DckptReader(url))
    ensure_equal(blank.bands, {start: full[start : start + 2] for start in starts})


# -- refusals and failures -----------------------------------------------------------------------------------------------


class Thing:
    """An object that only pickle could carry."""


def refusals(rank: int, world_size: int, root: str) -> dict[str, str]:
    """What each wrong call says on this rank."""
    weight = torch.ones(3)
    dcp.save({"w": weight}, storage_writer=dckpt.DckptWriter(f"{root}/taken"))
    before = fingerprint(f"{root}/taken")

    def save(state: dict[str, Any], name: str, **options: Any) -> Callable[[], Any]:
        return lambda: dcp.save(state, storage_writer=dckpt.DckptWriter(f"{root}/{name}"), **options)

    found = {
        "no collectives": failure_of(save({"w": weight}, "uncollected", use_collectives=False)),
        "taken": failure_of(save({"w": weight}, "taken")),
        "tensor in a tuple": failure_of(save({"w": weight, "pair": (1, weight)}, "tuple")),
        "object": failure_of(save({"w": weight, "thing": Thing()}, "object")),
        "lambda": failure_of(save({"w": weight, "rule": (lambda: 1,)}, "lambda")),
        "complex128": failure_of(save({"w": torch.ones(2, dtype=torch.complex128)}, "complex")),
        "no url": failure_of(lambda: dcp.save({"w": weight}, storage_writer=dckpt.DckptWriter())),
        "hidden url": failure_of(save({"w": weight}, ".hidden")),
        "nothing there": failure_of(
            lambda: dcp.load({"w": weight}, storage_reader=dckpt.DckptReader(f"{root}/absent"))
        ),
        "one rank without a file": _missing_on_one_rank(rank, root),
    }
    assert fingerprint(f"{root}/taken") == before
    dist.barrier()
    found["visible"] = ",".join(sorted(name for name in os.listdir(root) if not name.startswith(".")))
    return found


def _missing_on_one_rank(rank: int, root: str) -> str:
    """Only rank 1 looks in a place where there is nothing: the others must not be left in a collective."""
    name = "absent" if rank == 1 else "taken"
    return failure_of(lambda: dcp.load({"w": torch.ones(3)}, storage_reader=dckpt.DckptReader(f"{root}/{name}")))


def differences(rank: int, world_size: int, root: str) -> tuple[str, list[float]]:
    """What `DckptLoadPlanner` refuses, and that nothing was changed by it."""
    url = f"{root}/saved"
    saved = {"a": torch.ones(3), "b": torch.ones(2, 2), "n": 1, "extra": torch.ones(1)}
    dcp.save(saved, storage_writer=dckpt.DckptWriter(url))
    live = {"a": torch.zeros(3, dtype=torch.int32), "b": torch.zeros(2, 3), "n": torch.zeros(1), "new": torch.zeros(1)}
    told = failure_of(lambda: dcp.load(live, storage_reader=dckpt.DckptReader(url), planner=dckpt.DckptLoadPlanner()))
    return told, [float(tensor.sum()) for tensor in live.values()]


def fail_then_save(rank: int, world_size: int, root: str, reuse: bool) -> tuple[str, list[str]]:
    """Rank 1 gets EIO while it writes; then the same place is saved again."""
    url = f"{root}/step"
    writer = dckpt.DckptWriter(url)
    arm("before_shard_write", "eio", rank, at_rank=1)
    try:
        told = failure_of(lambda: dcp.save(build(rank, world_size, 1), storage_writer=writer))
        assert rank != 1 or failpoint.hits("before_shard_write") == 1, "the fault did not happen"
    finally:
        failpoint.disarm()
    dist.barrier()
    visible = [name for name in os.listdir(root) if not name.startswith(".")]
    dist.barrier()
    dcp.save(build(rank, world_size, 2), storage_writer=writer if reuse else dckpt.DckptWriter(url))
    load_state(rank, world_size, url, 2)
    return told, visible


def fail_plan_then_save(rank: int, world_size: int, root: str) -> str:
    """Rank 1 fails before the writer is even set up; the same writers must agree again in the next save."""
    writer = dckpt.DckptWriter(f"{root}/first")

    class Failing(DefaultSavePlanner):
        def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
            if rank == 1:
                raise OSError(5, "no plan")
            super().set_up_planner(*args, **kwargs)

    told = failure_of(lambda: dcp.save(build(rank, world_size, 1), storage_writer=writer, planner=Failing()))
    for number in range(2):
        dcp.save(build(rank, world_size, number), checkpoint_id=f"{root}/again-{number}", storage_writer=writer)
        load_state(rank, world_size, f"{root}/again-{number}", number)
    return told


def save_alone(rank: int, world_size: int, root: str) -> None:
    """`no_dist=True` inside a distributed job: each rank saves a checkpoint of its own."""
    state = {"w": full_tensor("w", (3, 2), torch.float32, rank), "rank": rank}
    url = f"{root}/own-{rank}"
    dcp.save(state, storage_writer=dckpt.DckptWriter(url), no_dist=True)
    found: dict[str, Any] = {"w": torch.zeros(3, 2), "rank": -1}
    dcp.load(found, storage_reader=dckpt.DckptReader(url), no_dist=True)
    ensure_equal(found, state)


def save_in_group(rank: int, world_size: int, root: str) -> None:
    """Two process groups save at the same time, each its own checkpoint."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    half = rank // 2
    url = f"{root}/half-{half}"
    state = {"w": full_tensor("w", (4,), torch.float32, half), "half": half}
    dcp.save(state, storage_writer=dckpt.DckptWriter(url), process_group=halves[half])
    found: dict[str, Any] = {"w": torch.zeros(4), "half": -1}
    dcp.load(found, storage_reader=dckpt.DckptReader(url), process_group=halves[half])
    ensure_equal(found, state)


def resources(rank: int, world_size: int, root: str) -> list[tuple[int, int]]:
    """Threads and open files after each of some saves, every one with a writer of its own."""
    import threading

    found = []
    for number in range(4):
        dcp.save({"w": torch.ones(2)}, storage_writer=dckpt.DckptWriter(f"{root}/save-{number}"))
        found.append((threading.active_count(), len(os.listdir("/proc/self/fd"))))
    return found


# -- a checkpoint of Checkpointer ----------------------------------------------------------------------------------------


def load_checkpointer_names(rank: int, world_size: int, url: str, names: list[str]) -> dict[str, str]:
    """Loads tensors by their stored names into plain tensors of the saved shapes; returns digests."""
    reader = dckpt.DckptReader(url)
    metadata = reader.read_metadata()
    state = {
        name: torch.zeros(
            metadata.state_dict_metadata[name].size, dtype=metadata.state_dict_metadata[name].properties.dtype
        )
        for name in names
    }
    dcp.load(state, storage_reader=dckpt.DckptReader(url))
    from dckpt.dcp.chunks import tensor_digest

    return {name: f"{tensor.dtype}{tuple(tensor.shape)}{tensor_digest(tensor)}" for name, tensor in state.items()}


def save_run(rank: int, world_size: int, root: str, kind: str, steps: int) -> str:
    """A checkpoint of `Checkpointer`; returns its name."""
    run = Run(kind, rank, world_size)  # type: ignore[arg-type]
    with dckpt.Checkpointer(root, deadline_s=30, signals=()) as checkpointer:
        checkpointer.resume(run.state)
        run.train(steps)
        pending = checkpointer.save(run.state, blocking=True)
        assert pending.outcome == "committed", pending.error
    assert pending.checkpoint is not None
    return pending.checkpoint


def main() -> None:
    """`python -m tests.support.dcp_jobs RANK WORLD RENDEZVOUS ROOT`: a rank that may have children of its own."""
    import sys

    rank, world_size, rendezvous, root = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    save_in_process(rank, world_size, root)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
