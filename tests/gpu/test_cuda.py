"""On a GPU: what was copied is the state at the call, random streams come back, and tensors return to their device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dckpt

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


class Loop:
    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(256, 512), nn.Dropout(0.3), nn.Linear(512, 256)).to("cuda", dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.progress = dckpt.TrainProgress(max_steps=100)
        self.state = dckpt.TrainState(model=self.model, optimizer=self.optimizer, progress=self.progress)
        self.dtype = dtype

    def step(self) -> float:
        loss = self.model(torch.randn(32, 256, device="cuda", dtype=self.dtype)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.advance(loss=loss)
        return loss.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_on_a_gpu_is_bit_identical(tmp_path, dtype):
    straight = Loop(1, dtype)
    losses = [straight.step() for _ in range(8)]
    first = Loop(1, dtype)
    with dckpt.Checkpointer(tmp_path / "run", signals=()) as checkpointer:
        checkpointer.resume(first.state)
        for _ in range(4):
            first.step()
        checkpointer.save(first.state, blocking=True)
    second = Loop(2, dtype)
    with dckpt.Checkpointer(tmp_path / "run", signals=()) as checkpointer:
        report = checkpointer.resume(second.state)
        assert report is not None
        assert report.loaded.rng["cuda"] == "exact"
        again = [second.step() for _ in range(4)]

    assert again == losses[4:]
    for a, b in zip(straight.model.parameters(), second.model.parameters(), strict=True):
        assert b.is_cuda
        assert torch.equal(a, b)


def test_a_save_holds_the_state_at_the_call_although_the_gpu_runs_on(tmp_path):
    loop = Loop(1)
    with dckpt.Checkpointer(tmp_path / "run", signals=()) as checkpointer:
        checkpointer.resume(loop.state)
        loop.step()
        expected = [p.detach().clone() for p in loop.model.parameters()]
        pending = checkpointer.save(loop.state)
        with torch.no_grad():
            for parameter in loop.model.parameters():
                parameter.fill_(7)
        assert pending.wait() == "committed"
    other = Loop(2)
    with dckpt.Checkpointer(tmp_path / "run", signals=()) as checkpointer:
        checkpointer.resume(other.state)

    for a, b in zip(expected, other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_of_a_gpu_loads_on_the_cpu(tmp_path):
    loop = Loop(1)
    with dckpt.Checkpointer(tmp_path / "run", signals=()) as checkpointer:
        checkpointer.resume(loop.state)
        loop.step()
        checkpointer.save(loop.state, blocking=True)
    model = nn.Sequential(nn.Linear(256, 512), nn.Dropout(0.3), nn.Linear(512, 256))
    state = dckpt.TrainState(model=model)
    with dckpt.Checkpointer(tmp_path / "run", signals=()) as checkpointer:
        checkpointer.load(state, parts=("model",))

    for a, b in zip(loop.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(a.cpu(), b)


def test_tensors_of_any_size_and_layout_are_filled_on_the_gpu(tmp_path):
    """Many spans a thread, so that pinned memory is used again; parts of rows, strided targets, small and host tensors."""
    shapes = [(3000, 5000), (7,), (), (1025, 1023), (4, 300, 5001)]
    saved = {f"t{number}": torch.randn(shape) for number, shape in enumerate(shapes)}
    with dckpt.Checkpointer(tmp_path / "run", signals=()) as checkpointer:
        checkpointer.save(dckpt.TrainState(model=nn.Linear(1, 1), extra={"held": saved}), step=1, blocking=True)
        held = {name: torch.empty(value.shape, device="cuda") for name, value in saved.items()}
        held["t0"] = torch.empty(5000, 3000, device="cuda").t()
        held["t3"] = torch.empty(1025, 2046, device="cuda")[:, ::2]
        held["t4"] = torch.empty(shapes[4])
        # Work on the current stream must not overtake what is loaded, nor be overtaken.
        for value in held.values():
            value.fill_(-1.0)
        places = {name: value.data_ptr() for name, value in held.items()}
        result = checkpointer.load(dckpt.TrainState(model=nn.Linear(1, 1), extra={"held": held}))

    assert result.bytes_read >= sum(4 * value.numel() for value in saved.values())
    for name, value in held.items():
        assert value.data_ptr() == places[name]
        assert torch.equal(value.cpu(), saved[name])


def test_a_damaged_byte_on_the_way_to_the_gpu_is_reported(tmp_path):
    model = nn.Linear(2000, 3000, device="cuda")
    with dckpt.Checkpointer(tmp_path / "run", signals=()) as checkpointer:
        checkpointer.save(dckpt.TrainState(model=model), step=1, blocking=True)
        path = max((tmp_path / "run").glob("step-*/*/*.safetensors"), key=lambda path: path.stat().st_size)
        with path.open("r+b") as file:
            file.seek(20_000_000)
            byte = file.read(1)[0]
            file.seek(20_000_000)
            file.write(bytes([byte ^ 1]))
        with pytest.raises(dckpt.CorruptCheckpointError, match="bytes 19,988,480-20,054,016"):
            checkpointer.load(dckpt.TrainState(model=model))
        with pytest.raises(dckpt.PoisonedStateError):
            checkpointer.save(dckpt.TrainState(model=model), step=2)


def test_a_slot_keys_the_devices_stream_and_puts_it_back():
    torch.cuda.manual_seed(5)
    expected = torch.rand(4, device="cuda")
    torch.cuda.manual_seed(5)
    progress = dckpt.TrainProgress()
    drop, ones = nn.Dropout(0.5), torch.ones(4096, device="cuda")
    masks = []
    for micro_batch in (0, 1, 0):
        with dckpt.rng_slot(progress, seed=1, micro_batch=micro_batch):
            masks.append(drop(ones))

    assert torch.equal(masks[0], masks[2]) and not torch.equal(masks[0], masks[1])
    assert torch.equal(torch.rand(4, device="cuda"), expected)


def test_gradients_on_the_gpu_go_on_in_the_middle_of_a_step(tmp_path):
    def make():
        torch.manual_seed(0)
        model = nn.Linear(64, 64, device="cuda")
        progress = dckpt.TrainProgress(batch=dckpt.Batch(micro=2, accumulation=2))
        optimizer = torch.optim.AdamW(model.parameters())
        return model, dckpt.TrainState(model=model, optimizer=optimizer, progress=progress)

    model, state = make()
    model(torch.ones(2, 64, device="cuda")).square().mean().backward()
    state.progress.accumulate()
    with dckpt.Checkpointer(tmp_path / "run", signals=()) as checkpointer:
        checkpointer.resume(state)
        assert checkpointer.save(state, blocking=True).outcome == "committed"
    other, state = make()
    with dckpt.Checkpointer(tmp_path / "run", signals=()) as checkpointer:
        checkpointer.resume(state)

    assert state.progress.micro_step == 1
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert b.grad.is_cuda and torch.equal(a.grad, b.grad)
