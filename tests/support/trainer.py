"""A run of the real `transformers.Trainer`, for the tests that import its files; only imported where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import dckpt


def _model(seed: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2))


class _Samples(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, 64, (16,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def _trainer(place: Path, seed: int) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(place),
        max_steps=4,
        save_steps=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        weight_decay=0.1,
        lr_scheduler_type="cosine",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(model=_model(seed), args=arguments, train_dataset=_Samples())


def train(place: Path) -> tuple[Path, dict[str, torch.Tensor], list[float]]:
    """The checkpoint's directory, the first moments by name, the learning rates."""
    trainer = _trainer(place / "out", 0)
    trainer.train()
    return place / "out" / "checkpoint-4", _moments(trainer.model, trainer.optimizer), _rates(trainer.optimizer)


def _moments(model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    inner = getattr(optimizer, "optimizer", optimizer)
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(p)]: held["exp_avg"].clone() for p, held in inner.state.items()}


def _rates(optimizer: Any) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


def resume_imported(root: Path) -> tuple[dict[str, torch.Tensor], list[float], int]:
    """The same after a resume of the imported run into another model and the trainer's kind of optimizer."""
    trainer = _trainer(root.parent / "unused", 1)
    trainer.create_optimizer_and_scheduler(num_training_steps=4)
    progress = dckpt.TrainProgress(max_steps=100)
    state = dckpt.TrainState(
        model=trainer.model, optimizer=trainer.optimizer, scheduler=trainer.lr_scheduler, progress=progress
    )
    with dckpt.Checkpointer(root, signals=()) as checkpointer:
        assert checkpointer.resume(state) is not None
    return _moments(trainer.model, trainer.optimizer), _rates(trainer.optimizer), progress.step
