"""A program that must not know dckpt: torch's own `HuggingFaceStorageReader` on a directory of shard files.

`python stock_reader.py DIRECTORY RANK WORLD RENDEZVOUS` prints JSON: tensor -> SHA-256 of dtype, shape and whole bytes. With
more than one rank every tensor of two rows and more is loaded as a DTensor that is sharded over the ranks.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from typing import Any


class Blocker(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname.split(".")[0] == "dckpt":
            raise ImportError("dckpt is blocked here")


def digest(tensor: Any) -> str:
    import torch

    text = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return hashlib.sha256(text + data).hexdigest()


def main(arguments: Sequence[str]) -> None:
    directory, rank, world_size, rendezvous = arguments[0], int(arguments[1]), int(arguments[2]), arguments[3]
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    torch.set_num_threads(1)
    mesh = None
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
        mesh = init_device_mesh("cpu", (world_size,))
    state: dict[str, Any] = {}
    for name, meta in HuggingFaceStorageReader(directory).read_metadata().state_dict_metadata.items():
        blank = torch.zeros(meta.size, dtype=meta.properties.dtype)
        if mesh is not None and blank.dim() and blank.shape[0] >= world_size:
            local = blank.chunk(world_size, 0)[rank].clone()
            state[name] = DTensor.from_local(
                local, mesh, [Shard(0)], run_check=False, shape=blank.shape, stride=blank.stride()
            )
        else:
            state[name] = blank
    dcp.load(state, storage_reader=HuggingFaceStorageReader(directory))
    found = {}
    for name, tensor in state.items():
        # Bytes are gathered as uint8: gloo has no collective for every dtype.
        whole = tensor
        if isinstance(tensor, DTensor):
            parts: list[Any] = [None] * world_size
            local = tensor.to_local().contiguous().view(-1)
            dist.all_gather_object(parts, local.view(torch.uint8).numpy().tobytes())
            data = bytearray(b"".join(parts))
            whole = torch.frombuffer(data, dtype=torch.uint8).view(tensor.dtype).view(tensor.shape)
        found[name] = digest(whole)
    if world_size > 1:
        dist.destroy_process_group()
    assert not [name for name in sys.modules if name.split(".")[0] == "dckpt"]
    if rank == 0:
        sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    sys.meta_path.insert(0, Blocker())
    main(sys.argv[1:])
