"""On a GPU: page-locked images, copies behind forward and backward, and steps that wait on their stream and not on the host."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dckpt
from dckpt.blocks.buffer import ImageBuffer
from dckpt.blocks.source import PieceMemory
from dckpt.engine.deferred import DeferredCopies
from dckpt.engine.pinning import HostPinner

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

WIDTH = 2048


class Loop:
    def __init__(self, seed: int = 0, **options) -> None:
        torch.manual_seed(seed)
        layers = [nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)]
        self.model = nn.Sequential(*layers).to("cuda", torch.bfloat16)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, **options)
        self.progress = dckpt.TrainProgress(max_steps=100)
        self.state = dckpt.TrainState(model=self.model, optimizer=self.optimizer, progress=self.progress)

    def step(self) -> None:
        self.model(torch.randn(64, WIDTH, device="cuda", dtype=torch.bfloat16)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.advance()

    def content(self) -> dict[str, torch.Tensor]:
        found = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for number, held in self.optimizer.state_dict()["state"].items():
            found |= {f"optim.{number}.{key}": value for key, value in held.items()}
        return {name: tensor.detach().clone() for name, tensor in found.items()}


def pinned(size: int) -> memoryview:
    torch.zeros(1, device="cuda")
    pinner = HostPinner()
    pinner.note_device()
    return ImageBuffer(pinner.pin).take([size])[0]


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}])
@pytest.mark.parametrize("overlap", [True, False])
def test_training_goes_on_and_the_checkpoint_is_the_state_at_the_call(tmp_path, options, overlap):
    loop = Loop(**options)
    saved = {}
    with dckpt.Checkpointer(tmp_path / "run", signals=(), overlap=overlap) as checkpointer:
        checkpointer.resume(loop.state)
        for _ in range(3):
            loop.step()
            saved[loop.progress.step] = loop.content()
            checkpointer.save(loop.state)
            loop.step()
        checkpointer.wait()

    for step, expected in saved.items():
        other = Loop(seed=1, **options)
        with dckpt.Checkpointer(tmp_path / "run", signals=()) as checkpointer:
            checkpointer.load(other.state, step=step)
        found = other.content()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_images_and_pieces_are_page_locked():
    assert torch.frombuffer(pinned(2**20), dtype=torch.uint8).is_pinned()
    pinner = HostPinner()
    pinner.note_device()
    assert torch.frombuffer(PieceMemory(pinner.pin).take(2**20), dtype=torch.uint8).is_pinned()


def test_memory_is_released_from_page_locking():
    pinner = HostPinner()
    torch.zeros(1, device="cuda")
    pinner.note_device()
    buffer = ImageBuffer(pinner.pin)
    for _ in range(3):
        assert torch.frombuffer(buffer.take([2**20])[0], dtype=torch.uint8).is_pinned()
        buffer.release()


def test_a_step_waits_on_its_stream_and_not_on_the_host():
    """The copy is held up by work queued before it; the host goes on at once, the change comes after the copy all the same."""
    source = torch.ones(2**26, dtype=torch.uint8, device="cuda")
    target = pinned(source.numel())
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second of the device's time
    copies = DeferredCopies([("model.w", source, target)])
    copies.start()
    copies.before_change()
    source.fill_(7)

    assert not copies.done
    copies.result()
    assert bytes(target[:16]) == b"\x01" * 16
    assert torch.frombuffer(target, dtype=torch.uint8).min() == torch.frombuffer(target, dtype=torch.uint8).max() == 1


def test_a_change_in_place_before_the_step_is_noticed():
    source = torch.ones(2**20, device="cuda")
    copies = DeferredCopies([("model.w", source, pinned(source.nbytes))])
    copies.start()
    source.mul_(2)
    copies.before_change()
    with pytest.raises(dckpt.ConfigError, match=r"model\.w"):
        copies.result()
