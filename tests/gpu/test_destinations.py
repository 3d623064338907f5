"""Pieces that other ranks read land in tensors on a GPU, whatever stream still works on them."""

from __future__ import annotations

import threading

import pytest
import torch

from dckpt.dcp.destinations import Destinations
from dckpt.planning.pieces import Piece

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize("is_contiguous", [True, False])
def test_pieces_are_copied_behind_earlier_work_and_are_there_when_finish_returns(is_contiguous):
    full = torch.randn(2048, 1024)
    data = memoryview(bytearray(full.view(-1).view(torch.uint8).numpy().tobytes()))
    target = torch.zeros(2048, 1024, device="cuda") if is_contiguous else torch.zeros(1024, 2048, device="cuda").t()
    destinations = Destinations([[target]])
    halves = [Piece(0, 0, 4, at * 4096, (4096, 4), (1024, 1024), (at, 0)) for at in (0, 1024)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # a kernel that still writes to the tensor when the load begins
        target.fill_(7.0)
    destinations.begin()
    threads = [threading.Thread(target=destinations.fill, args=([piece], data)) for piece in halves]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    destinations.finish()
    with torch.cuda.stream(torch.cuda.Stream()):
        found = target.cpu()

    assert torch.equal(found, full)
    assert destinations.landings(halves) is None
