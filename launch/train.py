"""Train a byte-level GPT and never lose more than the steps since the last committed checkpoint.

    torchrun --nproc-per-node 2 launch/train.py --checkpoint runs/gpt --steps 2000 --save-every 200

After a crash start the same command again, on the same number of ranks or on another one: it goes on from the newest
good checkpoint. Without torchrun, `python launch/train.py` trains in one process. This file is also the shortest
complete example of dckpt: everything that concerns it is in `train`.

Exit codes: 0 finished; 75 stopped on request and saved, start the same command again; 78 the checkpoint does not fit this
command, the message says why (`--allow CHECK` goes on all the same); anything else is an error.
SIGTERM and SIGUSR1 are such requests: sent to any rank, they make all ranks finish the same step, save it and exit with
75. torchrun passes SIGTERM on to its ranks, gives them `--shutdown-timeout` seconds (30 unless told) and exits with 1
itself; it passes SIGUSR1 on only if told: `torchrun --signals-to-handle SIGTERM,SIGINT,SIGUSR1`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

import dckpt

HEAD = 64  # size of an attention head


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each behind a norm and around a residual."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention_in, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_in, self.feed_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        drop = self.dropout if self.training else 0.0
        heads = self.attention_in(self.attention_norm(x)).unflatten(-1, (3, -1, HEAD)).transpose(1, 3)
        mixed = F.scaled_dot_product_attention(*heads.unbind(2), dropout_p=drop, is_causal=True)
        x = x + F.dropout(self.attention_out(mixed.transpose(1, 2).flatten(2)), drop)
        return x + F.dropout(self.feed_out(F.gelu(self.feed_in(self.feed_norm(x)))), drop)


class GPT(nn.Module):
    """A decoder over bytes; the output layer shares the embedding's weight."""

    def __init__(self, *, layers: int, width: int, context: int, dropout: float) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        for embedding in (self.embedding, self.position):
            nn.init.normal_(embedding.weight, std=0.02)
        for block in self.blocks:  # keeps the residual stream's variance independent of the depth
            for layer in (block.attention_out, block.feed_out):
                nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * layers))
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def read_text(source: Path | None) -> np.ndarray:
    """The bytes of a file or of every file below a folder; without one, the source text of Python's standard library."""
    if source is None:
        root = Path(sysconfig.get_path("stdlib"))
        files = [p for p in root.rglob("*.py") if not {"site-packages", "dist-packages"} & set(p.parts)]
    else:
        files = [p for p in source.rglob("*") if p.is_file()] if source.is_dir() else [source]
    return np.frombuffer(b"".join(p.read_bytes() for p in sorted(files)), np.uint8)


def start_ranks(args: argparse.Namespace) -> tuple[int, int, torch.device]:
    """(rank, world size, device); joins the process group when torchrun or another launcher made ranks."""
    launched = "RANK" in os.environ
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    args.parallel = args.parallel or ("fsdp" if launched else "none")
    if launched != (args.parallel != "none"):
        raise SystemExit(f"--parallel {args.parallel} does not fit: fsdp and ddp need torchrun, none must not have it.")
    if args.global_batch % (args.accumulation * world):
        raise SystemExit(
            f"--global-batch {args.global_batch} does not divide into {args.accumulation} micro-batches on"
            f" {world} ranks; change --global-batch or --accumulation."
        )
    has_gpus = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if has_gpus else torch.device("cpu")
    if has_gpus:
        torch.cuda.set_device(device)
    if args.parallel != "none":
        dist.init_process_group("nccl" if has_gpus else "gloo")
    return rank, world, device


def build_model(args: argparse.Namespace, rank: int, device: torch.device) -> nn.Module:
    torch.manual_seed(args.seed)  # the same weights on every rank, whatever their number
    model = GPT(layers=args.layers, width=args.width, context=args.context, dropout=args.dropout).to(device)
    torch.manual_seed(args.seed + 1 + rank)  # from here on each rank draws its own dropout
    if args.compile:
        for block in model.blocks:
            block.compile()
    if args.parallel == "fsdp":
        mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("data",))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    return DistributedDataParallel(model) if args.parallel == "ddp" else model


