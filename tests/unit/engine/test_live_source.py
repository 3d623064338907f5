"""A file made piece by piece from live tensors is the file that staging makes; an interrupted blocking save commits nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dckpt
from dckpt.blocks.buffer import ImageBuffer
from dckpt.blocks.source import PieceMemory
from dckpt.engine.live_source import LiveSource
from dckpt.engine.local_state import describe_state
from dckpt.engine.staging import stage
from dckpt.planning.files import plan_files
from dckpt.planning.layout import Layout

ALIGNMENT = 4096


class Mixture(nn.Module):
    """Every item size, memory in another order than the names', one tensor over several pieces, empty and scalar ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        tensors = {
            "wide": torch.randn(70, 1000, 3).transpose(0, 2),
            "image": torch.randn(5, 7, 11, 13).contiguous(memory_format=torch.channels_last),
            "strided": torch.randn(64, 64)[::2, ::3],
            "expanded": torch.randn(9, 1).expand(9, 500),
            "f64": torch.randn(3, 5, dtype=torch.float64),
            "bf16": torch.randn(7, 3).bfloat16(),
            "u8": torch.randint(0, 255, (70_001,), dtype=torch.uint8),
            "flag": torch.tensor(True),
            "complex": torch.randn(4, 4, dtype=torch.complex64).conj(),
            "scalar": torch.tensor(3.5),
            "empty": torch.zeros(0, 4),
            "large": torch.randn(600, 1000),
        }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def sources() -> tuple[LiveSource, memoryview]:
    state = dckpt.TrainState(model=Mixture())
    local = describe_state(state.capture(), None, world_size=1)
    layout = Layout(frozenset(), frozenset({"rng"}), (), {}, {}, frozenset(), ())
    files = plan_files(0, local.described.structure, local.boxes, layout, {"rng": 30_000})
    images, deferred = stage(local, files, ImageBuffer())
    assert deferred is None
    assert len(files) == 1
    plan, items = files[0]
    return LiveSource(plan, items, local), images[0].piece(0, plan.size, PieceMemory())


LIVE, IMAGE = sources()


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_piece_is_what_the_image_holds_there(data):
    begin = data.draw(st.integers(0, (len(IMAGE) - 1) // ALIGNMENT)) * ALIGNMENT
    stops = list(range(begin + ALIGNMENT, len(IMAGE), ALIGNMENT))
    end = data.draw(st.sampled_from([*stops[:40], *stops[-3:], len(IMAGE)]))

    assert LIVE.piece(begin, end, PieceMemory()) == IMAGE[begin:end]


def test_what_is_written_in_place_is_the_image_too():
    """Contiguous tensors, header and records where they lie; a piece with a tensor that has to be copied is not given."""
    state = dckpt.TrainState(model=nn.Sequential(nn.Linear(300, 400), nn.Linear(400, 70)))
    local = describe_state(state.capture(), None, world_size=1)
    layout = Layout(frozenset(), frozenset({"rng"}), (), {}, {}, frozenset(), ())
    ((plan, items),) = plan_files(0, local.described.structure, local.boxes, layout, {"rng": 30_000})
    (image,), _ = stage(local, [(plan, items)], ImageBuffer())
    live = LiveSource(plan, items, local)

    for begin in range(0, plan.size, 3 * ALIGNMENT):
        for end in (min(begin + ALIGNMENT, plan.size), plan.size):
            found = live.in_place(begin, end)
            assert found is not None
            assert b"".join(found) == image.piece(begin, end, PieceMemory())
    assert LIVE.in_place(0, LIVE.size) is None


def test_the_whole_file_is_the_image():
    assert LIVE.size == len(IMAGE) > 3 * 2**20
    assert LIVE.piece(0, LIVE.size, PieceMemory()) == IMAGE


class Loop:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(64, 64)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.progress = dckpt.TrainProgress(max_steps=100)
        self.state = dckpt.TrainState(model=self.model, optimizer=self.optimizer, progress=self.progress)

    def step(self) -> None:
        self.model(torch.ones(64)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.advance()


@pytest.mark.parametrize(("num_interrupts", "is_committed"), [(1, True), (2, False)])
def test_an_interrupted_blocking_save_is_finished_or_given_up(tmp_path, monkeypatch, num_interrupts, is_committed):
    """The writer reads live tensors; once the caller is gone they may change, so what it writes must not count then."""
    loop = Loop()
    seen: list[bool] = []
    real = LiveSource.piece

    with dckpt.Checkpointer(tmp_path / "run", signals=()) as checkpointer:
        checkpointer.resume(loop.state)
        loop.step()
        checkpointer.save(loop.state, blocking=True)
        loop.step()
        interrupts = iter(range(num_interrupts))

        def wait(self, timeout_s=None):
            if next(interrupts, None) is not None:
                raise KeyboardInterrupt
            seen.append(True)
            return real_wait(self, timeout_s)

        def slow_piece(self, begin, end, memory):
            while not seen:
                pass
            return real(self, begin, end, memory)

        real_wait = dckpt.PendingSave.wait
        monkeypatch.setattr(LiveSource, "piece", slow_piece)
        monkeypatch.setattr(dckpt.PendingSave, "wait", wait)
        with pytest.raises(KeyboardInterrupt):
            checkpointer.save(loop.state, blocking=True)
        loop.step()
        seen.append(True)
        checkpointer.wait()
        assert checkpointer.steps() == ([1, 2] if is_committed else [1])
        assert checkpointer.save(loop.state, blocking=True).outcome == "committed"
        assert checkpointer.steps() == ([1, 2, 3] if is_committed else [1, 3])