def build_optimizer(args: argparse.Namespace, model: nn.Module) -> tuple[torch.optim.Optimizer, LambdaLR]:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))

    def factor(step: int) -> float:  # linear warm-up, then a cosine down to a tenth
        if step < args.warmup:
            return (step + 1) / args.warmup
        done = min(1.0, (step - args.warmup) / max(1, args.steps - args.warmup))
        return 0.1 + 0.45 * (1 + math.cos(math.pi * done))

    return optimizer, LambdaLR(optimizer, factor)


class Trainer:
    """Plain PyTorch: the objects that make up the training, one optimizer step, one evaluation."""

    def __init__(self, args: argparse.Namespace, rank: int, batch: dckpt.Batch, device: torch.device) -> None:
        self.args, self.rank, self.world, self.device = args, rank, batch.data_parallel, device
        text = read_text(args.data)
        windows = np.lib.stride_tricks.sliding_window_view(text, args.context + 1)[:: args.context]
        self.learned, self.held_out = windows[: -args.global_batch], windows[-args.global_batch :]
        digest = hashlib.sha256(text).hexdigest()
        self.sampler = dckpt.ElasticDistributedSampler(
            self.learned, batch=batch, seed=args.seed, rank=rank, dataset_fingerprint=digest
        )
        self.batches = self._read_batches()
        self.model = build_model(args, rank, device)
        self.optimizer, self.scheduler = build_optimizer(args, self.model)
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.scaler)

    def _read_batches(self) -> Iterator[np.ndarray]:
        while True:  # each round is what is left of an epoch, from where the checkpoint stood
            yield from (self.learned[chosen] for chosen in self.sampler.batches())

    def step(self) -> float:
        """One optimizer step over a global batch; its mean loss over all ranks."""
        loss = torch.zeros((), device=self.device)
        for number in range(1, self.args.accumulation + 1):
            self._share_gradients(number == self.args.accumulation)
            part_loss = self._loss_of(next(self.batches)) / self.args.accumulation
            self.scaler.scale(part_loss).backward()
            loss += part_loss.detach()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return self._mean_over_ranks(loss)

    def evaluate(self) -> float:
        """The mean loss on text that is never learned. Training flags and random streams are put back afterwards."""
        with dckpt.evaluating(self.model), torch.no_grad():
            return self._mean_over_ranks(self._loss_of(self.held_out[self.rank :: self.world]))

    def _loss_of(self, rows: np.ndarray) -> torch.Tensor:
        tokens = torch.from_numpy(rows.astype(np.int64)).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
            return F.cross_entropy(self.model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def _share_gradients(self, now: bool) -> None:  # once a step, whatever the accumulation
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(now)
        elif isinstance(self.model, DistributedDataParallel):
            self.model.require_backward_grad_sync = now

    def _mean_over_ranks(self, value: torch.Tensor) -> float:
        if dist.is_initialized():
            dist.all_reduce(value)
        return value.item() / self.world


def train(args: argparse.Namespace, rank: int, world: int, device: torch.device) -> int:
    micro = args.global_batch // (args.accumulation * world)
    batch = dckpt.Batch(micro=micro, accumulation=args.accumulation, data_parallel=world)
    trainer = Trainer(args, rank, batch, device)
    progress = dckpt.TrainProgress(max_steps=args.steps, batch=batch)
    state = dckpt.TrainState(  # all that must survive; the random streams of every rank are always part of it
        model=trainer.model,
        optimizer=trainer.optimizer,
        scheduler=trainer.scheduler,
        scaler=trainer.scaler if args.scaler else None,
        data=trainer.sampler,  # each sample once an epoch on any number of ranks; moved by progress.advance()
        progress=progress,
        facts={"seed": args.seed, "config": {"layers": args.layers, "width": args.width, "context": args.context}},
    )
    every = dckpt.Every(steps=args.save_every)
    best = dckpt.Best("val_loss") if args.keep and args.evaluate_every else None
    retention = dckpt.Retention(last=args.keep, best=best)  # without any rule all checkpoints stay
    log_file = args.log_file if rank == 0 else os.devnull
    with (
        dckpt.Checkpointer(
            args.checkpoint, save=every, retention=retention, tensorboard=args.tensorboard
        ) as checkpointer,
        open(log_file, "a", buffering=1) as log,  # by lines: a kill loses no line
    ):
        policy = dckpt.ResumePolicy(allow=args.allow)
        try:
            if args.leg:  # further training, in most cases on other text: --steps more steps, and the schedule anew
                checkpointer.start_leg(state, scheduler="fresh", name=args.leg, policy=policy)
            elif args.resume != "never" and checkpointer.resume(state, policy=policy) is None and args.resume == "must":
                raise SystemExit(f"--resume must: expected a checkpoint in {args.checkpoint}, found none.")
        except dckpt.ResumeRejectedError as error:
            if not progress.done:
                raise
            if rank == 0:  # a launcher that starts a finished run again must not take it for a failed one
                print(f"Nothing is left to train. {error}", file=sys.stderr)
            return 0
        while not progress.done:
            lr, begun = trainer.scheduler.get_last_lr()[0], time.monotonic()
            loss = trainer.step()
            progress.advance(loss=loss)
            row = {"step": progress.step, "loss": loss, "lr": lr, "world_size": world, "time": time.time()}
            if args.evaluate_every and progress.step % args.evaluate_every == 0:
                row["val_loss"] = trainer.evaluate()
                checkpointer.save(state, metrics={"val_loss": row["val_loss"]})
            print(json.dumps(row), file=log)
            if rank == 0 and progress.step % 10 == 0:
                seconds = time.monotonic() - begun
                print(f"step {progress.leg_step}/{args.steps}: loss {loss:.4f}, {seconds:.2f} s", flush=True)
            if checkpointer.step(state) is dckpt.Stop:  # saves when due; Stop: a signal came or the work is done, saved
                break
        return 0 if progress.done else dckpt.EXIT_STOPPED


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a byte-level GPT; start the same command again after a crash.")
    add = parser.add_argument
    add("--checkpoint", default="runs/gpt", metavar="URL", help="the run's directory (default %(default)s)")
    add("--resume", choices=("auto", "must", "never"), default="auto", help="auto (default): if there is a checkpoint")
    add("--leg", metavar="NAME", help="train --steps more on this --data; the same NAME again goes on after a crash")
    add(
        "--allow", action="append", default=[], metavar="CHECK", help="resume in spite of this check's critical finding"
    )
    add("--tensorboard", type=Path, metavar="DIR", help="write TensorBoard events of loss, learning rate and resumes")
    add("--save-every", type=int, default=100, metavar="STEPS")
    add("--keep", type=int, metavar="N", help="keep the newest N checkpoints and the best (default: keep all)")
    add(
        "--evaluate-every", type=int, default=0, metavar="STEPS", help="measure val_loss, save with it (default: never)"
    )
    add("--log-file", default=os.devnull, metavar="FILE.jsonl", help="append one JSON line per step")
    add(
        "--data", type=Path, metavar="FILE|DIR", help="text to learn (default: the source of Python's standard library)"
    )
    add("--steps", type=int, default=1000)
    add("--seed", type=int, default=0)
    add("--global-batch", type=int, default=24, help="samples per step over all ranks (default %(default)s)")
    add("--accumulation", type=int, default=2, help="micro-batches per step and rank (default %(default)s)")
    add("--layers", type=int, default=6)
    add("--width", type=int, default=384, help="a multiple of 64, the size of an attention head (default %(default)s)")
    add("--context", type=int, default=128, help="bytes per sample (default %(default)s)")
    add("--dropout", type=float, default=0.1)
    add("--lr", type=float, default=1e-3)
    add("--warmup", type=int, default=20, metavar="STEPS")
    add("--parallel", choices=("fsdp", "ddp", "none"), help="default: fsdp under torchrun, none without")
    add("--bf16", action="store_true", help="matrix products in bfloat16")
    add("--scaler", action="store_true", help="scale the loss (GradScaler)")
    add("--compile", action="store_true", help="compile each block")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    rank, world, device = start_ranks(args)
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")
    try:
        return train(args, rank, world, device)
    except dckpt.ResumeRejectedError as error:
        if rank == 0:
            print(error, file=sys.stderr)
        return dckpt.EXIT_REJECTED
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
